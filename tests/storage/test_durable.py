"""Claims about durable files: after any crash the old one or the new one is there, and a damaged one is never read."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from cotune.storage.durable import (
    SUMS,
    DamagedFileError,
    NotWrittenError,
    as_not_written,
    damaged_file,
    lines_of,
    new_folder,
    read_durably,
    read_sums,
    write_beside,
    write_durably,
)
from crashes import dies


def test_what_was_written_is_read_and_listed_as_sha256sum_wants_it(tmp_path: Path) -> None:
    path = tmp_path / "run" / "näme.json"
    write_durably(path, "first")
    write_durably(path, "second \U0001f338")
    write_durably(path.with_name("other"), b"x")
    assert read_durably(path) == "second \U0001f338"
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([SUMS, "näme.json", "other"])
    subprocess.run(["sha256sum", "-c", SUMS], cwd=path.parent, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("point", "k", "reads"),
    [
        ("before fsync", 1, "old"),
        ("before replace", 1, "old"),  # of the list of sums; the second is the file's
        ("after replace", 1, "new"),
        ("before replace", 2, "new"),
        ("after replace", 2, "new"),
    ],
)
def test_a_crash_leaves_the_old_or_the_new(point: str, k: int, reads: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_durably(path, "old")
    assert dies(lambda: write_durably(path, "new"), point, k)
    assert read_durably(path) == reads
    write_durably(path, "newer")
    assert read_durably(path) == "newer"


def test_no_flipped_bit_and_no_cut_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_durably(path, "some content")
    for name in ("file", SUMS):
        whole = (tmp_path / name).read_bytes()
        for place in range(len(whole) - 1):  # the end of the list's last line says nothing
            for spoilt in (whole[:place], whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :]):
                (tmp_path / name).write_bytes(spoilt)
                with pytest.raises(DamagedFileError):
                    read_durably(path)
        (tmp_path / name).write_bytes(whole)
    assert read_durably(path) == "some content"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_the_old_file_and_is_named(
    number: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_durably(path, "old")

    def fails(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        with pytest.raises(
            NotWrittenError, match=rf"{path} could not be written: {os.strerror(number)}\. What it held"
        ):
            write_durably(path, "new")
    assert read_durably(path) == "old"


def test_a_first_file_whose_writing_was_cut_short_was_never_written(tmp_path: Path) -> None:
    (tmp_path / "run.json.partial").write_text("half")
    with pytest.raises(FileNotFoundError):
        read_durably(tmp_path / "run.json")


def test_the_systems_word_is_not_lost_in_torchs_zip_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full(io.FileIO):
        write = full

    monkeypatch.setattr(Path, "open", lambda self, mode: Full(str(self), mode))
    with pytest.raises(NotWrittenError, match="No space left"), as_not_written(tmp_path / "last.ckpt"):
        write_beside(tmp_path / "last.ckpt", lambda file: torch.save({"weights": torch.zeros(1000)}, file))


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "traces"

    def write(text: str) -> None:
        with new_folder(folder) as partial:
            (partial / "below").mkdir()
            (partial / "below" / "a").write_text(text)
            (partial / "b").write_text(text)

    write("old")
    assert damaged_file(folder) == ""
    assert set(read_sums(folder)) == {"below/a", "b"}
    assert dies(lambda: write("new"), "before replace", 2)  # the first is that of the list of sums
    assert damaged_file(folder) == ""
    assert (folder / "b").read_text() == "old"
    write("new")
    assert (folder / "below" / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["traces"]
    (folder / "below" / "a").write_text("nEw")
    assert damaged_file(folder) == f"{folder}/below/a is not what was written (its SHA-256 differs)"
    (folder / "below" / "a").unlink()
    assert damaged_file(folder) == f"{folder}/below/a is not there"


def test_a_backup_beside_a_folder_stays_when_the_folder_is_replaced(tmp_path: Path) -> None:
    for name in ("export", "export.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    with new_folder(tmp_path / "export") as partial:
        (partial / "a").write_text("new")
    kept = {path.name: (path / "a").read_text() for path in tmp_path.iterdir()}
    assert kept == {"export": "new", "export.old": "export.old"}


def test_a_folder_of_somebody_else_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    assert damaged_file(tmp_path) == ""
    (tmp_path / SUMS).write_text("")
    assert damaged_file(tmp_path) == f"{tmp_path / SUMS} is damaged"


def test_lines_of_json_end_at_line_feeds_alone() -> None:
    rows = [{"text": "a\u2028b\u2029c\u0085d\x0be"}, {"text": ""}]
    written = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert [json.loads(line) for line in lines_of(written)] == rows
