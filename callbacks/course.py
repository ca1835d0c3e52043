"""Course: where a run is in its schedule, what its steps are to do, and the seeds of their draws."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cotune.callbacks.schedule import WeightStep
from cotune.errors import BadValueError
from cotune.programs import Prompts


@dataclass(frozen=True)
class Options:
    """How steps are done; see `Alternate`, whose arguments these are."""

    epochs: int = 5
    weights: Literal["continue", "fresh"] = "continue"
    keep: Literal["best", "last"] = "best"
    keep_best_epoch: bool = True
    try_both_prompts: bool = True
    gate: bool = True
    average_last: int = 0
    search_examples: int | None = None
    lm_calls: int | None = None
    test_prefixes: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise BadValueError(f"epochs {self.epochs} is below 1; leave w out of the schedule to train nothing.")
        if self.search_examples is not None and self.search_examples < 1:
            raise BadValueError(f"search_examples {self.search_examples} is below 1; null uses the whole train set.")


class Course:
    """A schedule, and how far a run has come in it.

    Args:
        schedule: letters of the steps, in order.
        steps: letter -> settings, of the weight steps.

    Attributes:
        history: a record of each boundary so far.
        incumbent: the prompts at the last boundary.
    """

    def __init__(self, schedule: Sequence[str], steps: Mapping[str, WeightStep], options: Options) -> None:
        self.schedule, self.steps, self.options = tuple(schedule), steps, options
        for letter in sorted(set(schedule) & set(steps)) or set(steps) & {"w"}:
            if options.average_last not in (0, *range(2, steps[letter].epochs_or_rounds + 1)):
                raise BadValueError(
                    f"average_last {options.average_last} must be 0 (off) or 2 to the epochs of each weight step; "
                    f"{letter} has {steps[letter].epochs_or_rounds}."
                )
        self.history: list[dict[str, Any]] = []
        self.incumbent: Prompts = {}

    @property
    def position(self) -> int:
        """Steps of the schedule that are done."""
        return max(len(self.history) - 1, 0)

    @property
    def settings(self) -> WeightStep:
        """Of the weight step under way."""
        return self.steps[self.schedule[self.position]]

    def title(self, what: str) -> str:
        return f"[{self.position}/{len(self.schedule)}] {what}"

    def seed(self, *parts: Any) -> int:
        """A 31-bit seed from what it is for."""
        text = "|".join(map(str, (self.options.seed, *parts)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1

    def rehearse(self) -> None:
        """From now on weight steps are one epoch long, as `fast_dev_run` asks."""
        self.steps = {letter: replace(step, epochs=1, rounds=None) for letter, step in self.steps.items()}
