"""TorchRanks: the processes that one of Lightning's strategies has started, over torch.distributed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from cotune.programs.ranks import Counter, RankLostError, Ranks
from torch import Tensor

_PATIENCE = timedelta(days=7)
"""How long a process waits for the others: one may have a run's slowest examples. One that dies is noticed at once."""


class TorchRanks(Ranks):
    """All processes of the run, as far as torch.distributed knows any.

    What they say to one another goes over gloo, also where gradients go over NCCL: the devices may be busy, and waiting
    there has a limit of minutes.

    Args:
        counters: see `Ranks`.
    """

    def __init__(self, counters: Sequence[Counter] = ()) -> None:
        self.counters = counters
        self._group: Any = None
        if dist.is_available() and dist.is_initialized():
            self.count, self.index = dist.get_world_size(), dist.get_rank()
        if self.count > 1:
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def gather(self, value: Any) -> list[Any]:
        if self.count == 1:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        with _lost():
            dist.all_gather(sizes, torch.tensor([len(mine)]), group=self._group)
            wide = int(max(sizes))
            found = [torch.zeros(wide, dtype=torch.uint8) for _ in range(self.count)]
            dist.all_gather(found, torch.nn.functional.pad(mine, (0, wide - len(mine))), group=self._group)
        return [json.loads(bytes(text[: int(size)].numpy())) for text, size in zip(found, sizes, strict=True)]

    def gather_tensors(self, mine: Tensor) -> list[Tensor]:
        if self.count == 1:
            return [mine]
        found = [mine.new_empty(mine.shape) for _ in range(self.count)]
        with _lost():
            dist.all_gather(found, mine)
        return found


@contextmanager
def _lost() -> Iterator[None]:
    """Says in our words that a process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise RankLostError(
            "another process of this run has ended; its message, if it wrote one, is above. The saved files are "
            "intact: start the same command again to resume."
        ) from error
