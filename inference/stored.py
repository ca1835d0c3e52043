"""The completion store: every completion an LM has written, on disk, so that none is generated twice.

It is a cache, exact and shared by candidates, steps, runs and processes; and it is the journal of a run's LM work. Each
wave of completions is one transaction, so a run that was killed finds a wave whole or absent, and its prompt searches
and trace collections go through what they had done in moments, because they are functions of completions.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cotune.inference.engine import Engine, Generated, Prompted, Weights
from cotune.programs.layout import Layout
from cotune.programs.lm import LM, Completion, Filled, Request, Sampling

FORMAT = 2
"""Changes with the meaning of keys or values: a store of another format is set aside."""

_APPLICATION = 0x636F7475  # "cotu": SQLite keeps it in the file's header
_TABLE = "CREATE TABLE entries (key BLOB PRIMARY KEY, value BLOB NOT NULL, checksum BLOB NOT NULL) WITHOUT ROWID"
_PATIENCE = 60.0
"""Seconds to wait for another process's transaction, which takes milliseconds."""

_Row = tuple[bytes, bytes, bytes]
_Action = Callable[[sqlite3.Connection], list[_Row]]


class CompletionStoreError(RuntimeError):
    """The store cannot be read or written. What it held it still holds; the message names the file and the cause."""


class CompletionStore:
    """A file of completions by key. Opened at first use; any number of processes can use it at once.

    A damaged row is a miss, and is written anew. A damaged file is set aside, and a new one begun.

    Args:
        path: of the file (SQLite; two more stand beside it while it is open). Not on a network file system.
        at: called with a name at the points around a commit where tests kill the process.

    Attributes:
        damaged: rows that failed their checksum.
        seconds: wall time spent reading and writing.
    """

    def __init__(self, path: str | Path, *, at: Callable[[str], None] = lambda name: None) -> None:
        self.path = Path(path).expanduser()
        self._at = at
        self.damaged, self.seconds = 0, 0.0
        self._connection: sqlite3.Connection | None = None

    def find(self, keys: Iterable[bytes]) -> dict[bytes, Generated]:
        """The completions that are there, by key."""
        return {key: _unpack(value) for key, value in self._read(list(dict.fromkeys(keys))).items()}

    def keep(self, found: Mapping[bytes, Generated]) -> None:
        """Writes completions in one transaction, which is on disk when this returns."""
        if found:
            self._write({key: _pack(generated) for key, generated in found.items()})

    def file_sum(self, path: Path) -> str:
        """SHA-256 of a file, remembered for as long as its size and time of change stay."""
        state = path.stat()
        key = hashlib.sha256(f"file|{path.resolve()}|{state.st_size}|{state.st_mtime_ns}".encode()).digest()
        known = self._read([key]).get(key)
        if known is None:
            with path.open("rb") as file:
                known = _digest_of(iter(lambda: file.read(1 << 20), b""))
            self._write({key: known})
        return known.hex()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _read(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Values by key. A row that fails its checksum is left out, counted, and said once."""
        if not keys:
            return {}
        with self._timed():
            rows = self._tried(lambda connection: _select(connection, keys))
        good = {key: value for key, value, checksum in rows if _checksum(key, value) == checksum}
        if len(good) < len(rows):
            if not self.damaged:
                print(f"{self.path}: damaged rows are taken as absent, and written anew.")
            self.damaged += len(rows) - len(good)
        return good

    def _write(self, values: Mapping[bytes, bytes]) -> None:
        rows = [(key, value, _checksum(key, value)) for key, value in values.items()]
        with self._timed():
            self._tried(lambda connection: _insert(connection, rows, lambda: self._at("store-before-commit")))
        self._at("store-after-commit")

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
                f"the completion store {self.path} cannot be used: {error}. What it held it still holds. Make room or "
                "mend that and start the same command again, or keep completions elsewhere (model.lm.completions: "
                "another path, or off)."
            ) from error

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                self.path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False
            )
            _prepare(self._connection)
        return self._connection

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
        print(f"{self.path} cannot be read ({why}); it is kept as {aside.name}, and a new one is begun.")

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started


class StoredEngine(Engine):
    """An engine whose completions are kept, so that none is generated twice; equal prompts of a call are one.

    They are generated wave by wave, each kept before the next begins. The waves follow from the prompts alone, so a run
    that was killed finds each whole or absent, and makes the same batches again.

    Args:
        engine: what completes the prompts that are not there.
        identity: adapter -> plain values by which the LM is known; asked only where completions are stored.

    Attributes:
        store: where completions are kept; None keeps none from one call to the next.
        before_wave: called before each wave; what it raises stops there.
        generated: completions that the engine made so far.
    """

    def __init__(self, engine: Engine, *, identity: Callable[[str], Mapping[str, Any]]) -> None:
        self.engine, self._identity_of = engine, identity
        self.store: CompletionStore | None = None
        self.before_wave: Callable[[], None] = lambda: None
        self.generated = 0

    def start(self, weights: Weights) -> None:
        self.engine.start(weights)

    def waves(self, prompts: Sequence[Prompted]) -> list[list[int]]:
        return self.engine.waves(prompts)

    def identity(self) -> Mapping[str, Any]:
        return self.engine.identity()

    def generate(self, prompts: Sequence[Prompted], sampling: Sampling, *, adapter: str) -> list[Generated]:
        lm = {**self._identity_of(adapter), **self.identity()} if self.store else {"adapter": adapter}
        keys = completion_keys(prompts, {**lm, **_asked(sampling)}, seeded=sampling.temperature > 0)
        known = self.store.find(keys) if self.store else {}
        if set(keys) - set(known):
            for wave in self.waves(prompts):
                missing = {keys[i]: prompts[i] for i in wave if keys[i] not in known}
                if missing:
                    known |= self._generated(missing, sampling, adapter)
        return [known[key] for key in keys]

    def _generated(self, missing: Mapping[bytes, Prompted], sampling: Sampling, adapter: str) -> dict[bytes, Generated]:
        self.before_wave()
        results = self.engine.generate(list(missing.values()), sampling, adapter=adapter)
        made = dict(zip(missing, results, strict=True))
        self.generated += len(made)
        if self.store:
            self.store.keep(made)
        return made


class StoredLM:
    """An LM without ids whose completions are kept, by the messages that asked for them.

    Args:
        lm: what answers requests that are not there.
        store: where completions are kept.
        identity: plain values by which the LM is known.
    """

    def __init__(self, lm: LM, store: CompletionStore, *, identity: Mapping[str, Any]) -> None:
        self.lm, self.store, self._identity = lm, store, dict(identity)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        keys = [self._key(request, sampling) for request in requests]
        known = self.store.find(keys)
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in known}
        if missing:
            completions = self.lm.generate(list(missing.values()), sampling)
            made = {key: _generated_of(done) for key, done in zip(missing, completions, strict=True)}
            self.store.keep(made)
            known |= made
        return [completion_of((), known[key]) for key in keys]

    def _key(self, request: Request, sampling: Sampling) -> bytes:
        drawn = request.seed if sampling.temperature > 0 else None
        asked = [[dict(message) for message in request.messages], _plain(request.layout), request.adapter, drawn]
        whole = json.dumps([FORMAT, "messages", self._identity, _asked(sampling), asked], sort_keys=True)
        return hashlib.sha256(whole.encode()).digest()


def completion_of(prompt_ids: Sequence[int], generated: Generated) -> Completion:
    """What an engine wrote as what an LM answers."""
    return Completion(
        generated.text,
        tuple(prompt_ids),
        tuple(generated.ids),
        generated.finished,
        generated.fields,
        generated.forced,
        generated.log_probs,
    )


def _generated_of(done: Completion) -> Generated:
    return Generated(list(done.completion_ids), done.text, done.finished, done.fields, done.forced, done.log_probs)


def _asked(sampling: Sampling) -> dict[str, Any]:
    """What of the sampling decides a completion: where nothing is drawn, top-p does not."""
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p} if sampling.temperature > 0 else {}
    return {**drawn, "max_new_tokens": sampling.max_new_tokens, "log_probs": sampling.log_probs}


def completion_keys(prompts: Sequence[Prompted], common: Mapping[str, Any], *, seeded: bool) -> list[bytes]:
    """A key a prompt: the SHA-256 of all that its completion follows from.

    Args:
        common: what is the same for all prompts, as plain values: the LM and the sampling.
        seeded: the prompts' seeds count, as they do where completions are drawn.
    """
    shared = hashlib.sha256(json.dumps([FORMAT, common], sort_keys=True).encode())
    keys = []
    for prompt in prompts:
        own = shared.copy()
        own.update(json.dumps([list(prompt.ids), _plain(prompt.layout), prompt.seed if seeded else None]).encode())
        keys.append(own.digest())
    return keys


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


def _insert(connection: sqlite3.Connection, rows: Sequence[_Row], before: Callable[[], None]) -> list[_Row]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", rows)
        before()
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return []


def _is_damage(error: sqlite3.DatabaseError, path: Path) -> bool:
    """Whether the file's content is at fault, and not the disk, the rights or another process."""
    if not isinstance(error, sqlite3.OperationalError):
        return True
    said = str(error)
    damages = ("no such table", "no such column", "table entries has", "unsupported file format", "Could not decode")
    if said.startswith(damages):
        return True
    # A flipped bit in the header can make a file read-only for SQLite that is not so for the system.
    return "readonly database" in said and os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)


def _plain(layout: Layout) -> list[Any]:
    """A layout as values that JSON holds, no two layouts alike."""
    return [[type(part).__name__, *map(_plain_value, vars(part).values())] for part in layout]


def _plain_value(value: Any) -> Any:
    return [type(value).__name__, *vars(value).values()] if hasattr(value, "__dataclass_fields__") else value


def _pack(generated: Generated) -> bytes:
    """The ids as numbers, the rest as JSON; the text of a field that is the whole text is not written twice."""
    fields = [
        [field.name, None if field.text == generated.text else field.text, field.start, field.end, field.ended]
        for field in generated.fields
    ]
    forced = "".join("01"[mark] for mark in generated.forced)
    text = json.dumps([generated.finished, generated.text, fields, forced, generated.log_probs]).encode()
    return struct.pack(f"<I{len(generated.ids)}I", len(generated.ids), *generated.ids) + text


def _unpack(value: bytes) -> Generated:
    (count,) = struct.unpack_from("<I", value)
    finished, text, fields, forced, log_probs = json.loads(value[4 + 4 * count :])
    return Generated(
        list(struct.unpack_from(f"<{count}I", value, 4)),
        text,
        finished,
        tuple(Filled(name, text if own is None else own, *rest) for name, own, *rest in fields),
        tuple(mark == "1" for mark in forced),
        tuple(log_probs),
    )


def _checksum(key: bytes, value: bytes) -> bytes:
    return hashlib.sha256(key + value).digest()


def _digest_of(parts: Iterable[bytes]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()
