"""Scores: what a metric gives back, a number with the reason for it where it has one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Score:
    """A metric's judgement of one prediction. A metric may also return the bare number.

    Attributes:
        value: in [0, 1], higher is better.
        feedback: in words, why it is no more; prompt searches that rewrite instructions read it.
        objectives: further numbers in [0, 1] by name, where there is more than one thing to be good at.
        stages: feedback on single stages, by their names: what each of them got wrong.

    >>> float(Score(0.5, "two of four fields are right"))
    0.5
    """

    value: float
    feedback: str = ""
    objectives: Mapping[str, float] = field(default_factory=dict)
    stages: Mapping[str, str] = field(default_factory=dict)

    def __float__(self) -> float:
        return float(self.value)

    def __bool__(self) -> bool:
        """Whether the number is not 0, so that `if exact_match(...)` means what it says."""
        return self.value != 0
