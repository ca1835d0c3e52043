"""Costs: what the LM and the clock say a step has cost, also across a stop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

from cotune.lightning_modules import Usage


class Counted(Protocol):
    """An LM that counts what it was asked."""

    usage: Usage


class Costs:
    """Counts what is spent between two boundaries.

    The LM counts its own calls; a checkpoint holds that count, so that calls which are made again after a kill count
    once.
    """

    def __init__(self) -> None:
        self._usage, self._at_boundary = Usage(), Usage()
        self._before, self._began = 0.0, time.perf_counter()

    def begin(self, lm: Counted, *, resumed: bool) -> None:
        """From now on this LM is counted; the count of a resumed run goes on from its checkpoint."""
        self._began = time.perf_counter()
        if resumed:
            lm.usage = self._usage
        else:
            self._usage, self._at_boundary = lm.usage, Usage(**vars(lm.usage))

    @property
    def seconds_before(self) -> float:
        """Since the last boundary, in earlier processes."""
        return self._before

    @property
    def seconds(self) -> float:
        """Since the last boundary; of a resumed run also those of the processes before, up to their checkpoint."""
        return self._before + time.perf_counter() - self._began

    def take(self) -> dict[str, Any]:
        """What has been spent since this was asked last."""
        spent, seconds = self._usage.since(vars(self._at_boundary)), self.seconds
        self._at_boundary = Usage(**vars(self._usage))
        self._before, self._began = 0.0, time.perf_counter()
        return {
            "lm_calls": spent["calls"],
            "prompt_tokens": spent["prompt_tokens"],
            "completion_tokens": spent["completion_tokens"],
            "too_long": spent["too_long"],
            "cached_calls": spent["cached"],
            "generating_seconds": round(spent["seconds"], 3),
            "seconds": round(seconds, 3),
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain types, for a checkpoint."""
        return {"usage": dict(vars(self._usage)), "at_boundary": dict(vars(self._at_boundary)), "seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._usage, self._at_boundary = Usage(**state["usage"]), Usage(**state["at_boundary"])
        self._before = state["seconds"]
