"""SavePolicy: when a run saves, so that a kill costs little and saving takes next to no time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from cotune.errors import BadValueError

_SHARE = 0.015
"""Most of a run's time that saving may take, where it is left to the policy when to save."""


class SavePolicy:
    """Decides when to save; it is told when that has been done, and how long it took.

    Args:
        every: optimiser steps between two saves, or "auto": as often as keeps saving under 2 % of the time.
        clock: seconds from anywhere.
    """

    def __init__(
        self, every: int | Literal["auto"] = "auto", *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        if every != "auto" and every < 1:
            raise BadValueError(f'save_every {every} is below 1; it is a number of optimiser steps, or "auto".')
        self.every, self._clock = every, clock
        self._at, self._step, self._takes = clock(), 0, 0.0

    def began(self, step: int) -> None:
        """A process begins, or goes on, at this optimiser step with all of it saved."""
        self._at, self._step = self._clock(), step

    def saved(self, step: int, seconds: float) -> None:
        """All up to this optimiser step was saved just now, which took so long."""
        self._at, self._step, self._takes = self._clock(), step, seconds

    def due(self, step: int) -> bool:
        """Whether to save after this optimiser step."""
        if self.every == "auto":
            return self._clock() - self._at >= self._takes / _SHARE
        return step - self._step >= self.every

    def due_at_boundary(self, step: int, *, stored: bool) -> bool:
        """Whether to save where a search, a collection or a score has ended.

        Always, unless that comes too soon after a save and completions are kept (`stored`), from which what happened
        since is gone through again in moments.
        """
        return self.every != "auto" or not stored or self.due(step)
