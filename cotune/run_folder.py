"""The run's folder: one run at a time in it, and never two runs' files mixed."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import IO


class RunFolderError(RuntimeError):
    """A run cannot have this folder."""


class RunFolder:
    """A folder `runs_dir/name` that this process holds, until it ends or `release` is called.

    The lock is the operating system's (flock): it goes with the process, however that ends.
    """

    def __init__(self, runs_dir: str, name: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise RunFolderError(
                f'run name "{name}" is not usable as a folder name: letters, digits, ".", "_" and "-", e.g. iris-2.'
            )
        self.path = Path(runs_dir) / name
        self._lock: IO[str] | None = None

    def acquire(self, *, fresh: bool, resume: bool) -> Path | None:
        """Takes the folder.

        Args:
            fresh: start over; an earlier run in the folder is renamed, not deleted.
            resume: go on from the last checkpoint.

        Returns:
            The checkpoint to go on from, if there is one and `resume` is asked for.

        Raises:
            RunFolderError: another process runs in it, or it holds a run and neither was asked for.
        """
        if fresh and self.path.exists():
            self._take_lock()  # not from under a running process
            self.release()
            self._set_aside()
        self._take_lock()
        checkpoint = self.path / "checkpoints" / "last.ckpt"
        if resume:
            return checkpoint if checkpoint.is_file() else None
        if (self.path / "history.jsonl").exists() or checkpoint.exists():
            self.release()
            raise RunFolderError(
                f"{self.path} already holds a run. Continue it with --ckpt_path last, start over with --fresh "
                "(the old run is kept aside), or give this one another --name."
            )
        return None

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> None:
        import fcntl

        self.path.mkdir(parents=True, exist_ok=True)
        lock = (self.path / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read() or "another process"
            lock.close()
            raise RunFolderError(f"{self.path} is in use by {holder}. Wait for it, or give another --name.") from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        self._lock = lock

    def _set_aside(self) -> None:
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        self.path.rename(aside)


def read_summary(folder: Path) -> dict[str, object]:
    """summary.json of a run; {} before it has one."""
    path = folder / "summary.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
