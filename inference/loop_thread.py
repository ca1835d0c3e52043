"""A thread with an event loop, in which a client of servers has its requests under way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any


class LoopThread:
    """An event loop in a thread of its own; the thread ends with the process.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def end(self, last: Coroutine[Any, Any, Any]) -> None:
        """Does a last thing in the loop, and ends both; waits for it for some seconds."""
        if self.loop.is_running():
            done = asyncio.run_coroutine_threadsafe(last, self.loop)
            done.add_done_callback(lambda _: self.loop.call_soon_threadsafe(self.loop.stop))
            self._thread.join(timeout=5)
        else:
            last.close()
        if not self.loop.is_running() and not self.loop.is_closed():
            self.loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
