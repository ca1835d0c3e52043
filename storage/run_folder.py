"""The run's folder: one run at a time in it, and never two runs' files mixed."""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress
from pathlib import Path
from typing import IO

from cotune.errors import CotuneError

FORMAT = 2
"""Of a run's folder, in its run.json. 1 said no number, and its history not how many epochs a weight step had."""


class RunFolderError(CotuneError):
    """A run cannot have this folder."""


class RunFolder:
    """A folder `runs_dir/name` that this process holds, until it ends or `release` is called.

    The lock is the operating system's (flock): it goes with the process, however that ends. What stands in the file is
    who holds it: process, host, and the id of the host's boot.
    """

    def __init__(self, runs_dir: str, name: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise RunFolderError(
                f'run name "{name}" is not usable as a folder name: letters, digits, ".", "_" and "-", e.g. iris-2.'
            )
        self.path = Path(runs_dir) / name
        self._lock: IO[str] | None = None

    def acquire(self, *, fresh: bool = False) -> None:
        """Takes the folder; `fresh` renames what is there, and begins an empty one.

        Raises:
            RunFolderError: another process runs in it, or its file system has no locks.
        """
        self._take_lock()  # a running process must not lose the folder from under it
        if fresh and any(path.name != ".lock" for path in self.path.iterdir()):
            aside = self._lock  # held until the new folder is: nobody else may find the old one free and run in it
            self._set_aside()
            self._lock = None
            try:
                self._take_lock()
            finally:
                _let_go(aside)

    def release(self) -> None:
        _let_go(self._lock)
        self._lock = None

    def _take_lock(self) -> None:
        while self._lock is None:
            self._try_lock()

    def _try_lock(self) -> None:
        """Takes the lock, unless the folder was renamed while its lock was asked for: then there is another one."""
        import fcntl

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise RunFolderError(f"{self.path} cannot be made: {error.strerror}. Give another --runs_dir.") from error
        lock.seek(0)
        holder = lock.read()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise RunFolderError(
                f"{self.path} is in use by {holder or 'another process'}. Wait for it, or give another --name."
            ) from error
        except OSError as error:
            lock.close()
            raise RunFolderError(
                f"{self.path} is on a file system without locks ({error.strerror}), where two runs could mix their "
                "files. Give a --runs_dir on another file system."
            ) from error
        if not _is_at(lock, self.path / ".lock"):
            lock.close()
            return
        if holder and f" on {socket.gethostname()}" not in holder:
            print(
                f"{self.path} was last used by {holder}, which no longer locks it. If that process is still running, "
                "stop one of the two: some network file systems do not share locks between machines."
            )
        self._lock = lock
        try:
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}{_boot()}")
            lock.flush()
        except OSError as error:
            raise RunFolderError(
                f"{self.path / '.lock'} could not be written: {error.strerror}. Make room there or give another "
                "--runs_dir, and start the same command again."
            ) from error

    def _set_aside(self) -> None:
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        self.path.rename(aside)
        print(f"the earlier run is archived as {aside}")


def _let_go(lock: IO[str] | None) -> None:
    if lock is not None:
        with suppress(OSError):  # a full disk is no reason to end badly
            lock.truncate(0)  # clean exit: clear the holder
            lock.close()


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is still the one that has this path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _boot() -> str:
    """Which boot of the host this is, where the system says so."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return f" (boot {path.read_text().strip()[:8]})" if path.is_file() else ""
