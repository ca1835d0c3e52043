"""Rollouts: what a run of a program on an example leaves behind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cotune.programs.example import Example
from cotune.programs.lm import Completion

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


@dataclass(frozen=True)
class Rollout:
    """One run of a program on one example.

    `score` is in [0, 1], and 0 wherever there is an `error`; `feedback`, `objectives` and `stages` (feedback by stage)
    are what the metric said beside it. `steps` holds the calls that were made, one whose completion could not be read
    with empty `outputs`.
    """

    example: Example
    steps: tuple[Step, ...]
    prediction: Mapping[str, Any] | None
    score: float
    error: Failure | None = None
    feedback: str = ""
    objectives: Mapping[str, float] = field(default_factory=dict)
    stages: Mapping[str, str] = field(default_factory=dict)


def mean_score(done: Sequence[Rollout]) -> float:
    """Mean score, 0 for no rollouts."""
    return math.fsum(r.score for r in done) / len(done) if done else 0.0
