"""Claims about the first lines of a run, and about the time that it says is left."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from cotune.callbacks.say_plan import SayPlan, plan, runs_left
from cotune.datamodules import Bootstrapping
from cotune.prompting import Found, PromptSearch, ReflectiveSearch, SearchTask
from tiny_fit import Fit, tiny_fit


def fitted(model: Path, folder: Path, capsys: pytest.CaptureFixture[str], **more: Any) -> tuple[Fit, list[str]]:
    fit = tiny_fit(model, folder / "small", callbacks=[SayPlan()], **more).run()
    return fit, capsys.readouterr().out.splitlines()


def test_the_first_lines_say_what_will_happen(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit, lines = fitted(tiny_model, tmp_path, capsys)
    assert lines[0] == "small: Predict, stage predict"
    layers = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert lines[1].endswith(f"float32; LoRA r 4, alpha 8 on {layers}")
    assert lines[2:5] == [
        "  data      12 train, 6 dev, 10 val, 4 test examples; metric digest",
        "            1 of 150 rows has the inputs of another (1 with equal labels, 0 with others) and is kept",
        "  schedule  p -> w -> p (p: RandomDemoSearch; w: 2 epochs on up to 2 attempts per example)",
    ]
    # vanilla 10; p: 12, 8 told the answer, 6 candidates of 6, 10, twice; w: 12 or 24 + 10 x (2 epochs + 2); test 4
    assert lines[5:7] == ["  rate      w: 2.0e-02 (as set)", "  in all    198 to 210 runs of the program"]
    assert fit.module.lm.usage.calls <= 190


def test_a_search_that_has_an_lm_write_says_the_calls_of_each_role(tiny_model: Path, tmp_path: Path) -> None:
    fit = tiny_fit(tiny_model, tmp_path / "small", "p", search=ReflectiveSearch(max_runs=66))
    fit.data.setup("fit")
    lines = plan("small", fit.module, fit.data, fit.alternate)
    said = "in a prompt step up to 66 LM calls of the program at one per stage, about 10 of the proposer"
    assert f"  search    {said}" in lines


def test_a_search_of_ones_own_that_does_not_say_its_runs_is_not_counted_as_none(
    tiny_model: Path, tmp_path: Path
) -> None:
    class Wordings(PromptSearch):
        def search(self, task: SearchTask) -> Found:
            raise NotImplementedError

    fit = tiny_fit(tiny_model, tmp_path / "small", "p", search=Wordings())
    fit.data.setup("fit")
    lines = plan("small", fit.module, fit.data, fit.alternate)
    said = "about 24 runs of the program, and those of Wordings, which does not say how many (most_runs)"
    assert f"  in all    {said}" in lines


def test_what_the_run_then_does_stays_within_what_was_said(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit, _ = fitted(tiny_model, tmp_path, capsys, bootstrapping=Bootstrapping(attempts=4))
    history, data = fit.alternate.history, fit.data
    for index in range(1, len(history)):
        _, before = runs_left(fit.alternate, data, index - 1)
        _, after = runs_left(fit.alternate, data, index)
        assert history[index]["lm_calls"] <= before - after


def test_every_boundary_says_score_cost_and_time_left(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit, lines = fitted(tiny_model, tmp_path, capsys)
    said = [line for line in lines if re.match(r"\[\d/3\] .*: val score", line)]
    assert [line.split(":")[0] for line in said] == ["[0/3] vanilla", "[1/3] p", "[2/3] p -> w", "[3/3] p -> w -> p"]
    for line, record in zip(said, fit.alternate.history, strict=True):
        assert f"val score {record['val_score']:.3f} ({record['lm_calls']} LM calls, " in line
    assert said[0].endswith("left, and the training")
    assert re.search(r"; about \d+ s left$", said[2])
    assert "left" not in said[3]
    (epoch,) = [line for line in lines if line.startswith("first epoch done")]
    assert "the training" not in epoch


def test_reused_traces_need_no_runs(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit, _ = fitted(tiny_model, tmp_path, capsys, schedule="w")
    fit.data.reused_traces = "somewhere"
    assert runs_left(fit.alternate, fit.data, 0) == (40 + 4, 40 + 4)
