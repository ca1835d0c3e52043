"""The learning rate: its course within a weight step, and how high it is for an LM of some size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from cotune.errors import BadValueError
from torch import Tensor


@dataclass(frozen=True)
class LearningRate:
    """How the learning rate moves within one weight step: up from 0 over `warmup` steps, then along `decay`.

    Attributes:
        warmup: optimiser steps to the full rate.
        decay: "cosine" or "linear" to zero at the weight step's end; "late": whole, then linear to zero over the last
            third (warm-up, stable, decay); or "constant".

    Raises:
        BadValueError: a warm-up below 0.
    """

    warmup: int = 10
    decay: Literal["cosine", "linear", "late", "constant"] = "late"

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise BadValueError(f"model.learning_rate.warmup {self.warmup} is below 0; 0 is no warm-up.")

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


def made_optimizer(
    factory: Callable[[Sequence[Tensor]], torch.optim.Optimizer], parameters: Sequence[Tensor], *, size: float
) -> torch.optim.Optimizer:
    """The optimiser of these parameters.

    Its groups know their full rate, `initial_lr`, and whether it is the one that fits an LM of this size, `by_size`.

    Raises:
        BadValueError: an option has a value that it does not take, or it is LBFGS.
    """
    try:
        made = factory(parameters)
    except (TypeError, ValueError) as error:
        raise BadValueError(f"model.optimizer cannot be made: {error}. Its options are those of its class.") from error
    if isinstance(made, torch.optim.LBFGS):
        raise BadValueError(
            "model.optimizer LBFGS computes the loss many times in a step, so the learning rate would lose count of "
            "steps; take AdamW, SGD or another that computes it once."
        )
    for group in made.param_groups:
        group["by_size"] = group["lr"] == 0
        group["initial_lr"] = group["lr"] or rate_for(size)
    return made


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
