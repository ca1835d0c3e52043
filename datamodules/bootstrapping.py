"""What is collected on the train set, and what training pairs are made of it: the options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cotune.errors import BadValueError
from cotune.programs import LM


@dataclass(frozen=True)
class Bootstrapping:
    """How traces are collected from the train set, and what training pairs are made of them.

    Attributes:
        threshold: lowest score that counts as a success (lambda in the paper; 1 for a binary metric).
        attempts: most runs of an example, until enough succeed. The first uses the current prompts, as in the paper.
        traces_per_example: successes to collect per example. All examples have the same cap, so easy ones do not
            dominate. A success with the same completions as an earlier success of its example does not count.
        hints: further attempts for examples without any success, with the gold answer as a hint (STaR,
            Zelikman et al., 2022). Training pairs never hold the hint, and no run that speaks of it is trained
            on. Such successes are counted apart.
        gold_answers: an example that still has no success gives one pair: the last call of its first run that ended
            with a prediction, with the labels in place of the completion. This needs labels for every output of that
            call's stage, which the form can write, so the stage must not reason. Counted apart; earlier calls are not
            trained on. "auto" does so where that stage only chooses, as a classifier does, and some example is solved:
            where none is, the metric or the labels may be wrong.
        temperature: sampling temperature of all attempts after the first.
        fresh_demos: later attempts show this many freshly drawn demos per stage, never one of the example itself:
            earlier successes, and labels if a stage's inputs and output have them. 0 keeps the current prompts.
        pairs: prompts in the training pairs: "initial" (zero-shot, as in the paper) or "current".
        balance_stages: train on equally many pairs of each stage; pairs of rarer stages are repeated within an epoch.
        cut_traces: also learn from passing runs in which a text was closed at its token limit and not by the LM, as if
            the text ended there.
        demo_share: share of the batches whose pairs carry 1 to `fresh_demos` demos of other rows, so that the tuned
            LM can still use demos. 0 in the paper.
        teacher: an LM, such as an endpoint, that runs each example the student does not solve once, with the
            current prompts. The student trains on its successes in its own form and ids. Counted apart.
    """

    threshold: float = 1.0
    attempts: int = 10
    traces_per_example: int = 1
    hints: int = 0
    gold_answers: bool | Literal["auto"] = "auto"
    temperature: float = 0.7
    fresh_demos: int = 3
    pairs: Literal["initial", "current"] = "initial"
    balance_stages: bool = False
    cut_traces: bool = False
    demo_share: float = 0.0
    teacher: LM | None = None

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise BadValueError(f"attempts {self.attempts} is below 1.")
        if not 1 <= self.traces_per_example <= self.attempts:
            raise BadValueError(
                f"traces_per_example {self.traces_per_example} is outside 1 to attempts ({self.attempts}): an attempt "
                "gives one trace at most."
            )
        if self.hints < 0:
            raise BadValueError(f"hints {self.hints} is below 0; it is a number of attempts, and 0 turns hints off.")
        if self.gold_answers not in (True, False, "auto"):
            raise BadValueError(f'gold_answers "{self.gold_answers}" is none of true, false and "auto".')
        if self.fresh_demos < 0:
            raise BadValueError(f"fresh_demos {self.fresh_demos} is below 0.")
        if not 0 < self.threshold <= 1:
            raise BadValueError(
                f"threshold {self.threshold} is outside (0, 1]; at 0 a failed run would count as a success."
            )
        if not 0 <= self.demo_share <= 1:
            raise BadValueError(f"demo_share {self.demo_share} is outside [0, 1].")
        if self.demo_share and not self.fresh_demos:
            raise BadValueError(f"demo_share {self.demo_share} needs fresh_demos above 0: it draws up to that many.")


@dataclass(frozen=True)
class Runs:
    """Runs of each example that an objective wants instead of tries until one passes.

    Attributes:
        each: runs of an example, all drawn by the same prompts, which are those of the training rows.
        temperature: of all of them.
        prompts: "initial" (the program's own, zero-shot) or "current".
    """

    each: int
    temperature: float = 1.0
    prompts: Literal["initial", "current"] = "current"

    def __post_init__(self) -> None:
        if self.each < 1:
            raise BadValueError(f"{self.each} runs per example is below 1.")
        if self.temperature < 0 or (self.temperature == 0 and self.each > 1):
            raise BadValueError(
                f"temperature {self.temperature:g} is too low for {self.each} runs per example: at 0 all are the same."
            )
