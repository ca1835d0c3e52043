"""Crash points: named places at which a test has the process killed, to see that the run survives it there.

`COTUNE_CRASH=name:k` kills the process by SIGKILL when it passes the point for the k-th time, counted from 1. Unset, as
it is for users, a point is one comparison.

| point | where |
|---|---|
| store-before-commit | a wave of completions is inserted, its transaction still open |
| store-after-commit | the transaction is on disk |
| blob-after-write | a file's new content stands beside it, flushed (of a folder: all its files do) |
| blob-after-manifest | SHA256SUMS lists the new content |
| blob-after-replace | the new content has taken the old one's place |
| checkpoint-before, checkpoint-after | around saving the trainer's state |
| boundary-before, boundary-after | around recording a boundary: listeners and checkpoint |
| optimizer-step | the weights have moved, and nothing has been saved since |
"""

from __future__ import annotations

import os
import signal
from collections import Counter

POINTS = (
    "store-before-commit",
    "store-after-commit",
    "blob-after-write",
    "blob-after-replace",
    "blob-after-manifest",
    "checkpoint-before",
    "checkpoint-after",
    "boundary-before",
    "boundary-after",
    "optimizer-step",
)


def parse_crash(text: str) -> tuple[str, int] | None:
    """(point, k) from `COTUNE_CRASH`; None for "".

    >>> parse_crash("optimizer-step:3")
    ('optimizer-step', 3)

    Raises:
        ValueError: no such point, or k is no whole number from 1.
    """
    if not text:
        return None
    name, _, count = text.partition(":")
    if name not in POINTS or not count.isdecimal() or int(count) < 1:
        raise ValueError(f'COTUNE_CRASH "{text}": write name:k, k from 1 and name one of {", ".join(POINTS)}.')
    return name, int(count)


_WANTED = parse_crash(os.environ.get("COTUNE_CRASH", ""))
_passed: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """Kills the process if it has been asked to at this passing of this point."""
    if _WANTED is not None and _WANTED[0] == name:
        _passed[name] += 1
        if _passed[name] == _WANTED[1]:
            os.kill(os.getpid(), signal.SIGKILL)
