"""EpochChoice: which adapter a weight step ends with: its best epoch's, its last one's, or an average of late ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

Adapter = dict[str, Tensor]


class EpochChoice:
    """The candidates of one weight step so far.

    Args:
        keep_best: the best by score; else the last one offered. Ties keep the earlier.
    """

    def __init__(self, *, keep_best: bool) -> None:
        self.keep_best = keep_best
        self._kept: dict[str, Any] = {}
        self._offered = 0  # the newest epoch with a score
        self._sum: Adapter = {}
        self._summed = 0

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

    def add_to_average(self, adapter: Adapter) -> None:
        """One more adapter for `average`."""
        self._sum = {name: self._sum[name] + tensor for name, tensor in adapter.items()} if self._sum else adapter
        self._summed += 1

    def average(self) -> tuple[Adapter, int]:
        """The average of the adapters added, and their number; nothing and 0 if there are none."""
        return {name: tensor / self._summed for name, tensor in self._sum.items()}, self._summed

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors, for a checkpoint."""
        return {"kept": self._kept, "offered": self._offered, "sum": self._sum, "summed": self._summed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._kept, self._sum, self._summed = state["kept"], state["sum"], state["summed"]
        self._offered = state.get("offered", self._kept.get("epoch", 0))  # older checkpoints lack it
