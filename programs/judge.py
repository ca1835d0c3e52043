"""LMJudge: a metric that asks an LM how good an answer is, and measures how often it contradicts itself."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cotune.errors import BadValueError
from cotune.programs.example import Example, content_id
from cotune.programs.form import Form, Lines
from cotune.programs.lm import LM, Sampling
from cotune.programs.metrics import BatchMetric
from cotune.programs.program import Call, Program, Stage
from cotune.programs.rollout import Failure, Rollout
from cotune.programs.runner import Runner
from cotune.programs.score import Score
from cotune.programs.signature import Signature
from cotune.programs.types import as_text

_TASK = (
    "Judge an answer to a task. Say first, briefly, what is right and what is wrong about it; then give the verdict."
)


@dataclass(frozen=True)
class Noise:
    """How far a judge agrees with itself.

    Attributes:
        asked_twice: answers that were judged twice.
        contradicted: of those, the ones with two different verdicts.
        variance: of one score, from the judge alone: half the mean square of the two scores' difference.
    """

    asked_twice: int
    contradicted: int
    variance: float

    @property
    def rate(self) -> float:
        """Share of answers on which the judge contradicts itself."""
        return self.contradicted / self.asked_twice if self.asked_twice else 0.0

    def standard_error(self, scores: int, error: float = 0.0) -> float:
        """The standard error of a mean of that many scores: `error`, of the choice of examples, and the judge's.

        >>> round(Noise(100, 10, 0.05).standard_error(50, error=0.04), 4)
        0.051
        """
        return math.sqrt(error**2 + self.variance / scores) if scores else error

    def __str__(self) -> str:
        if not self.asked_twice:
            return "the judge was asked once about each answer: its noise is not known"
        return (
            f"the judge contradicted itself on {self.contradicted} of {self.asked_twice} answers that it judged twice "
            f"({100 * self.rate:.0f}%); that alone gives the mean of 100 scores a standard error of "
            f"{self.standard_error(100):.3f}"
        )


class LMJudge(BatchMetric):
    """A metric by an LM's verdict.

    The LM is shown the example's inputs, its labels if they count, the prediction and the rubric. All answers of a run
    are judged in one batch; an LM with a store is asked about the same answer only once. What the judge says before its
    verdict becomes the score's feedback. A verdict that cannot be read is a failure of the metric, and counted as one.

    Args:
        lm: any LM. Not the one that is tuned: its verdicts would move with its weights.
        rubric: what makes an answer good, in words.
        scale: the verdicts from worst to best; they give scores from 0 to 1 in equal steps.
        reference: whether the judge sees the labels.
        noise: share of answers, in [0, 1], that are judged twice; see `Noise`. The score is the first verdict's.
        form: how the judge is asked and read.
        sampling: how the judge's completions are drawn.
    """

    def __init__(
        self,
        lm: LM,
        rubric: str = "",
        scale: Sequence[str] = ("no", "partly", "yes"),
        reference: bool = True,
        noise: float = 0.0,
        form: Form | None = None,
        sampling: Sampling = Sampling(max_new_tokens=512),  # noqa: B008 (frozen)
    ) -> None:
        if len(scale) < 2:
            raise BadValueError(f"scale {list(scale)} of the judge needs two verdicts at least, from worst to best.")
        if not 0 <= noise <= 1:
            raise BadValueError(f"noise {noise} of the judge is outside [0, 1]; it is a share of answers, e.g. 0.1.")
        if not rubric and not reference:
            raise BadValueError("the judge has neither a rubric nor a reference to judge by; give a rubric.")
        self.lm, self.rubric, self.scale = lm, rubric, tuple(map(str, scale))
        self.reference, self.noise_share = reference, noise
        self._runner = Runner(_Judging(self.rubric, self.scale, reference), lm, form or Lines(), None, sampling, 1.0)
        self._twice: dict[str, tuple[float, float]] = {}

    def ask(self, lm: LM) -> None:
        """Asks this LM from now on."""
        self.lm, self._runner = lm, replace(self._runner, lm=lm)

    @property
    def noise(self) -> Noise:
        """How far the judge agreed with itself so far; the same answer counts once."""
        pairs = list(self._twice.values())
        squares = [(first - second) ** 2 for first, second in pairs]
        return Noise(len(pairs), sum(square > 0 for square in squares), sum(squares) / (2 * len(pairs) or 1))

    def state_dict(self) -> dict[str, Any]:
        """What was judged twice, so that a continued run knows the noise of all of it."""
        return {"twice": {name: list(pair) for name, pair in self._twice.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._twice |= {name: (first, second) for name, (first, second) in state["twice"].items()}

    def scores(self, pairs: Sequence[tuple[Example, Mapping[str, Any]]]) -> list[Score | Failure]:
        """The verdicts as scores.

        Raises:
            LMUnavailableError: the judge's LM cannot be had.
        """
        cases = [self._case(example, prediction) for example, prediction in pairs]
        first = self._verdicts(cases, attempt=0)
        again = [at for at, case in enumerate(cases) if _drawn(case.id, self.noise_share)]
        for at, second in zip(again, self._verdicts([cases[at] for at in again], attempt=1), strict=True):
            one = first[at]
            if isinstance(one, Score) and isinstance(second, Score):
                self._twice[cases[at].id] = (one.value, second.value)
        return first

    def _case(self, example: Example, prediction: Mapping[str, Any]) -> Example:
        """What the judge is asked, as an example; its id is its content, so that equal cases are drawn alike."""
        shown = {"task": _listed(example.inputs), "answer": _listed(prediction)}
        if self.reference:
            shown["reference"] = _listed(example.labels)
        return Example.of(shown, {})

    def _verdicts(self, cases: Sequence[Example], *, attempt: int) -> list[Score | Failure]:
        if not cases:
            return []
        program = self._runner.program
        done = self._runner.run(cases, program.initial_prompts(), attempt=attempt)
        return [self._score(rollout) for rollout in done]

    def _score(self, rollout: Rollout) -> Score | Failure:
        if rollout.error is not None or rollout.prediction is None:
            said = rollout.error.message if rollout.error else "it gave none"
            return Failure("metric", f"the judge's verdict cannot be read: {said}")
        place = self.scale.index(rollout.prediction["verdict"])
        return Score(place / (len(self.scale) - 1), str(rollout.prediction["reasoning"]))


class _Judging(Program):
    """Asks for one verdict."""

    def __init__(self, rubric: str, scale: Sequence[str], reference: bool) -> None:
        inputs = ("task", "reference", "answer") if reference else ("task", "answer")
        told = [_TASK, *([f"What makes an answer good: {rubric}"] if rubric else [])]
        if reference:
            told.append("The reference is a right answer; one in other words is right too.")
        self.judge = Stage(
            Signature(
                inputs,
                ("reasoning", "verdict"),
                "\n".join(told),
                {"verdict": f"one of {', '.join(scale)} (from worst to best)"},
                {"verdict": list(scale)},
            )
        )

    def run(self, **shown: str) -> Generator[Call, Mapping[str, Any], Mapping[str, Any]]:
        return (yield self.judge(**shown))


def _listed(values: Mapping[str, Any]) -> str:
    """Named values as text: the bare value if there is one, else a line for each."""
    texts = {name: as_text(value) for name, value in values.items() if value is not None} or {"": Form.missing}
    return (
        next(iter(texts.values())) if len(texts) == 1 else "\n".join(f"{name}: {text}" for name, text in texts.items())
    )


def _drawn(name: str, share: float) -> bool:
    """Whether a case is among the share that is judged twice: the same cases in every run."""
    return int(content_id("judged twice", name), 16) < share * 16**12
