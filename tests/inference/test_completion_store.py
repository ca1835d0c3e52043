"""Claims about the completion store: it gives back what was kept or nothing, whatever happens to its file."""

from __future__ import annotations

import gc
import hashlib
import os
import random
import sqlite3
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cotune.inference.engine import Generated, Prompted
from cotune.inference.stored import CompletionStore, CompletionStoreError, completion_keys
from cotune.programs.layout import FREE, Choices, Field, Fixed, Layout, Number, Pattern, Schema
from cotune.programs.lm import Filled
from crashes import dies


def key(name: object) -> bytes:
    return hashlib.sha256(str(name).encode()).digest()


def made(count: int, length: int = 5) -> dict[bytes, Generated]:
    return {
        key(i): Generated(list(range(i, i + length)), f"text {i} \U0001f338 \x00", ("eos", "length")[i % 2])  # type: ignore[arg-type]
        for i in range(count)
    }


FILLED_IN = Generated(
    [4, 5, 6, 7, 8, 2],
    "so\nanswer: 4",
    "eos",
    (Filled("reasoning", "so", 0, 2, "length"), Filled("answer", " 4", 4, 5, "complete")),
    (False, False, True, True, False, True),
    (-0.1, -2.5000000000000004, 0.0, 0.0, -1e-300, 0.0),
)


@pytest.fixture
def store(tmp_path: Path) -> CompletionStore:
    return CompletionStore(tmp_path / "folder" / "completions.sqlite")


def again(store: CompletionStore) -> CompletionStore:
    """The same file as another process sees it."""
    store.close()
    return CompletionStore(store.path)


def test_what_was_kept_is_found_by_another_process(store: CompletionStore) -> None:
    kept = made(1200) | {key("empty"): Generated([], "", "too_long"), key("filled in"): FILLED_IN}
    store.keep(kept)
    assert again(store).find([*kept, key("absent")]) == kept


def test_nothing_is_made_until_something_is_asked(store: CompletionStore) -> None:
    assert not store.path.parent.exists()
    assert store.find([]) == {}
    assert not store.path.exists()


def in_another_process(work: Callable[[], object]) -> int:
    """Forks; returns the child's id. A new interpreter would take seconds to import torch."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def end_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_processes_share_a_store(store: CompletionStore) -> None:
    def write(n: int) -> None:
        own = CompletionStore(store.path)
        for i in range(40):
            own.keep({key((n, i)): Generated([i], str(i), "eos")})

    children = [in_another_process(partial(write, n)) for n in range(3)]
    assert [end_of(child) for child in children] == [0, 0, 0]
    assert len(store.find([key((n, i)) for n in range(3) for i in range(40)])) == 120


@pytest.mark.parametrize(("point", "there"), [("before commit", 10), ("after commit", 20)])
def test_a_wave_is_whole_or_absent_after_a_kill(point: str, there: int, store: CompletionStore) -> None:
    def write() -> None:
        waves = list(made(30).items())
        for start in range(0, 30, 10):
            store.keep(dict(waves[start : start + 10]))

    assert dies(write, point, 2)
    assert store.find(made(30)) == dict(list(made(30).items())[:there])


def test_a_store_that_nobody_closes_lets_go_of_its_file(tmp_path: Path) -> None:
    store = CompletionStore(tmp_path / "dropped.sqlite")
    store.keep(made(4))
    assert (tmp_path / "dropped.sqlite-wal").exists()
    del store
    gc.collect()  # since Python 3.13 a warning, which is an error here, if only the connection is dropped
    assert not (tmp_path / "dropped.sqlite-wal").exists()


def change(path: Path, sql: str, *values: Any) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(sql, values)
    connection.close()


def test_a_damaged_row_is_a_miss_said_once_and_written_anew(
    store: CompletionStore, capsys: pytest.CaptureFixture[str]
) -> None:
    store.keep(made(4))
    store.close()
    change(store.path, "UPDATE entries SET value = ? WHERE key = ?", b"\x00" * 40, key(1))
    change(store.path, "UPDATE entries SET checksum = ? WHERE key = ?", b"\x01" * 32, key(3))
    assert set(store.find(made(4))) == {key(0), key(2)}
    assert store.find([key(3)]) == {}
    assert store.damaged == 3
    assert capsys.readouterr().out.count("damaged rows are ignored") == 1
    store.keep(made(4))
    assert store.find(made(4)) == made(4)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda path: path.write_bytes(b"not a database, and long enough to be looked at" * 99), id="text"),
        pytest.param(lambda path: os.truncate(path, path.stat().st_size // 2), id="cut"),
        pytest.param(lambda path: change(path, "PRAGMA user_version = 99"), id="another format"),
        pytest.param(lambda path: change(path, "PRAGMA user_version = 1"), id="the format before this one"),
        pytest.param(lambda path: change(path, "ALTER TABLE entries RENAME TO others"), id="another table"),
    ],
)
def test_a_damaged_file_is_set_aside_and_a_new_one_begun(
    spoil: Any, store: CompletionStore, capsys: pytest.CaptureFixture[str]
) -> None:
    store.keep(made(300))
    store.close()
    spoil(store.path)
    assert store.find(made(300)).items() <= made(300).items()
    store.keep(made(300))
    assert again(store).find(made(300)) == made(300)
    assert "it is kept as completions.sqlite.damaged-1, and a new one is started" in capsys.readouterr().out
    assert store.path.with_name("completions.sqlite.damaged-1").is_file()


def test_no_flipped_bit_gives_a_wrong_completion(store: CompletionStore) -> None:
    store.keep(made(60))
    store.close()
    whole = store.path.read_bytes()
    rng = random.Random(0)
    # The header and the schema, where a bit does most, and anywhere.
    places = [*range(0, 120, 3), *(rng.randrange(len(whole)) for _ in range(80))]
    for place in places:
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << rng.randrange(8)
        for path in store.path.parent.iterdir():
            path.unlink()
        store.path.write_bytes(spoilt)
        opened = CompletionStore(store.path)
        assert opened.find(made(60)).items() <= made(60).items(), f"byte {place}"
        opened.keep(made(60))
        assert opened.find(made(60)) == made(60), f"byte {place}"
        opened.close()


def test_a_full_disk_leaves_what_was_there_and_names_the_file(store: CompletionStore) -> None:
    store.keep(made(3))
    assert store._connection is not None
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages}")  # SQLite then says that the disk is full
    with pytest.raises(CompletionStoreError, match=r"completions.sqlite cannot be used: database or disk is full"):
        store.keep(made(3000))
    assert again(store).find(made(3000)) == made(3)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CompletionStoreError, match=r"file/completions\.sqlite cannot be used: "):
        CompletionStore(tmp_path / "file" / "completions.sqlite").keep(made(1))


def test_it_serves_a_thread_that_did_not_open_it(store: CompletionStore) -> None:
    store.keep(made(1))
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(store.find(made(1))))
    thread.start()
    thread.join()
    assert found == [made(1)]


def test_the_sum_of_a_file_is_remembered_until_it_changes(
    store: CompletionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"1" * 5_000_000)
    first = store.file_sum(path)
    assert first == hashlib.sha256(path.read_bytes()).hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr("cotune.inference.stored._digest_of", lambda parts: pytest.fail("read again"))
        assert again(store).file_sum(path) == first
    path.write_bytes(b"2")
    assert store.file_sum(path) == hashlib.sha256(b"2").hexdigest()


def test_a_key_holds_all_that_a_completion_follows_from() -> None:
    ids, whole, seed = [1, 2, 3], (Field("a", stops=("stop",)),), 7
    layouts: list[Layout] = [
        FREE,
        (Field("b", stops=("stop",)),),
        (Field("a", stops=("s", "top")),),
        (Field("a", lead="stop"),),
        (Field("a", stops=("stop",), max_tokens=4),),
        (Fixed("a"), *whole),
        (*whole, Fixed("a")),
        (Field("a", syntax=Choices(("x", "y"))),),
        (Field("a", syntax=Choices(("y", "x"))),),
        (Field("a", syntax=Choices(("y", "x"), (0.0, 1.0))),),
        (Field("a", syntax=Number()),),
        (Field("a", syntax=Number(integer=True)),),
        (Field("a", syntax=Pattern("x")),),
        (Field("a", syntax=Schema("x")),),
    ]
    base = Prompted(ids, whole, seed)
    others = [Prompted([1, 2], whole, seed), Prompted(ids, whole, 8), *(Prompted(ids, made, seed) for made in layouts)]
    common = {"base": "a", "temperature": 0.7}
    keys = completion_keys([base, *others], common, seeded=True)
    assert len(set(keys)) == 1 + len(others)
    assert completion_keys([base], {**common, "base": "b"}, seeded=True) != keys[:1]
    assert completion_keys([base], common, seeded=True) == keys[:1]
    greedy = completion_keys([base, Prompted(ids, whole, 8)], common, seeded=False)
    assert greedy[0] == greedy[1], "a seed has no say where nothing is drawn"
