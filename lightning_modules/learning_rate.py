"""The learning rate: its course within a weight step, and how high it is for an LM of some size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LearningRate:
    """How the learning rate moves within one weight step: up from 0 over `warmup` steps, then along `decay`.

    Attributes:
        warmup: optimiser steps to the full rate.
        decay: "cosine" or "linear" to zero at the weight step's end; "late": whole, then linear to zero over the last
            third (warm-up, stable, decay); or "constant".
    """

    warmup: int = 10
    decay: Literal["cosine", "linear", "late", "constant"] = "late"

    def factor(self, step: int, total: int) -> float:
        """What the rate is multiplied by at optimiser step `step` (from 0) of `total`.

        >>> [round(LearningRate(warmup=2, decay="linear").factor(i, 6), 2) for i in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = min((step - self.warmup) / max(total - self.warmup, 1), 1.0)
        courses = {
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
            "linear": 1 - done,
            "late": min(1.0, 3 * (1 - done)),
            "constant": 1.0,
        }
        return courses[self.decay]


_FITTING = ((135e6, 5e-4), (494e6, 5e-5))
"""Parameters of an LM and the learning rate that was found to fit its adapter. Below and above, the nearest holds."""


def rate_for(parameters: float) -> float:
    """The full learning rate for the adapter of an LM of this size.

    >>> rate_for(1e6), round(rate_for(258e6), 5), rate_for(7e9)
    (0.0005, 0.00016, 5e-05)
    """
    (small, high), (large, low) = _FITTING
    share = math.log(parameters / small) / math.log(large / small)
    return high if share <= 0 else low if share >= 1 else high * (low / high) ** share
