"""cotune table's own options: what --set does, what a part of a table runs and shows, and runs made otherwise."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, cotune
from cotune.experiments import command
from cotune.experiments.command import TableCommand
from cotune.experiments.page import markdown, table_record
from cotune.experiments.results import read_result
from cotune.experiments.runs import Cell, Run, runs_of
from cotune.experiments.table_config import TableConfig, TableError, read_table
from cotune.prompting import RandomDemoSearch
from cotune.storage.run_identity import RunIdentity
from written_table import config, flat, write_run

from cotune.fit import parts

CELL = Cell("iris", "tiny", "default")
IRIS = {"configs": [str(ROOT / "configs" / "iris.yaml")]}
P, PP, PWP = ("p",), ("p", "p"), ("p", "w", "p")


def values(words: Sequence[str]) -> dict[str, str]:
    """What a command line comes to: of an option given twice the last value."""
    return dict(zip(words[::2], words[1::2], strict=True))


# --set


@pytest.mark.parametrize("prefix", ["", "iris:"])
def test_a_set_option_wins_over_those_of_table_task_lm_preset_and_the_tasks_own_preset(
    prefix: str, tmp_path: Path
) -> None:
    said = {f"data.{name}": 1 for name in ("table", "task", "lm", "preset", "own")}
    made = config(
        tmp_path,
        options={"data.table": 1},
        tasks={
            "iris": {
                "configs": ["task.yaml"],
                "options": {"data.task": 1},
                "presets": {"default": {"options": {"data.own": 1}}},
            }
        },
        lms={"tiny": {"options": {"data.lm": 1}}},
        presets={"default": {"options": {"data.preset": 1}}},
    )
    assert {f"--{name}": "1" for name in said}.items() <= values(made.words("iris", "tiny", "default")).items()
    now = made.with_options([f"{prefix}{name}=2" for name in said])
    assert {f"--{name}": "2" for name in said}.items() <= values(now.words("iris", "tiny", "default")).items()


def test_a_set_option_of_a_task_wins_over_one_of_all_tasks_however_they_are_ordered(tmp_path: Path) -> None:
    made = config(tmp_path, tasks={"iris": ["task.yaml"], "other": ["task.yaml"]})
    now = made.with_options(["iris:data.path=a", "data.path=b"])
    assert values(now.words("iris", "tiny", "default"))["--data.path"] == "a"
    assert values(now.words("other", "tiny", "default"))["--data.path"] == "b"


def test_a_set_option_wins_over_a_mapping_that_holds_it(tmp_path: Path) -> None:
    sizes = {"train": 60, "dev": 20, "val": 20, "test": 40}
    made = config(tmp_path, tasks={"iris": {**IRIS, "options": {"data.sizes": sizes}}})
    words = made.with_options(["data.sizes.test=50"]).words("iris", "tiny", "default")
    assert parts.parts_of(words).data.sizes.test == 50


def test_a_class_that_is_set_takes_the_options_that_a_preset_has_for_it(tmp_path: Path) -> None:
    preset = {"options": {"alternate.search.num_candidates": 4}}
    made = config(tmp_path, tasks={"iris": IRIS}, presets={"default": preset})
    words = made.with_options(["alternate.search=RandomDemoSearch"]).words("iris", "tiny", "default")
    search: Any = parts.parts_of(words).alternate.search
    assert isinstance(search, RandomDemoSearch)
    assert search.num_candidates == 4


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("seed_everything", "3", "sets seed_everything, .*--seed"),
        ("data.seed", "3", "sets data.seed, .*--seed"),
        ("alternate.schedule", "p", "sets alternate.schedule, .*--strategy"),
        ("alternate.test_prefixes", "false", "sets alternate.test_prefixes, .*leave it out"),
        ("alternate.lm_calls", "30", "sets alternate.lm_calls, .*equal_calls: false"),
        ("name", "mine", "sets name, .*--folder"),
        ("runs_dir", "mine", "sets runs_dir, .*--folder"),
        ("trainer.enable_progress_bar", "true", "sets trainer.enable_progress_bar, .*leave it out"),
        ("alternate", '{"epochs": 2, "schedule": "w"}', "sets alternate.schedule, .*--strategy"),
    ],
)
def test_options_that_a_table_sets_itself_are_refused_with_the_right_one(
    option: str, value: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(TableError, match=rf"--set \"iris:{option}=.*{said}"):
        config(tmp_path).with_options([f"iris:{option}={value}"])
    own = {"options": {option: json.loads(value) if value.startswith("{") else value}}
    for where, changes in {
        "the table": own,
        'LM "tiny"': {"lms": {"tiny": own}},
        'preset "default"': {"presets": {"default": own}},
        'task "iris"': {"tasks": {"iris": own}},
        'task "iris", default': {"tasks": {"iris": {"presets": {"default": own}}}},
    }.items():
        with pytest.raises(TableError, match=rf"table\.yaml: {where} {said}"):
            config(tmp_path, **changes)


def test_a_table_without_the_control_takes_a_number_of_lm_calls(tmp_path: Path) -> None:
    made = config(tmp_path, equal_calls=False).with_options(["alternate.lm_calls=30"])
    assert values(made.words("iris", "tiny", "default"))["--alternate.lm_calls"] == "30"


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "table").glob("*.yaml")), ids=lambda path: path.stem)
def test_no_shipped_table_sets_what_tables_set(path: Path) -> None:
    assert read_table(path).tasks


# What is run, and what the page shows


class NoRunner:
    """Takes what it is to run, and runs nothing."""

    asked: list[Run]

    def __init__(self, *args: object, **options: object) -> None: ...

    def run(self, runs: Sequence[Run]) -> list[Run]:
        NoRunner.asked = list(runs)
        return []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table's, in which nothing is run."""
    monkeypatch.setattr(command, "Runner", NoRunner)
    return tmp_path / "table"


def start(part: TableConfig, whole: TableConfig, folder: Path, **changes: object) -> dict[str, Any]:
    """Starts a part of a table; what its table.json says."""
    usual = {"dry_run": False, "no_warm_up": True, "retry": False, "submit": None, "jobs": 1, "keep_checkpoints": True}
    asked = argparse.Namespace(**{**usual, **changes})
    made = TableCommand(part, folder, asked, parts_of=parts.parts_of, fit=lambda words: 1, whole=whole)
    assert made.make() == 0
    return dict(json.loads((folder / "table.json").read_text(encoding="utf-8")))


def table(tmp_path: Path, **changes: Any) -> TableConfig:
    usual = {"tasks": {"iris": IRIS}, "strategies": ["p", "p -> p", "p -> w -> p"], "equal_calls": False}
    return config(tmp_path, **{**usual, **changes})


def finish(run: Run, folder: Path, **changes: Any) -> None:
    count = len(run.steps) + 1
    write_run(run, folder / "runs", [0.1, 0.3, 0.9, 0.5][:count], [flat(0.5)] * count, **changes)


def identity_of(run: Run, made: TableConfig, folder: Path, **options: Any) -> None:
    """Writes down that a run was made with these options beside the table's."""
    cell = run.cell
    counted = {**parts.parts_of(made.words(cell.task, cell.lm, cell.preset)).counted, **options}
    RunIdentity(counted, {}, "", {}).write(folder / "runs" / run.name)


def test_the_page_of_a_part_is_that_of_the_whole_table_as_far_as_it_is_finished(tmp_path: Path, folder: Path) -> None:
    whole = table(tmp_path, tasks={"iris": IRIS, "other": IRIS, "untouched": IRIS})
    other = Run(Cell("other", "tiny", "default"), PWP, 0)
    for run in [run for run in runs_of(whole) if run.cell == CELL] + [other]:
        finish(run, folder)
    record = start(whole.only(tasks=["iris"], seeds=[0]), whole, folder)
    assert [cell["task"] for cell in record["cells"]] == ["iris", "other"]
    iris = {row["strategy"]: row for row in record["cells"][0]["rows"]}
    assert [row["seeds"] for row in iris.values()] == [2, 2, 2]
    assert (record["seeds"], record["finished"], record["runs"]) == ([0, 1], 5, 8)
    assert start(whole.only(tasks=["iris"], seeds=[7]), whole, folder)["seeds"] == [0, 1, 7]


def test_a_strategy_that_begins_a_finished_run_is_read_from_it(tmp_path: Path, folder: Path) -> None:
    whole = table(tmp_path)
    finish(Run(CELL, PWP, 0), folder)
    record = start(whole.only(strategies=["p"]), whole, folder)
    assert NoRunner.asked == [Run(CELL, PWP, 0), Run(CELL, P, 1)]
    assert [row["seeds"] for row in record["cells"][0]["rows"]] == [1, 0, 1]


def test_vanilla_alone_is_read_from_any_finished_run(tmp_path: Path, folder: Path) -> None:
    whole = table(tmp_path, strategies=["vanilla", "w"], seeds=[0])
    finish(Run(CELL, ("w",), 0), folder)
    start(whole.only(strategies=["vanilla"]), whole, folder)
    assert NoRunner.asked == [Run(CELL, ("w",), 0)]


def test_a_shorter_run_of_an_earlier_part_stays_on_the_page(tmp_path: Path, folder: Path) -> None:
    whole = table(tmp_path, seeds=[0])
    finish(Run(CELL, P, 0), folder)
    record = start(whole.only(strategies=["p -> p"]), whole, folder)
    assert NoRunner.asked == [Run(CELL, PP, 0)]
    assert [row["seeds"] for row in record["cells"][0]["rows"]] == [1, 0, 0]


def test_the_source_of_a_control_is_not_read_from_a_longer_run(tmp_path: Path, folder: Path) -> None:
    whole = table(tmp_path, strategies=["p -> p", "p -> w -> p -> w"], equal_calls=True, seeds=[0])
    write_run(Run(CELL, (*PWP, "w"), 0), folder / "runs", [0.5] * 5, [flat(0.5)] * 5)
    start(whole.only(strategies=["p -> p", "p -> w -> p"]), whole, folder)
    assert NoRunner.asked == [Run(CELL, PWP, 0), Run(CELL, PP, 0), Run(CELL, PP, 0, equal=True)]


def test_an_unfinished_run_of_other_options_is_refused_before_the_page_is_written(tmp_path: Path, folder: Path) -> None:
    whole = table(tmp_path, strategies=["p"], seeds=[0])
    (run,) = runs_of(whole)
    finish(run, folder, finished=False)
    identity_of(run, whole, folder, **{"alternate.epochs": 77})
    with pytest.raises(TableError, match=r"_p_0 was made with other options .*alternate\.epochs: 77 -> "):
        start(whole, whole, folder)
    assert not (folder / "table.md").exists()


def test_a_run_of_other_options_that_is_not_asked_for_is_left_off_the_page_and_that_is_said(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = table(tmp_path, strategies=["p"])
    for run, epochs in zip(runs_of(whole), (None, 77), strict=True):
        finish(run, folder)
        if epochs:
            identity_of(run, whole, folder, **{"alternate.epochs": epochs})
    record = start(whole.only(seeds=[0]), whole, folder)
    assert [row["seeds"] for row in record["cells"][0]["rows"]] == [1]
    assert (
        "_p_1 was made with other options, and is not on the page: alternate.epochs: 77 -> " in capsys.readouterr().out
    )


def test_checkpoints_of_runs_that_are_not_asked_for_are_kept(tmp_path: Path, folder: Path) -> None:
    whole = table(tmp_path, strategies=["p"])
    kept = [folder / "runs" / run.name / "checkpoints" for run in runs_of(whole)]
    for run, checkpoints in zip(runs_of(whole), kept, strict=True):
        finish(run, folder)
        checkpoints.mkdir()
    start(whole.only(seeds=[0]), whole, folder, keep_checkpoints=False)
    assert [checkpoints.exists() for checkpoints in kept] == [False, True]


def test_an_lm_without_weights_has_its_calls_counted_and_no_pace_measured(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "warm_up", lambda *_: pytest.fail("it measures"))
    options = {"model.lm": "OpenAILM", "model.lm.model": "gpt", "model.lm.endpoint": "http://127.0.0.1:9/v1"}
    whole = table(tmp_path, strategies=["p"], seeds=[0], lms={"tiny": {"options": options}})
    start(whole, whole, folder, no_warm_up=False)
    said = capsys.readouterr().out
    assert "iris, tiny, default: counts only, since gpt has no weights here" in said
    assert "1 runs, at most" in said


@pytest.mark.parametrize("also", [["--dry-run"], ["--submit", "slurm"], ["--retry"]])
def test_options_of_a_whole_table_are_refused_beside_a_single_run(
    also: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = cotune(["table", "--config", "iris", "--run", "some-run", *also], capsys)
    assert said.code == 2
    assert f'{also[0]} is of a whole table, and --run "some-run" makes one run' in said.err


def test_the_caption_calls_columns_by_their_names(tmp_path: Path, folder: Path) -> None:
    made = table(tmp_path, strategies=["p"], seeds=[0])
    (run,) = runs_of(made)
    finish(run, folder)
    page = markdown(table_record(made, [read_result(run, folder / "runs")]))
    assert "| no answer |" in page
    assert "No answer: test answers that did not parse." in page
