"""EpochChoice: which adapter a weight step ends with: its best epoch's, its last one's, or an average of late ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Adapter = dict[str, Tensor]


class EpochChoice:
    """The candidates of one weight step so far.

    Args:
        keep_best: the best by score; else the last one offered. Ties keep the earlier.
        average_last: how many of the newest adapters `average` is of, at most.
    """

    def __init__(self, *, keep_best: bool, average_last: int = 0) -> None:
        self.keep_best, self.average_last = keep_best, average_last
        self._kept: dict[str, Any] = {}
        self._offered = 0  # the newest epoch with a score
        self._newest: list[Adapter] = []

    @property
    def adapter(self) -> Adapter:
        """That of the epoch that is kept.

        Raises:
            KeyError: none has been offered.
        """
        adapter: Adapter = self._kept["adapter"]
        return adapter

    @property
    def record(self) -> dict[str, int]:
        """The epoch that is kept, from 1, and how many epochs its adapter is the average of (0: it is its own)."""
        return {name: self._kept[name] for name in ("epoch", "averaged")}

    def wants(self, epoch: int) -> bool:
        """Whether a score of this epoch, the last one of its step, is still needed."""
        return self._offered != epoch

    def offer(self, score: float, adapter: Adapter, *, epoch: int, averaged: int = 0) -> None:
        """An adapter with its score on val."""
        self._offered = epoch
        if not self._kept or not self.keep_best or score > self._kept["score"]:
            self._kept = {"score": score, "epoch": epoch, "adapter": adapter, "averaged": averaged}

    def epoch_ended(self, adapter: Adapter) -> None:
        """An epoch's adapter, for `average`. The step may end with it, at its last epoch or stopped early."""
        self._newest = [*self._newest, adapter][-self.average_last :] if self.average_last else []

    def average(self) -> tuple[Adapter, int]:
        """The average of the newest adapters, and their number; nothing and 0 if there are none."""
        count = len(self._newest)
        names = self._newest[0] if count else ()
        return {name: torch.stack([adapter[name] for adapter in self._newest]).mean(0) for name in names}, count

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors, for a checkpoint."""
        return {"kept": self._kept, "offered": self._offered, "newest": self._newest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._kept, self._newest = state["kept"], state.get("newest", [])  # older checkpoints have a sum instead
        self._offered = state.get("offered", self._kept.get("epoch", 0))  # older checkpoints lack it
