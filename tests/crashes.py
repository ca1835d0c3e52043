"""Crashes: kills this process where writing becomes durable, to see that what it wrote is whole or absent.

| point | where |
|---|---|
| before fsync | new content stands in a file that nothing names yet |
| before replace, after replace | around a file's or a folder's move over the old one |
| before commit, after commit | around a transaction of SQLite |
| after step | the optimiser has moved the weights, and nothing has been saved since |

The product knows nothing of it: what is wrapped is the system's, SQLite's and torch's.
"""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable
from typing import Any

POINTS = ("before fsync", "before replace", "after replace", "before commit", "after commit", "after step")


def arm(point: str, k: int = 1) -> None:
    """Has SIGKILL end this process when it passes the point for the k-th time, counted from 1."""
    when, name = point.split()
    left = k

    def passed() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(call: Callable[..., Any], *args: Any, **named: Any) -> Any:
        if when == "before":
            passed()
        result = call(*args, **named)
        if when == "after":
            passed()
        return result

    _WRAP[name](around)


def dies(work: Callable[[], object], point: str, k: int = 1) -> bool:
    """Whether the work, in a process of its own, comes to the k-th passing of the point, and dies there."""
    child = os.fork()
    if child == 0:
        try:
            arm(point, k)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended in (0, -signal.SIGKILL), f"the work failed before it came to {point}"
    return ended != 0


def _wrap_call(name: str) -> Callable[[Callable[..., Any]], None]:
    def wrap(around: Callable[..., Any]) -> None:
        call = getattr(os, name)
        setattr(os, name, lambda *args, **named: around(call, *args, **named))

    return wrap


def _wrap_commit(around: Callable[..., Any]) -> None:
    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
            call = super().execute
            writes = sql == "COMMIT" and self.total_changes  # not the one that makes an empty table
            return around(call, sql, *args) if writes else call(sql, *args)  # type: ignore[no-any-return]

    connect = sqlite3.connect
    sqlite3.connect = lambda *args, **named: connect(*args, **named, factory=Connection)  # type: ignore[assignment]


def _wrap_step(around: Callable[..., Any]) -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(lambda *_: around(lambda: None))


_WRAP = {
    "fsync": _wrap_call("fsync"),
    "replace": _wrap_call("replace"),
    "commit": _wrap_commit,
    "step": _wrap_step,
}
