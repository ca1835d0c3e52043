"""Claims about the configs that come with cotune, and about what `cotune --version` tells apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ROOT, Said, cotune

from cotune.shipped import find, resolved, shipped, with_files
from cotune.versions import build, version_line

IRIS = ROOT / "configs" / "iris.yaml"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    return lambda *words: cotune(["configs", *words], capsys)


def test_each_has_a_line_and_goes_by_the_name_in_it(run: Callable[..., Said]) -> None:
    names = [line.split()[0] for line in run().out.splitlines()]
    assert names == list(shipped())
    assert {"iris", "models/qwen3-4b", "table/iris"} <= set(names)
    for name in ("iris", "iris.yaml", "configs/iris.yaml", "./configs/iris.yaml"):
        found = find(name)
        assert found is not None
        assert found.samefile(IRIS)


def test_a_file_in_the_working_folder_wins_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "--config", "iris", "-c=paper", "--config", "mine", "--name", "iris"]
    made = with_files(words)
    assert Path(made[2]).samefile(IRIS)
    assert made[3].endswith("paper.yaml")
    assert made[4:] == words[4:]
    Path("iris.yaml").write_text("name: mine\n")
    assert resolved("iris") == "iris.yaml"
    assert "iris.yaml in this folder, not the shipped config" in capsys.readouterr().err
    assert resolved("iris.yaml") == "iris.yaml"
    assert not capsys.readouterr().err, "who writes the file's name means the file"


def test_a_copy_is_to_be_changed_and_replaces_nothing(run: Callable[..., Said]) -> None:
    assert run("copy", "iris", ".").out == "wrote iris.yaml\n"
    assert Path("iris.yaml").read_text() == IRIS.read_text()
    assert "iris.yaml is there already" in run("copy", "iris").err
    assert 'no shipped config "irs"' in run("copy", "irs").err
    assert "copy all" in run("copy", "table/iris").err, "alone it would not find the configs that it names"
    assert run("copy", "all").code == 0
    assert Path("configs/table/iris.yaml").is_file()


def test_builds_of_one_version_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = version_line()
    assert line.startswith("cotune 0.")
    assert all(f", {name} " in line for name in ("Python", "torch", "lightning", "transformers", "peft"))
    assert (ROOT / ".git").exists() <= ("(git " in line)
    installed = tmp_path / "cotune-0.1.0.dist-info"
    installed.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    seen = set()
    for digest, own in (("aa", "1"), ("bb", "1"), ("bb", "2")):  # pip's own lines of RECORD do not count
        installed.joinpath("RECORD").write_text(f"cotune/ask.py,sha256={digest},7\n../bin/cotune,sha256={own},7\n")
        seen.add(build(tmp_path))
    assert len(seen) == 2
    installed.joinpath("direct_url.json").write_text('{"vcs_info": {"commit_id": "0123456789"}}')
    assert build(tmp_path) == "git 0123456"
