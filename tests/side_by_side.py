"""Ranks as threads: real control flow of several processes in one, in milliseconds."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from cotune.programs.ranks import Counter, Ranks

_T = TypeVar("_T")


class _Table:
    """Where the threads lay down what they give, and wait for one another."""

    def __init__(self, count: int) -> None:
        self.given: list[Any] = [None] * count
        self.barrier, self.lock = threading.Barrier(count, timeout=20), threading.Lock()


class ThreadRanks(Ranks):
    """One of several threads. `gathered` counts its collectives."""

    def __init__(self, index: int, table: _Table, counters: Sequence[Counter] = ()) -> None:
        self.count, self.index, self.counters = len(table.given), index, counters
        self._table, self.gathered = table, 0

    def gather(self, value: Any) -> list[Any]:
        return [json.loads(one) for one in self._laid_down(json.dumps(value))]

    def gather_tensors(self, mine: Any) -> list[Any]:
        return self._laid_down(mine.clone())

    def together(self, call: Callable[[], _T]) -> list[_T]:
        def alone() -> _T:  # torch's generator and its memory are the whole process's
            with self._table.lock:
                return call()

        return super().together(alone)

    def _laid_down(self, value: Any) -> list[Any]:
        self.gathered += 1
        self._table.given[self.index] = value
        self._table.barrier.wait()
        found = list(self._table.given)
        self._table.barrier.wait()
        return found


def side_by_side(count: int, call: Callable[[ThreadRanks], _T]) -> list[_T | BaseException]:
    """What `call` gives, or raises, in each of so many ranks."""
    table = _Table(count)

    def one(index: int) -> _T | BaseException:
        try:
            return call(ThreadRanks(index, table))
        except BaseException as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))
