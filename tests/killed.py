"""Searches that are killed: an LM that keeps its completions, as the store does, and dies before a given batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cotune.programs import Completion, Request, Sampling
from cotune.prompting import Found


class Kept:
    """An LM whose completions outlive the process: what was asked before is answered from the store."""

    def __init__(self, lm: Any, store: dict[str, Completion], dies_at: int = -1) -> None:
        self.lm, self.store, self.left, self.asked = lm, store, dies_at, 0

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        keys = [repr((request, sampling)) for request in requests]
        new = {key: request for key, request in zip(keys, requests, strict=True) if key not in self.store}
        self.asked += len(new)
        self.store.update(zip(new, self.lm.complete(list(new.values()), sampling), strict=True))
        return [self.store[key] for key in keys]


def same_when_killed(search: Callable[[Any], Found], lm: Callable[[], Any]) -> None:
    """Kills the search before each of its batches in turn; repeated, it finds the same, and asks nothing twice."""
    whole = Kept(lm(), {})
    found = search(whole)
    batches = -1 - whole.left
    assert batches > 5
    for at in range(batches):
        store: dict[str, Completion] = {}
        first = Kept(lm(), store, dies_at=at)
        try:
            search(first)
            raise AssertionError("it was not killed")
        except KeyboardInterrupt:
            pass
        second = Kept(lm(), store)
        assert search(second) == found
        assert first.asked + second.asked == whole.asked
