"""Durable files: whole or absent whatever happens, and known by their SHA-256, so that no damaged one is ever read.

A file is written beside its place and flushed to disk, then listed in the folder's `SHA256SUMS`, and then moved over
the old one. Wherever that is cut short, what the list names is there, in its place or still beside it. By hand,
`sha256sum -c SHA256SUMS` checks a folder.
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

from cotune.errors import CotuneError

SUMS = "SHA256SUMS"


class DamagedFileError(CotuneError):
    """A file is not what was written. The message names it and says what to do."""


class NotWrittenError(CotuneError):
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


def write_durably(path: Path, content: str | bytes) -> None:
    """Writes a file so that a kill leaves the old one or the new one, never a part.

    Raises:
        NotWrittenError: the disk is full, read-only or broken.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with clock.running(), as_not_written(path):
        beside, digest = write_beside(path, lambda file: file.write(data))
        record_sums(path.parent, {path.name: digest})
        put_in_place(beside, path)


def write_whole(path: Path, text: str) -> None:
    """Writes a file that nothing is ever continued from, so that a kill leaves the old one or the new one.

    Raises:
        NotWrittenError: as `write_durably`.
    """
    with clock.running(), as_not_written(path):
        put_in_place(write_beside(path, lambda file: file.write(text.encode()))[0], path)


def write_beside(path: Path, write: Callable[[Any], Any]) -> tuple[Path, str]:
    """Has `write` fill a file beside `path`, and flushes it; returns where it is, and its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    with beside.open("wb") as file:
        hashing = _Hashing(file)
        hashing.fill(write)
        file.flush()
        os.fsync(file.fileno())
    return beside, hashing.digest.hexdigest()


def put_in_place(beside: Path, path: Path) -> None:
    """Moves a file that was written beside its place over the old one."""
    os.replace(beside, path)
    _sync_folder(path.parent)


def record_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Adds or changes lines of a folder's SHA256SUMS."""
    known = read_sums(folder) | dict(sums)
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(known.items()))
    beside = _beside(folder / SUMS)
    with beside.open("wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, folder / SUMS)
    _sync_folder(folder)


def read_sums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256, from a folder's SHA256SUMS; damaged lines are ignored."""
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


def lines_of(text: str) -> list[str]:
    """The lines of JSON Lines that are not empty. `splitlines` splits at U+2028 too, which JSON leaves inside texts."""
    return [line for line in text.split("\n") if line.strip()]


def read_durably(path: Path) -> str:
    """Text of a file that `write_durably` wrote.

    Raises:
        DamagedFileError: it is not what was written.
        FileNotFoundError: there is none.
    """
    whole, why = find_whole(path)
    if whole is None:
        raise DamagedFileError(f"{path} {why}.")
    return whole.read_text(encoding="utf-8")


def find_whole(path: Path) -> tuple[Path | None, str]:
    """Where a file is that its folder's SHA256SUMS lists: in its place, or beside it if it was being moved there.

    Returns:
        The path and "", or None and what is wrong.

    Raises:
        FileNotFoundError: it was never written.
    """
    listed = read_sums(path.parent).get(path.name)
    places = [place for place in (path, _beside(path)) if place.is_file()]
    for place in places:
        if file_sum(place) == listed:
            return place, ""
    if path not in places and listed is None:  # beside it there may be one whose writing was cut short
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if path not in places:
        return None, "is not there"
    return (
        None,
        f"is not listed in {path.parent / SUMS}" if listed is None else "is not what was written (its SHA-256 differs)",
    )


@contextmanager
def new_folder(folder: Path, *, listed: bool = True) -> Iterator[Path]:
    """A folder to fill, which then takes the place of `folder` with all its files flushed.

    A kill leaves the old one, none, or the new one, never a part; an error leaves the old one.

    Args:
        listed: write the SHA-256 of its files into its own SHA256SUMS.
    """
    partial = _beside(folder)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with as_not_written(folder):
            partial.mkdir(parents=True)
        yield partial
        with as_not_written(folder):
            _put_folder(partial, folder, listed=listed)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put_folder(partial: Path, folder: Path, *, listed: bool) -> None:
    """Flushes all files of a folder that was filled beside its place, and moves it over the old one."""
    aside = folder.with_name(f".{folder.name}.replaced")  # no name that anyone gives a folder of his own
    with clock.running():
        _flush(partial)
        if listed:
            record_sums(partial, folder_sums(partial))
        _discard(aside)
        if os.path.lexists(folder):  # moved, not deleted: a kill while it is being deleted would leave a part of it
            os.replace(folder, aside)
        put_in_place(partial, folder)
        _discard(aside)


def _discard(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def folder_sums(folder: Path) -> dict[str, str]:
    """Path of each file below a folder -> SHA-256; without its own SHA256SUMS."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / SUMS)
    return {path.relative_to(folder).as_posix(): file_sum(path) for path in paths}


def damaged_file(folder: Path) -> str:
    """The first file of a folder made by `new_folder` that is not as it was written, and why; "" if all are.

    A folder without SHA256SUMS was made by someone else, and there is nothing to compare with.
    """
    for name in read_sums(folder):
        path = folder / name
        if not path.is_file():
            return f"{path} is not there"
        if file_sum(path) != read_sums(folder)[name]:
            return f"{path} is not what was written (its SHA-256 differs)"
    return "" if read_sums(folder) or not (folder / SUMS).exists() else f"{folder / SUMS} is damaged"


def _sync_folder(folder: Path) -> None:
    """Flushes a folder's list of names."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def as_not_written(path: Path) -> Iterator[None]:
    """What the system says of writing a file, as a message that names the file and the way out."""
    try:
        yield
    except OSError as error:
        cause = os.strerror(error.errno) if error.errno else str(error)
        fix = "Make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Fix that"
        raise NotWrittenError(
            f"{path} could not be written: {cause}. What it held before is unchanged. {fix}, and start the same "
            "command again."
        ) from error


class _Hashing:
    """A file that hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self._failed: OSError | None = None

    def fill(self, write: Callable[[Any], Any]) -> None:
        """Has `write` fill the file.

        Raises:
            OSError: what the system said, also where `write` made something else of it, as torch's zip writer does.
        """
        try:
            write(self)
        except Exception as error:
            if self._failed is None or self._failed is error:
                raise
            raise self._failed from error

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            return int(self.file.write(data))
        except OSError as error:
            self._failed = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _flush(folder: Path) -> None:
    """Flushes every file below a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for below in {path.parent for path in paths}:
        _sync_folder(below)


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _is_digest(text: str) -> bool:
    return len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)
