"""What is logged to TensorBoard and metrics.csv, read back from their own files. For W&B see test_wandb.py."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from cotune.callbacks.boundary import Boundary
from cotune.callbacks.loggers.log_program import LogProgram, scalars
from cotune.callbacks.loggers.metrics_file import MetricsFile
from cotune.callbacks.loggers.program_tables import candidate_rows, prompt_difference, rejected_rows
from cotune.programs import Demo, Prompt, prompts_id
from cotune.prompting import Candidate, Found, Rejected
from cotune.storage.durable import NotWrittenError
from lightning.pytorch.loggers import TensorBoardLogger
from tiny_fit import BreakInTraining, BrokenOffError, Fit, tiny_fit


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
    tried = fit.alternate.history[1]["candidates"]
    assert [event.value for event in events.Scalars("trial/dev_score")] == pytest.approx([c["score"] for c in tried])
    assert events.Scalars("cost/p/lm_calls")[-1].value == fit.alternate.history[1]["lm_calls"]


def test_parents_minibatch_scores_and_rejected_texts_are_rows() -> None:
    start, child = {"predict": Prompt("Say it.")}, {"predict": Prompt("Shout it.")}
    ran = {"minibatch": ["1", "2"], "before": [0.5, 0.0], "after": [1.0, 0.5]}
    lineage = {"round": 3, "parents": [prompts_id(start)], "rewritten": {"predict": ran}}
    tried = [Candidate(start, (0.5,)), Candidate(child, (1.0,), prompts_id(start), "round 3", lineage=lineage)]
    refused = Rejected("predict", "Hum it.", "no better on the minibatch", prompts_id(start), lineage)
    found = Found(child, 1.0, tuple(tried), rejected=(refused,), calls={"program": 9, "proposer": 2})
    boundary = Boundary(1, "p", "p", child, start, 1.0, {}, (), {}, found)
    columns, (_, row) = candidate_rows(boundary)
    assert dict(zip(columns, row, strict=True)) | {"parents": prompts_id(start), "before": 0.25, "after": 0.75} == dict(
        zip(columns, row, strict=True)
    )
    columns, (row,) = rejected_rows(boundary)
    assert row[:7] == ["predict", refused.why, prompts_id(start), 3, 0.25, 0.75, "Hum it."]
    assert row[7].endswith("-Say it.\n+Hum it.")
    assert scalars(boundary)["search/lm_calls_of_proposer"] == 2


def test_metrics_csv_has_every_boundary_and_every_batch(tiny_model: Path, tmp_path: Path) -> None:
    fit = _logged(tiny_model, tmp_path).run()
    rows = _rows(tmp_path)
    scores = [float(row["boundary/val_score"]) for row in rows if row["boundary/val_score"]]
    assert scores == [record["val_score"] for record in fit.alternate.history]
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(fit.trainer.global_step))


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_row_that_a_full_disk_does_not_take_names_the_file_and_the_cause(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").symlink_to("/dev/full")
    with pytest.raises(NotWrittenError, match=r"metrics.csv could not be written: No space left on device"):
        MetricsFile(tmp_path, keep=True).log_metrics({"loss": 1.0}, step=0)


@pytest.mark.parametrize(
    "torn", ["0.2", "0.25,1,0", "0.25,1\n", "0.25,1,0.5,2\n"], ids=["no end", "last digit", "too short", "too long"]
)
def test_rows_that_were_cut_short_are_dropped_and_the_others_kept(torn: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("a,b,step\n0.5,,0\n" + torn)
    logger = MetricsFile(tmp_path, keep=True)
    logger.forget(step=1, boundaries=0)
    logger.log_metrics({"c": 1.0}, step=1)
    assert _rows(tmp_path) == [
        {"a": "0.5", "b": "", "c": "", "step": "0"},
        {"a": "", "b": "", "c": "1.0", "step": "1"},
    ]


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
        super().__init__()
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
