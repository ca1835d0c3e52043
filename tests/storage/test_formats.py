"""Each kind of file says its format: one from before is read, a newer one is refused with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cotune.callbacks import export_program
from cotune.reporting.run_record import read_run
from cotune.storage import run_folder
from cotune.storage.durable import write_durably
from cotune.storage.formats import FormatError, check_format
from cotune.storage.run_identity import RunIdentity, read_identity
from written_run import write_run

from cotune.commands.export import _with_base
from cotune.tuned import read_export

NEWER = r"has format 3, and this version of cotune reads 1 to 2\. "


def export(folder: Path, described: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "program.json").write_text(json.dumps(described))
    (folder / "prompts.json").write_text("{}")
    return folder


def made_with(folder: Path, **more: Any) -> Path:
    """A run's run.json as the first format was, and what is added to it."""
    record = {"options": {"alternate.epochs": 2}, "data": {}, "base": "b", "versions": {}, "finished": True, **more}
    write_durably(folder / "run.json", json.dumps(record))
    return folder


def test_an_export_of_the_first_format_is_read_and_written_anew_as_the_second(tmp_path: Path) -> None:
    first = {"base_model": "someone/tiny", "program": "p.P", "stages": {}, "model": {"lm": {"init_args": {}}}}
    described = read_export(export(tmp_path / "export", first))
    assert described == first
    again = _with_base(described, None)
    assert (again["format"], again["base"]["name"]) == (export_program.FORMAT, "someone/tiny")


def test_an_export_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    folder = export(tmp_path / "export", {"format": 3, "something": "else"})
    with pytest.raises(
        FormatError, match=rf'^"{folder}/program.json" {NEWER}Load it with the version that exported it'
    ):
        read_export(folder)


def test_a_run_of_the_first_format_is_continued(tmp_path: Path) -> None:
    identity = read_identity(made_with(tmp_path))
    assert identity == RunIdentity({"alternate.epochs": 2}, {}, "b", {}, finished=True)
    identity.write(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["format"] == run_folder.FORMAT
    assert read_identity(tmp_path) == identity


def test_a_run_of_a_newer_format_is_neither_continued_nor_reported(tmp_path: Path) -> None:
    folder = made_with(write_run(tmp_path / "run"), format=3, something="else")
    with pytest.raises(FormatError, match=rf'^"{folder}/run.json" {NEWER}Continue with the version .* --fresh'):
        read_identity(folder)
    with pytest.raises(FormatError, match=rf'^"{folder}/run.json" {NEWER}Read it with the version'):
        read_run(folder)


@pytest.mark.parametrize("found", ["none", 1, 3, None])
def test_a_file_whose_earlier_formats_are_not_read_says_so(found: Any) -> None:
    with pytest.raises(
        FormatError, match=f'^"a file" has format {found}, and this version of cotune reads 2. Mend it.$'
    ):
        check_format("a file", found, 2, oldest=2, fix="Mend it.")
