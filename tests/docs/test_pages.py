"""Every page of docs/: its Python runs on a tiny model, its files are right, and its commands are ones that parse."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import fit
from pages import DOCS, ROOT, blocks, commands

from cotune.__main__ import main
from cotune.fit.cli import CotuneCLI
from cotune.fit.parse_errors import OWN_COMMANDS

PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
SEARCH = ("--alternate.search", "--alternate.search.num_candidates")
RUN_ELSEWHERE = {"your-own-program.md", "engines.md"}
"""Pages whose files and commands a test of their own runs as they stand."""


class ParsedError(Exception):
    """The command line was understood; nothing more is wanted."""


class OnlyParses(CotuneCLI):
    def before_instantiate_classes(self) -> None:
        raise ParsedError


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> Iterator[Path]:
    """An empty folder with the repository's configs, where the embedded model is a tiny one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("cotune.lightning_modules.embedded.embedded_model", lambda: tiny_model)
    monkeypatch.setattr(sys, "argv", ["cotune"])  # Lightning warns of a command line beside its `args`
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    main(["new", "my-task"])  # the pages go into it; here its files are where they are read
    for name in ("task.yaml", "program.py"):
        (tmp_path / name).symlink_to(Path("my-task") / name)
    yield tmp_path
    for file in tmp_path.glob("*.py"):  # another page may have a module of that name
        sys.modules.pop(file.stem, None)


def save_files(page: Path, folder: Path) -> None:
    for block in blocks(page):
        if block.file:
            (folder / block.file).write_text(block.text, encoding="utf-8")
            if block.file.endswith(".yaml"):
                assert isinstance(yaml.safe_load(block.text), dict)


def ids(page: Path) -> str:
    return page.name


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_command_on_it_parses(page: Path, reader: Path) -> None:
    save_files(page, reader)
    for words in commands(page):
        if not words or words[0] == "--version":
            continue
        if words[0] in OWN_COMMANDS:
            command = importlib.import_module(f"cotune.commands.{words[0]}")
            (command.parse if hasattr(command, "parse") else command.parser().parse_args)(words[1:])
        else:
            with pytest.raises(ParsedError):
                OnlyParses([word for word in words if word != "--print_config"])


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in RUN_ELSEWHERE], ids=ids)
def test_its_python_runs(page: Path, reader: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    save_files(page, reader)
    scripts = [block for block in blocks(page) if block.language == "python" and not block.file]
    if any("runs/" in block.text and "load(" in block.text for block in scripts):
        name = {"quickstart.md": "first", "README.md": "demo"}.get(page.name, "iris")
        assert main([*fit(tiny_model, schedule="p", name=name)]) == 0
    names: dict[str, Any] = {"__name__": "__page__"}
    for block in scripts:
        exec(compile(block.text, page.name, "exec", dont_inherit=True), names)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_block_has_a_language_that_a_test_knows(page: Path) -> None:
    known = {"bash", "python", "yaml", "csv", "text"}
    assert {block.language for block in blocks(page)} <= known
    assert all(block.file for block in blocks(page) if block.language in ("yaml", "csv"))


def test_each_page_is_in_the_sites_table_of_contents() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    lines = {line for block in index.split("```{toctree}")[1:] for line in block.split("```")[0].splitlines()}
    assert {page.stem for page in DOCS.glob("*.md")} - {"index"} <= lines


def test_no_page_takes_the_place_of_one_that_sphinx_makes() -> None:
    assert not {"search", "genindex", "py-modindex"} & {page.stem for page in DOCS.glob("*.md")}


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_a_try_of_the_sweep_is_a_command_that_parses(reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As W&B's agent makes it: options as they were drawn, blanks and all."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args  # imports much, which other workers need not

    save_files(DOCS / "sweeps.md", reader)
    sweep = yaml.safe_load((reader / "sweep.yaml").read_text())
    drawn = {
        name: {"value": one["values"][0] if "values" in one else one["min"]}
        for name, one in sweep["parameters"].items()
    }
    options = create_sweep_command_args({"args": drawn})["args"]
    words = [word for part in sweep["command"] for word in (options if part == "${args}" else [part])]
    (reader / "cotune").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (reader / "cotune").chmod(0o755)
    monkeypatch.setenv("PATH", f"{reader}:{os.environ['PATH']}")
    monkeypatch.setenv("WANDB_RUN_ID", "t1")
    typed = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "--alternate.schedule=p -> w" in typed
    assert "sweep-t1" in typed
    with pytest.raises(ParsedError):
        OnlyParses(typed)


# What some pages show is done, too, on the tiny model


def on_the_tiny_model(model: Path, *leave_out: str) -> list[str]:
    """Options that make any command small; `fit` has them behind its config."""
    words = fit(model, schedule="p")[3:]
    for name in leave_out:
        words = [w for i, w in enumerate(words) if name not in (w, words[i - 1])]
    return words


def test_the_capitals_and_the_sums_can_be_tuned(reader: Path, tiny_model: Path) -> None:
    save_files(DOCS / "data.md", reader)
    capitals, sums = (
        words for words in commands(DOCS / "data.md") if words[-1] == "sums" or words[-1] == "capitals.yaml"
    )
    sizes = (f"--data.sizes.{name}" for name in ("train", "dev", "val", "test"))
    options = on_the_tiny_model(tiny_model, "--name", "--data.metric", *sizes)
    for words in (capitals, sums):
        assert main([*words, *options]) == 0
    assert Path("runs/capitals/summary.json").is_file()
    assert Path("runs/sums/summary.json").is_file()


def test_the_wordings_can_be_searched(reader: Path, tiny_model: Path) -> None:
    save_files(DOCS / "prompt-search.md", reader)
    (words,) = [words for words in commands(DOCS / "prompt-search.md") if "wordings.yaml" in words]
    options = on_the_tiny_model(tiny_model, "--name", "--data.metric", *SEARCH)
    assert main([*words, *options, "--data.sizes.test", "0"]) == 0, "and without a test set"
    assert "Name the species" in Path("runs/wordings/boundaries/1.json").read_text()


def test_instructions_can_be_rewritten_and_joined_with_demos(reader: Path, tiny_model: Path) -> None:
    save_files(DOCS / "prompt-search.md", reader)
    for name in ("told", "joint"):
        (words,) = [words for words in commands(DOCS / "prompt-search.md") if words[-1] == name]
        options = on_the_tiny_model(tiny_model, "--name", "--data.metric", *SEARCH)
        assert main([*words, *options]) == 0
        assert Path(f"runs/{name}/boundaries/1.json").is_file()
