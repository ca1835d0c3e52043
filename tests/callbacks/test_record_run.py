"""history.jsonl, summary.json and the closing table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from cotune.callbacks.record_run import RecordRun
from cotune.programs import Example, content_id
from cotune.reporting.closing_table import closing_table
from cotune.storage.durable import NotWrittenError, write_whole
from rich.console import Console
from tiny_fit import BrokenOffError, Fit, digest, tiny_fit


@pytest.fixture(scope="module")
def recorded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Fit, Path]:
    """A run that was fitted and tested, and its folder."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    fit = tiny_fit(tiny_model, folder, callbacks=[RecordRun()]).run()
    fit.trainer.test(fit.module, datamodule=fit.data, verbose=False)
    return fit, folder


def test_history_has_a_line_a_boundary(recorded: tuple[Fit, Path]) -> None:
    fit, folder = recorded
    lines = _history(folder)
    assert lines == fit.alternate.history
    common = {"index", "step", "prefix", "prompts", "val_score", "scores", "failures", "lm_calls", "seconds"}
    assert all(
        common | {"prompt_tokens", "completion_tokens", "too_long", "generating_seconds"} <= set(r) for r in lines
    )
    assert {"dev_score", "candidates"} <= set(lines[1])
    assert {"traces", "epoch"} <= set(lines[2])
    assert lines[2]["traces"]["solved"] <= lines[2]["traces"]["examples"] == 12


def test_summary_has_scores_cost_and_versions(recorded: tuple[Fit, Path]) -> None:
    fit, folder = recorded
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["schedule"] == "p -> w -> p"
    assert summary["scores"] == {record["prefix"]: record["val_score"] for record in fit.alternate.history}
    assert summary["best"] == fit.alternate.best["prefix"]
    assert summary["lm_calls"] == sum(record["lm_calls"] for record in fit.alternate.history)
    assert set(summary["seconds"]) == {"vanilla", "p", "w", "total"}
    assert {"python", "cotune", "torch", "lightning", "transformers", "peft", "datasets"} == set(summary["versions"])
    assert summary["seed"] == 0


def test_the_test_score_is_exact_and_of_the_best_program(recorded: tuple[Fit, Path]) -> None:
    fit, folder = recorded
    done = fit.module.rollouts(fit.data.splits.test, metric=fit.data.metric)
    expected = sum(rollout.score for rollout in done) / len(done)
    assert json.loads((folder / "summary.json").read_text())["test_score"] == expected


def test_history_of_a_resumed_run_is_whole_and_has_nothing_twice(tiny_model: Path, tmp_path: Path) -> None:
    first = tiny_fit(tiny_model, tmp_path, "p -> p", callbacks=[RecordRun()])
    first.lm.breaks_at = 10
    with pytest.raises(BrokenOffError):
        first.run()
    before = _history(tmp_path)
    tiny_fit(tiny_model, tmp_path, "p -> p", callbacks=[RecordRun()]).run(first.last)
    after = _history(tmp_path)
    assert [record["index"] for record in after] == [0, 1, 2]
    assert after[: len(before)] == before


@pytest.mark.parametrize("width", [80, 160])
def test_the_closing_table_marks_the_best_and_tells_where_the_result_is(width: int, recorded: tuple[Fit, Path]) -> None:
    fit, folder = recorded
    text = _printed(folder, width)
    marked = [line for line in text.splitlines() if " * " in line]
    assert len(marked) == 1
    assert f" {fit.alternate.best['prefix']} * " in marked[0]
    assert all(f"{record['val_score']:.3f}" in text for record in fit.alternate.history)
    assert str(folder / "export") in text.replace("\n", "")
    assert max(map(len, text.splitlines()[:-2])) <= width


def test_the_closing_table_of_an_untested_run_has_no_test_score(tiny_model: Path, tmp_path: Path) -> None:
    tiny_fit(tiny_model, tmp_path, "p", callbacks=[RecordRun()]).run()
    assert "not tested" in _printed(tmp_path, 120)


def _moody(example: Example, prediction: Mapping[str, Any]) -> Any:
    """A metric that gives no number for about one example in four, the same ones each time."""
    return None if int(content_id(example.id), 16) % 4 == 0 else digest(example, prediction)


def test_faults_of_the_users_code_are_shown_once_counted_and_summed_up(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = tiny_fit(tiny_model, tmp_path, "p -> p", callbacks=[RecordRun()], metric=_moody).run()
    said = capsys.readouterr().out
    fit.trainer.test(fit.module, datamodule=fit.data, verbose=False)
    on_val = sum(record["failures"].get("metric", 0) for record in _history(tmp_path))
    faults = [record["faults"]["metric"] for record in _history(tmp_path)]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert said.count("the metric failed") == 1
    assert f"the metric failed {faults[0]['count']} times, first on example {faults[0]['example']}: " in said
    assert sum(fault["count"] for fault in faults) > on_val > 0  # those of the searches count too
    assert summary["faults"]["metric"] == {**faults[0], "count": sum(fault["count"] for fault in faults)}
    closing = _printed(tmp_path, 80)
    assert f"Faults, scored 0: the metric failed {summary['faults']['metric']['count']} times" in closing
    assert ("Faults on test" in closing) == bool(summary["test_faults"])


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_whole(path, "old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(NotWrittenError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"


def _history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def _printed(folder: Path, width: int) -> str:
    console = Console(file=StringIO(), width=width)
    closing_table(folder, console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]
