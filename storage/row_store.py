"""Rows on disk: values by key in one SQLite file, each with a checksum, written in transactions that survive a kill."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cotune.errors import CotuneError

FORMAT = 2
"""Changes with the table: a file of another format is set aside. What keys and values mean is the business of those who
make them; they put a number of their own into the keys, so that several kinds can share a file."""

_APPLICATION = 0x636F7475  # "cotu": SQLite keeps it in the file's header
_TABLE = "CREATE TABLE entries (key BLOB PRIMARY KEY, value BLOB NOT NULL, checksum BLOB NOT NULL) WITHOUT ROWID"
_PATIENCE = 60.0
"""Seconds to wait for another process's transaction, which takes milliseconds."""

_Row = tuple[bytes, bytes, bytes]
_Action = Callable[[sqlite3.Connection], list[_Row]]


class CompletionStoreError(CotuneError):
    """The store cannot be read or written. What it held it still holds; the message names the file and the cause."""


class RowStore:
    """A file of values by key. Opened at first use; any number of processes can use it at once.

    A damaged row is a miss, and is written anew. A damaged file is set aside, and a new one begun.

    Args:
        path: of the file (SQLite; two more stand beside it while it is open). Not on a network file system.

    Attributes:
        damaged: rows that failed their checksum.
        seconds: wall time spent reading and writing.
    """

    option = "completions"
    """The option that names the file, for messages."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.damaged, self.seconds = 0, 0.0
        self._connection: sqlite3.Connection | None = None
        self._closing: weakref.finalize[..., RowStore] | None = None

    def read(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Values by key. A row that fails its checksum is left out, counted, and reported once."""
        if not keys:
            return {}
        with self._timed():
            rows = self._tried(lambda connection: _select(connection, keys))
        good = {key: value for key, value, checksum in rows if _checksum(key, value) == checksum}
        if len(good) < len(rows):
            if not self.damaged:
                print(f"{self.path}: damaged rows are ignored, and written again.")
            self.damaged += len(rows) - len(good)
        return good

    def write(self, values: Mapping[bytes, bytes]) -> None:
        """Writes values in one transaction, which is on disk when this returns."""
        rows = [(key, value, _checksum(key, value)) for key, value in values.items()]
        with self._timed():
            self._tried(self._insert(rows))

    def take(self, other: Path) -> None:
        """Writes what another file of this kind holds; rows that are damaged there are left out."""
        theirs = type(self)(other)
        try:
            keys = [key for key, *_ in theirs._tried(lambda c: c.execute("SELECT key, '', '' FROM entries").fetchall())]
            for start in range(0, len(keys), 500):
                self.write(theirs.read(keys[start : start + 500]))
        finally:
            theirs.close()

    def close(self) -> None:
        if self._closing is not None:
            self._closing()
            self._connection = self._closing = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None, "_closing": None}  # a copy opens the file itself

    def _tried(self, action: _Action) -> list[_Row]:
        """Does something with the file, and once more with a new file if the old one proves damaged."""
        try:
            try:
                return action(self._opened())
            except sqlite3.DatabaseError as error:
                if not _is_damage(error, self.path):
                    raise
                self._set_aside(error)
                return action(self._opened())
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise CompletionStoreError(
                f"the completion store {self.path} cannot be used: {error}. Its content is unchanged. Make room or "
                f"fix that and start the same command again, or set {self.option} to another path or to off."
            ) from error

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                self.path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False
            )
            # Also when nobody closes the store: Python 3.13 warns of a connection that is only dropped.
            self._closing = weakref.finalize(self, self._connection.close)
            self._closing.atexit = False  # a fork that ends is not to close its parent's
            _prepare(self._connection)
        return self._connection

    def _insert(self, rows: Sequence[_Row]) -> _Action:
        def insert(connection: sqlite3.Connection) -> list[_Row]:
            connection.execute("BEGIN IMMEDIATE")
            try:
                connection.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", rows)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            return []

        return insert

    def _set_aside(self, why: Exception) -> None:
        """Renames the damaged file, so that somebody can look at it."""
        self.close()
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.damaged-{number}")).exists():
            number += 1
        if self.path.exists():
            self.path.rename(aside)
        for beside in ("-wal", "-shm"):
            self.path.with_name(self.path.name + beside).unlink(missing_ok=True)
        print(f"{self.path} cannot be read ({why}); it is kept as {aside.name}, and a new one is started.")

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started


def _prepare(connection: sqlite3.Connection) -> None:
    """Makes the table in a new file; raises DatabaseError for a file that is not what this module wrote."""
    connection.execute("PRAGMA synchronous = FULL")
    if not _settled(connection):
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("BEGIN IMMEDIATE")  # of two processes that make it, one waits
        if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            connection.execute(_TABLE)
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            connection.execute(f"PRAGMA user_version = {FORMAT}")
        connection.execute("COMMIT")
        if not _settled(connection):
            raise sqlite3.DatabaseError(_other_format(connection))


def _settled(connection: sqlite3.Connection) -> bool:
    made = connection.execute("SELECT sql FROM sqlite_master").fetchall()
    return _header(connection) == [_APPLICATION, FORMAT] and made == [(_TABLE,)]


def _header(connection: sqlite3.Connection) -> list[int]:
    return [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]


def _other_format(connection: sqlite3.Connection) -> str:
    application, version = _header(connection)
    if application == _APPLICATION and version != FORMAT:
        return f"its completions are of format {version}, and this version of cotune reads {FORMAT}"
    return f"it is no completion store of format {FORMAT}"


def _select(connection: sqlite3.Connection, keys: Sequence[bytes]) -> list[_Row]:
    rows: list[_Row] = []
    for start in range(0, len(keys), 500):  # SQLite bounds the number of placeholders
        part = keys[start : start + 500]
        marks = ",".join("?" * len(part))
        rows += connection.execute(f"SELECT key, value, checksum FROM entries WHERE key IN ({marks})", part).fetchall()
    return rows


def _is_damage(error: sqlite3.DatabaseError, path: Path) -> bool:
    """Whether the file's content is at fault, and not the disk, the rights or another process."""
    if not isinstance(error, sqlite3.OperationalError):
        return True
    message = str(error)
    damages = ("no such table", "no such column", "table entries has", "unsupported file format", "Could not decode")
    if message.startswith(damages):
        return True
    # A flipped bit in the header can make a file read-only for SQLite that is not so for the system.
    return "readonly database" in message and os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)


def _checksum(key: bytes, value: bytes) -> bytes:
    return hashlib.sha256(key + value).digest()
