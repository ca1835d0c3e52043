"""Rollouts: what a run of a program on an example leaves behind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from cotune.errors import CotuneError
from cotune.programs.example import Example
from cotune.programs.lm import Completion, completion_of_plain
from cotune.programs.program import NamedValues
from cotune.programs.types import plain

Kind = Literal["format", "type", "program", "retriever", "metric"]


@dataclass(frozen=True)
class Failure:
    """Why a rollout has no valid score. Failures of format and type are the LM's; the others are the user's code."""

    kind: Kind
    message: str


@dataclass(frozen=True)
class Step:
    """One stage call of a rollout, with everything that training on it needs. Inputs and outputs are texts: as the LM
    was shown them, and as it wrote them."""

    stage: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    messages: Sequence[Mapping[str, str]]
    completion: Completion

    @property
    def closed(self) -> tuple[str, ...]:
        """Names of the fields that were closed at their token limit."""
        return tuple(filled.name for filled in self.completion.fields if filled.ended == "length")


class PredictionError(CotuneError):
    """The program gave no prediction for these inputs: a completion did not parse, or its code raised."""


@dataclass(frozen=True)
class Rollout:
    """One run of a program on one example.

    `score` is in [0, 1], and 0 wherever there is an `error`, unless it settles several runs; `feedback`, `objectives`
    and `stages` (feedback by stage) are what the metric said beside it. `steps` holds the calls that were made, one
    whose completion could not be read with empty `outputs`.
    """

    example: Example
    steps: tuple[Step, ...]
    prediction: Mapping[str, Any] | None
    score: float
    error: Failure | None = None
    feedback: str = ""
    objectives: Mapping[str, float] = field(default_factory=dict)
    stages: Mapping[str, str] = field(default_factory=dict)

    @property
    def answer(self) -> NamedValues:
        """The prediction of a run that must have come to one.

        Raises:
            PredictionError: it did not.
        """
        if self.error is not None or self.prediction is None:
            raise PredictionError(self.error.message if self.error else "the program gave no prediction")
        return NamedValues(self.prediction)


def rollout_to_plain(rollout: Rollout) -> dict[str, Any]:
    """All of a rollout but its example, in what JSON holds; values of the prediction as files have them."""
    bare = replace(rollout, example=Example("", {}, {}), prediction=None)
    prediction = None if rollout.prediction is None else plain(rollout.prediction)
    return {**asdict(bare), "prediction": prediction}


def rollout_of_plain(found: Mapping[str, Any], example: Example) -> Rollout:
    """A rollout from plain types, on the example that it was on."""
    steps = (Step(**{**step, "completion": completion_of_plain(step["completion"])}) for step in found["steps"])
    prediction, error = found["prediction"], found["error"]
    more = {
        "example": example,
        "steps": tuple(steps),
        "prediction": None if prediction is None else NamedValues(prediction),
        "error": None if error is None else Failure(**error),
    }
    return Rollout(**{**found, **more})


def mean_score(done: Sequence[Rollout]) -> float:
    """Mean score, 0 for no rollouts."""
    return math.fsum(r.score for r in done) / len(done) if done else 0.0


def mean_tokens(done: Sequence[Rollout]) -> float:
    """Mean number of tokens that a run reads and writes, 0 for no rollouts."""
    steps = [step.completion for rollout in done for step in rollout.steps]
    return sum(len(c.prompt_ids) + len(c.completion_ids) for c in steps) / max(len(done), 1)
