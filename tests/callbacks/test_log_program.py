"""What is logged: read back from W&B's own files, from TensorBoard's, and from metrics.csv."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cotune.callbacks.log_program import LogProgram, prompt_difference, scalars
from cotune.callbacks.metrics_file import MetricsFile
from cotune.programs import Demo, Prompt
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from tiny_fit import BreakInTraining, BrokenOffError, Fit, tiny_fit


@pytest.fixture(scope="module")
def offline(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Fit, Path]:
    """A fit logged to W&B, and the folder of the recorded run."""
    wandb = pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", "0123456789" * 4)
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("COTUNE_TEST_SECRET", "sesame-1234")
        logger = WandbLogger(offline=True, save_dir=folder, project="tiny")
        fit = tiny_fit(tiny_model, folder / "run", callbacks=[LogProgram()], trainer={"logger": logger}).run()
        wandb.finish()
    (run,) = (folder / "wandb").glob("offline-run-*")
    return fit, run


def test_wandb_has_the_score_of_every_prefix_over_the_boundaries_index(offline: tuple[Fit, Path]) -> None:
    fit, run = offline
    rows = [row for row in _history(run) if "boundary/val_score" in row]
    logged = [(row["boundary/index"], row["boundary/val_score"]) for row in rows]
    assert logged == [(record["index"], record["val_score"]) for record in fit.alternate.history]
    searched = [row for row in rows if "search/best_score" in row]
    assert [row["search/best_score"] for row in searched] == [
        r["dev_score"] for r in fit.alternate.history if r["step"] == "p"
    ]
    assert [row["boundary/lm_calls"] for row in rows] == [record["lm_calls"] for record in fit.alternate.history]
    (scores,) = [t for t in _tables(run, "boundary/scores") if len(t["data"]) == 4]
    assert [row[1] for row in scores["data"]] == ["vanilla", "p", "p -> w", "p -> w -> p"]


def test_wandb_draws_prompt_steps_over_the_boundaries_index(offline: tuple[Fit, Path]) -> None:
    metrics = [record["metric"] for record in _records(offline[1]) if "metric" in record]
    axes = {m.get("glob_name") or m.get("name"): m.get("step_metric") for m in metrics}
    assert axes["boundary/*"] == axes["search/*"] == axes["traces/*"] == "boundary/index"


def test_wandb_has_the_prompts_in_words(offline: tuple[Fit, Path]) -> None:
    _, run = offline
    tables = _tables(run, "boundary/prompts")
    assert len(tables) == 4
    final = tables[-1]
    kept = next(t for t in tables if _cell(t, 0, "demos") and json.loads(_cell(t, 0, "demos")))
    assert _cell(final, 0, "stage") == "predict"
    assert _cell(final, 0, "instruction") == "Classify."
    demo = json.loads(_cell(kept, 0, "demos"))[0]
    assert demo["source"].startswith("iris-")
    assert f"+answer: {demo['outputs']['answer'].splitlines()[0]}" in _cell(kept, 0, "difference")


def test_wandb_has_a_row_for_every_call_on_val(offline: tuple[Fit, Path]) -> None:
    fit, run = offline
    tables = _tables(run, "boundary/rollouts")
    assert len(tables) == 4
    for table, record in zip(tables, fit.alternate.history, strict=True):
        scores = [row[table["columns"].index("score")] for row in table["data"]]
        assert len(scores) == len(fit.data.splits.val)
        assert sum(scores) / len(scores) == pytest.approx(record["val_score"])
        kinds = [row[table["columns"].index("error")] for row in table["data"]]
        assert kinds.count("format") == record["failures"].get("format", 0)
    examples = [row[0] for row in tables[0]["data"]]
    assert examples == [example.id for example in fit.data.splits.val]
    assert json.loads(_cell(tables[0], 0, "inputs")) == fit.data.splits.val[0].inputs


def test_wandb_has_the_candidates_that_were_tried(offline: tuple[Fit, Path]) -> None:
    fit, run = offline
    searches = [record["candidates"] for record in fit.alternate.history if record["step"] == "p"]
    tables = _tables(run, "search/tried")
    assert [[row[:4] for row in table["data"]] for table in tables] == [
        [[c["why"], c["score"], c["pruned"], c["id"]] for c in candidates] for candidates in searches
    ]


def test_no_secret_of_the_environment_is_logged(offline: tuple[Fit, Path]) -> None:
    for path in offline[1].parent.rglob("*"):
        if path.is_file():
            assert b"sesame-1234" not in path.read_bytes(), path
            assert b"0123456789" * 4 not in path.read_bytes(), path


def test_tensorboard_has_prompts_as_text_and_scores_by_boundary(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path / "tb", name="", version="")
    fit = tiny_fit(tiny_model, tmp_path, "p", callbacks=[LogProgram()], trainer={"logger": logger}).run()
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [event.step for event in events.Scalars("boundary/val_score")] == [0, 1]
    text = events.Tensors("prompts/predict/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "Classify." in text
    assert fit.alternate.history


def test_metrics_csv_has_every_boundary_and_every_batch(tiny_model: Path, tmp_path: Path) -> None:
    fit = _logged(tiny_model, tmp_path).run()
    rows = _rows(tmp_path)
    scores = [float(row["boundary/val_score"]) for row in rows if row["boundary/val_score"]]
    assert scores == [record["val_score"] for record in fit.alternate.history]
    assert [int(row["step"]) for row in rows if row["train/loss_step"]] == list(range(fit.trainer.global_step))


@pytest.mark.parametrize("batch", [0, 5])
def test_metrics_csv_of_a_resumed_run_is_that_of_a_whole_run(batch: int, tiny_model: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    _logged(tiny_model, whole).run()
    first = _logged(tiny_model, parts, BreakInTraining(batch))
    with pytest.raises(BrokenOffError):
        first.run()
    before = len(_rows(parts))
    _logged(tiny_model, parts, keep=True).run(first.last)
    assert before > 0
    assert _without_clock(_rows(parts)) == _without_clock(_rows(whole))


def test_a_new_run_in_the_folder_replaces_metrics_csv(tmp_path: Path) -> None:
    for score in (0.25, 0.5):
        logger = MetricsFile(tmp_path)
        logger.log_metrics({"boundary/val_score": score}, step=0)
    assert [row["boundary/val_score"] for row in _rows(tmp_path)] == ["0.5"]


def test_rows_are_on_disk_at_once_and_a_new_column_loses_none(tmp_path: Path) -> None:
    logger = MetricsFile(tmp_path)
    logger.log_metrics({"b": 1.0}, step=0)
    logger.log_metrics({"a": 2.0}, step=1)
    assert _rows(tmp_path) == [{"a": "", "b": "1.0", "step": "0"}, {"a": "2.0", "b": "", "step": "1"}]


def test_a_difference_names_what_came_and_what_went() -> None:
    before = Prompt("Answer.")
    after = Prompt("Answer well.", (Demo({"q": "1 + 1"}, {"a": "2"}, source="s"),))
    lines = prompt_difference(before, after).splitlines()
    assert "-Answer." in lines
    assert {"+Answer well.", "+Demo 1 (s)", "+q: 1 + 1", "+a: 2"} <= set(lines)
    assert prompt_difference(after, after) == ""


def test_the_calls_of_a_search_and_of_its_scoring_on_val_are_told_apart(tiny_model: Path, tmp_path: Path) -> None:
    fit = tiny_fit(tiny_model, tmp_path, "p", callbacks=[seen := Boundaries()]).run()
    metrics = scalars(seen.all[1])
    assert metrics["boundary/lm_calls"] - metrics["search/lm_calls"] == len(fit.data.splits.val)
    assert all(type(value) is float for value in metrics.values())


class Boundaries(LogProgram):
    def __init__(self) -> None:
        self.all: list[Any] = []

    def on_boundary(self, trainer: Any, module: Any, boundary: Any) -> None:
        self.all.append(boundary)


def _logged(model: Path, folder: Path, *callbacks: Any, keep: bool = False) -> Fit:
    logger = MetricsFile(folder, keep=keep)
    return tiny_fit(model, folder, callbacks=[LogProgram(), *callbacks], trainer={"logger": logger})


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _without_clock(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def _records(run: Path) -> list[dict[str, Any]]:
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", str(run), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [json.loads(line) for line in done.stdout.splitlines()]


def _history(run: Path) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in _records(run) if record["type"] == "history"]


def _tables(run: Path, name: str) -> list[dict[str, Any]]:
    """The tables logged under a name, in order."""
    group, own = name.split("/")
    paths = sorted((run / "files" / "media" / "table" / group).glob(f"{own}_*.table.json"), key=_step)
    return [json.loads(path.read_text()) for path in paths]


def _step(path: Path) -> int:
    return int(path.name.split("_")[-2])


def _cell(table: dict[str, Any], row: int, column: str) -> Any:
    return table["data"][row][table["columns"].index(column)]
