"""CPU seconds and the peak of memory of this process. Standard library only: every peer's environment imports it."""

from __future__ import annotations

import ctypes
import gc
import time
from pathlib import Path


class Clock:
    """CPU seconds of each step: what a process waits for, or its neighbours take, is not counted."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def begin(self) -> None:
        self._began = time.process_time()

    def end(self) -> None:
        self.seconds.append(time.process_time() - self._began)


def forget_peak() -> None:
    """Gives freed memory back, which glibc keeps here, and begins the peak anew (Linux)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak() -> int:
    """Most bytes resident since then."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
