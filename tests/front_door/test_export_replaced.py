"""Claims about what `cotune export` leaves of an earlier export: all of it, until the new one is whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from cotune.lightning_modules import ModelNotFoundError
from cotune.programs import Sampling
from cotune.storage.durable import NotWrittenError, damaged_file
from crashes import dies

import cotune
from cotune.commands.export import write_export

EXPORTED = ("README.md", "program.json", "prompts.json")


@pytest.mark.filterwarnings("ignore:.*fork.. may lead to deadlocks:DeprecationWarning")
@pytest.mark.parametrize("point", ["before replace", "after replace"])
@pytest.mark.parametrize("where", ["new", "empty", "earlier", "its own"])
def test_a_killed_export_leaves_none_or_a_whole_one_and_the_same_command_completes_it(
    where: str, point: str, export: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def merge(lm: Any, adapter: Path, folder: Path, *, sampling: Sampling) -> str:
        shutil.copytree(tiny_model, folder, dirs_exist_ok=True)  # torch's threads do not survive a fork
        return "the base"

    monkeypatch.setattr("cotune.lightning_modules.merged.save_merged", merge)
    out = export if where == "its own" else tmp_path / "out"
    died = 0
    while True:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        if where != "new" and out != export:
            out.mkdir()
        if where == "earlier":
            write_export(export, out, what="all", license_name="mit")
        if not dies(lambda: write_export(export, out, what="all"), point, died + 1):
            break
        died += 1
        if where == "its own":  # never a moment in which the run has lost what it ended with
            cotune.tuned.read_export(export)
            cotune.tuned._check_weights(export)
        elif (out / "program.json").exists():
            assert damaged_file(out) == ""
        write_export(export, out, what="all")
        assert damaged_file(out) == ""
        assert {path.name for path in out.iterdir()} == {"adapter", "merged", "SHA256SUMS", *EXPORTED}
    assert died > 2
    assert not list(tmp_path.glob("*.partial"))


def test_an_export_that_fails_leaves_nothing_behind(export: Path, tmp_path: Path) -> None:
    described = json.loads((export / "program.json").read_text())
    described["base"]["model"] = str(tmp_path / "gone")
    (export / "program.json").write_text(json.dumps(described))
    before = sorted(tmp_path.rglob("*"))
    for out in (tmp_path / "out", export):
        with pytest.raises(ModelNotFoundError):
            write_export(export, out, what="merged")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_export_that_fails_leaves_the_earlier_one_in_its_place(export: Path, tmp_path: Path) -> None:
    write_export(export, tmp_path / "out", what="all", license_name="mit")
    before = {path: path.read_bytes() for path in tmp_path.joinpath("out").rglob("*") if path.is_file()}
    described = json.loads((export / "program.json").read_text())
    described["base"]["model"] = str(tmp_path / "gone")
    (export / "program.json").write_text(json.dumps(described))
    with pytest.raises(ModelNotFoundError):
        write_export(export, tmp_path / "out", what="all")
    assert {path: path.read_bytes() for path in tmp_path.joinpath("out").rglob("*") if path.is_file()} == before
    assert not list(tmp_path.rglob("*.partial"))


def test_an_error_while_the_parts_are_moved_leaves_the_earlier_export(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write_export(export, out, what="all")
    (tmp_path / "elsewhere").mkdir()
    (out / "merged").rename(tmp_path / "elsewhere" / "merged")
    (out / "merged").symlink_to(tmp_path / "elsewhere" / "merged")
    before = sorted(path.name for path in out.iterdir())
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target) == out / "SHA256SUMS" and Path(source).parent.name == ".partial":
            raise PermissionError(13, "Permission denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(NotWrittenError):
        write_export(export, out, what="adapter")
    monkeypatch.setattr(os, "replace", real)
    assert sorted(path.name for path in out.iterdir()) == before
    cotune.tuned.read_export(out)
    write_export(export, out, what="all")
    assert (tmp_path / "elsewhere" / "merged").is_dir()  # what a link leads to is not ours to delete
    assert not (out / "merged").is_symlink()


def test_an_export_that_was_killed_at_its_end_is_completed_beside_other_files(export: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_export(export, out, what="adapter")
    (out / "notes.txt").write_text("mine")
    (out / ".partial").mkdir()
    (out / "program.json").rename(out / ".partial" / "program.json")
    write_export(export, out, what="adapter")
    assert {path.name for path in out.iterdir()} == {"adapter", "notes.txt", "SHA256SUMS", *EXPORTED}


def test_an_export_in_place_of_another_holds_nothing_of_it(export: Path, tmp_path: Path) -> None:
    write_export(export, tmp_path / "out", what="all")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / ".git").mkdir()
    (tmp_path / "out" / ".git" / "config").write_text("mine, too")
    write_export(export, tmp_path / "out", what="adapter")
    assert (tmp_path / "out" / ".git" / "config").read_text() == "mine, too"
    shutil.rmtree(tmp_path / "out" / ".git")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter", "notes.txt", "SHA256SUMS", *EXPORTED}
    assert damaged_file(tmp_path / "out") == ""
