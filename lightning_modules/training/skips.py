"""Training steps that are skipped because their loss or gradients are not numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cotune.errors import BadValueError, CotuneError


class NonFiniteError(CotuneError, RuntimeError):
    """Too many training steps had a loss or gradients that are not numbers."""


@dataclass(frozen=True)
class SkipLimits:
    """How many skipped training steps a run bears before it stops.

    Attributes:
        in_a_row: skipped one after another. Weights that have gone wrong do not come back.
        total: skipped over the whole run.
    """

    in_a_row: int = 5
    total: int = 50

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise BadValueError(f"skip_limits.{name} {value} is below 0; 0 stops at the first such step.")


class Skips:
    """Counts skipped steps, says each, and stops a run at its limits."""

    def __init__(self, limits: SkipLimits) -> None:
        self.limits = limits
        self.total = self.in_a_row = 0

    def passed(self) -> None:
        """A step whose loss and gradients are numbers."""
        self.in_a_row = 0

    def skipped(self, *, step: int, what: str, rows: Sequence[str], learning_rate: float) -> None:
        """A step that is skipped: `what` was not a number, because of these rows where they are known.

        Raises:
            NonFiniteError: one of the limits is passed.
        """
        self.total += 1
        self.in_a_row += 1
        said = f"training step {step}: {what} is not finite{_of(rows)}"
        if self.total <= self.limits.total and self.in_a_row <= self.limits.in_a_row:
            print(f"{said}. The step is skipped: weights and optimiser stay as they are ({self.total} so far).")
            return
        raise NonFiniteError(
            f"{said}. That makes {self.in_a_row} skipped steps in a row and {self.total} in all; the limits are "
            f"model.skip_limits.in_a_row {self.limits.in_a_row} and total {self.limits.total}. The weights are "
            f"unchanged. Try a lower learning rate (now {learning_rate:.1e}); trainer.gradient_clip_val 1.0; "
            "model.lm.dtype float32; look at these examples with `cotune preview` and take them out if they are broken."
        )

    def state(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load(self, state: Mapping[str, int]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]


def _of(rows: Sequence[str], most: int = 8) -> str:
    named = [row for row in rows if row]
    if not named:
        return ""
    more = f" and {len(named) - most} more" if len(named) > most else ""
    return f" (examples {', '.join(named[:most])}{more})"
