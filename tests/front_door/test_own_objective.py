"""An objective of one's own from the command line: named in `alternate.steps`, trained on, previewed."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import cotune, fit
from datasets import load_from_disk

from cotune.commands.preview import load_batches


def test_a_step_with_an_objective_of_ones_own_runs_and_shows_what_it_trains_on(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = '{"d": {"objective": {"class_path": "own_objective.LeaveOneOut"}, "rounds": 2}}'
    attempts = ("--data.bootstrapping.attempts", "4", "--data.bootstrapping.traces_per_example", "4")
    words = fit(tiny_model, "--alternate.steps", steps, *attempts, "--data.metric", "cotune.exact_match", schedule="d")
    done = cotune(words, capsys)
    assert done.code == 0, done.err
    batches, lm = load_batches(Path("runs/tiny"))
    assert {trace.score for trace in batches.traces} == {0.0, 1.0}
    assert {trace.base for trace in batches.traces} == {lm.name}
    again = load_from_disk("runs/tiny/traces/step-1/round-2")  # collected with the weights of the first round
    assert len(again) > 0
    shown = cotune(["preview", "runs/tiny"], capsys)
    assert shown.code == 0, shown.err
    assert f"{len(batches.traces)} pairs of" in shown.out
