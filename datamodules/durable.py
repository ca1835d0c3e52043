"""Durable files: whole or absent whatever happens, and known by their SHA-256, so that no damaged one is ever read.

A file is written beside its place, flushed to disk, and moved over the old one; last comes its line in the folder's
`SHA256SUMS`, which `sha256sum -c SHA256SUMS` checks by hand. A file that has no line there is one whose writing was cut
short.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cotune.datamodules.crash_point import crash_point

SUMS = "SHA256SUMS"


class DamagedFileError(RuntimeError):
    """A file is not what was written. The message names it and says what to do."""


class NotWrittenError(RuntimeError):
    """A file could not be written, and what was there before still is. The message names path and cause."""


class Clock:
    """Seconds spent on durable writing in this process, and how many files that were."""

    def __init__(self) -> None:
        self.seconds, self.files = 0.0, 0

    @contextmanager
    def running(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started
            self.files += 1


clock = Clock()


def write_durably(path: Path, content: str | bytes, *, listed: bool = True) -> None:
    """Writes a file so that a kill leaves the old one or the new one, never a part.

    Args:
        listed: also put it into SHA256SUMS of its folder.

    Raises:
        NotWrittenError: the disk is full, read-only or broken.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with clock.running():
        digest = replace_file(path, lambda file: file.write(data))
        if listed:
            record_sums(path.parent, {path.name: digest})


def replace_file(path: Path, write: Callable[[Any], Any]) -> str:
    """Has `write` fill a file that then takes the place of `path`; returns the SHA-256 of what was written.

    Raises:
        NotWrittenError: the disk is full, read-only or broken.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            hashing = _Hashing(file)
            write(hashing)
            file.flush()
            os.fsync(file.fileno())
        crash_point("blob-after-write")
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        raise _not_written(path, error) from error
    crash_point("blob-after-replace")
    return hashing.digest.hexdigest()


def record_sums(folder: Path, sums: Mapping[str, str], *, drop: tuple[str, ...] = ()) -> None:
    """Adds or changes lines of a folder's SHA256SUMS."""
    known = {name: digest for name, digest in read_sums(folder).items() if name not in drop} | dict(sums)
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(known.items()))
    replace_file(folder / SUMS, lambda file: file.write(text.encode()))
    crash_point("blob-after-manifest")


def read_sums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256, from a folder's SHA256SUMS; a line that is damaged is as good as absent."""
    path = folder / SUMS
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return {line[66:]: line[:64] for line in lines if line[64:66] == "  " and _is_digest(line[:64])}


def file_sum(path: Path) -> str:
    """SHA-256 of a file, read in parts."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def read_durably(path: Path) -> str:
    """Text of a file that `write_durably` wrote.

    Raises:
        DamagedFileError: it is not what was written.
        FileNotFoundError: there is none.
    """
    data = path.read_bytes()
    why = _difference(path, hashlib.sha256(data).hexdigest())
    if why:
        raise DamagedFileError(f"{path} {why}.")
    return data.decode("utf-8")


def damage(path: Path) -> str:
    """What is wrong with a file that should be listed in its folder's SHA256SUMS; "" if nothing is."""
    return _difference(path, file_sum(path)) if path.is_file() else "is not there"


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which then takes the place of `folder` with all its files flushed and listed.

    A kill leaves the old one, none, or the new one, never a part.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        with clock.running():
            _seal(partial)
            crash_point("blob-after-write")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
            sync_folder(folder.parent)
    except OSError as error:
        raise _not_written(folder, error) from error
    crash_point("blob-after-replace")


def damaged_file(folder: Path) -> str:
    """The first file of a folder made by `new_folder` that is not as it was written, and why; "" if all are.

    A folder without SHA256SUMS was made by someone else, and there is nothing to compare with.
    """
    for name in read_sums(folder):
        if why := damage_below(folder, name):
            return f"{folder / name} {why}"
    return "" if read_sums(folder) or not (folder / SUMS).exists() else f"{folder / SUMS} is damaged"


def damage_below(folder: Path, name: str) -> str:
    """What is wrong with a file that is listed in a folder above it; "" if nothing is."""
    path = folder / name
    if not path.is_file():
        return "is not there"
    return "" if file_sum(path) == read_sums(folder).get(name) else "is not what was written (its SHA-256 differs)"


def sync_folder(folder: Path) -> None:
    """Flushes a folder's list of names."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Hashing:
    """A file that hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        written = self.file.write(data)
        return int(written)

    def flush(self) -> None:
        self.file.flush()


def _seal(folder: Path) -> None:
    """Flushes every file below a folder, and lists them."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for below in {path.parent for path in paths}:
        sync_folder(below)
    sums = {path.relative_to(folder).as_posix(): file_sum(path) for path in paths}
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    replace_file(folder / SUMS, lambda file: file.write(text.encode()))
    crash_point("blob-after-manifest")


def _difference(path: Path, digest: str) -> str:
    listed = read_sums(path.parent).get(path.name)
    if listed is None:
        return f"is not listed in {path.parent / SUMS}: the process ended while it was being written"
    return "" if digest == listed else "is not what was written (its SHA-256 differs)"


def _is_digest(text: str) -> bool:
    return len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)


def _not_written(path: Path, error: OSError) -> NotWrittenError:
    cause = os.strerror(error.errno) if error.errno else str(error)
    fix = " Make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else " Mend that"
    return NotWrittenError(
        f"{path} could not be written: {cause}. What was there before still is.{fix}, and start the same command again."
    )
