"""Claims about `cotune preview`: it shows what the loss saw, and nothing else."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import Said, cotune, fit
from cotune.datamodules import Pair, load_traces
from datasets import load_from_disk
from tiny import save_tiny_model, tiny_tokenizer

from cotune.commands.preview import TrainedRow, load_batches, marked, trained_rows


def preview(capsys: pytest.CaptureFixture[str], *words: str) -> Said:
    return cotune(["preview", *words], capsys)


def test_the_rows_are_those_of_the_batches(finished: Any) -> None:
    batches, lm = load_batches(finished.folder)
    rows = list(trained_rows(batches))
    assert len(rows) == len(batches.traces) > 0
    tokens = [batches[i].bearing(torch.device("cpu"), torch.float32) for i in range(len(batches))]
    trained = [id_ for batch in tokens for id_ in batch.ids[:, 0].tolist()]
    assert [id_ for row in rows for id_ in row.ids[len(row.ids) - row.trained :]] == trained
    for row in rows:
        written = list(row.trace.completion_ids) + ([] if row.trace.complete else [lm.end_ids[0]])
        assert list(row.ids[-row.trained :]) == written


def test_the_batches_are_those_of_the_training(finished: Any) -> None:
    """The run drew its batches by itself: the same traces, options and seed must give the same plan."""
    batches, _ = load_batches(finished.folder, epoch=1)
    data = finished.module.trainer.datamodule
    data.epoch = 1
    trained = data.epoch_batches()
    assert batches.plan == trained.plan
    assert [batches.pairs(i) for i in range(len(batches))] == [trained.pairs(i) for i in range(len(batches))]


def test_no_weights_are_loaded(finished: Any) -> None:
    _, lm = load_batches(finished.folder)
    assert lm.model is None
    assert (lm.window, lm.pad_id, lm.end_ids) == tuple(
        getattr(finished.module.lm, name) for name in ("window", "pad_id", "end_ids")
    )


def test_trained_tokens_stand_between_marks(finished: Any, capsys: pytest.CaptureFixture[str]) -> None:
    said = preview(capsys, str(finished.folder), "--rows", "100")
    assert said.code == 0, said.err
    # What the engine put there stands between marks of its own: here the end of the turn behind a choice.
    shown = re.findall(r"⟦(.*?)⟧", said.out.replace("⟧⟨", "").replace("⟩", "⟧"), re.DOTALL)
    batches, lm = load_batches(finished.folder)
    assert shown == [lm.tokenizer.decode(row.ids[-row.trained :]) for row in trained_rows(batches)]
    assert "stage predict · example iris-" in said.out
    assert f"{len(shown)} pairs of " in said.out
    assert "100% of the completions have the ids that the tokenizer gives their text" in said.out


def test_demos_show_in_the_prompts_that_have_them(finished: Any) -> None:
    epochs = [load_batches(finished.folder, epoch=epoch) for epoch in range(2)]
    turns = {lm.tokenizer.decode(row.ids).count("<|im_start|>assistant") for b, lm in epochs for row in trained_rows(b)}
    assert min(turns) == 1
    assert max(turns) > 1


def test_current_prompts_are_the_recorded_ones(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], finished: Any
) -> None:
    words = fit(tiny_model, "--data.bootstrapping.pairs", "current", schedule="p -> w")
    assert cotune(words, capsys).code == 0
    batches, _ = load_batches(Path("runs/tiny"))
    recorded = json.loads(Path("runs/tiny/traces/step-2/prompts.json").read_text())
    assert {stage: prompt.to_dict() for stage, prompt in batches.maker.prompts.items()} == recorded


def test_the_traces_of_the_step_are_read(finished: Any) -> None:
    batches, _ = load_batches(finished.folder, step=2)
    assert batches.traces == load_traces(finished.folder / "traces" / "step-2", finished.module.program)


def test_a_step_that_collects_in_each_round_shows_each_rounds_own_rows(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], finished: Any
) -> None:
    """They keep the prompts that they were drawn by, and are not those of another run that w takes."""
    others = finished.folder / "traces" / "step-2"
    words = fit(tiny_model, "--data.traces", str(others), "--data.bootstrapping.demo_share", "1", schedule="w -> k")
    assert cotune(words, capsys).code == 0
    program, own = finished.module.program, Path("runs/tiny/traces/step-2")
    assert load_batches(Path("runs/tiny"), step=1)[0].traces == load_traces(others, program)
    for epoch, folder in enumerate([own, own / "round-2"]):
        batches, lm = load_batches(Path("runs/tiny"), epoch=epoch)
        assert batches.traces == load_traces(folder, program)
        shown = [lm.tokenizer.decode(row.ids) for row in trained_rows(batches)]
        assert {text.count("<|im_start|>assistant") for text in shown} == {1}
    assert 'step-2" has no traces of epoch 2' in preview(capsys, "runs/tiny", "--epoch", "2").err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], '"nowhere" is no run: it has no config.yaml. Give the folder of a run'),
        (["RUN", "--step", "1"], "has no traces of step 1; there are some of step 2."),
        (["RUN", "--epoch", "2"], 'step-2" has no traces of epoch 2: the step has epochs 0 to 1.'),
        (["RUN", "--epoch", "-1"], 'step-2" has no traces of epoch -1: the step has epochs 0 to 1.'),
        (["RUN", "--rows", "-1"], "--rows -1 is below 0"),
        (["RUNS"], "is no run: it has no config.yaml. Did you mean one of"),
    ],
)
def test_what_is_not_there_is_said(
    finished: Any, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    there = {"RUN": str(finished.folder), "RUNS": str(finished.folder.parent)}
    said = preview(capsys, *(there.get(word, word) for word in words))
    assert said.code == 2
    assert message in said.err
    assert "Traceback" not in said.err


def test_a_run_without_weight_steps_has_no_pairs(
    finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text((finished.folder / "config.yaml").read_text())
    said = preview(capsys, "run")
    assert said.code == 2
    assert '"run" has no traces' in said.err


@pytest.mark.parametrize("named", [True, False])
def test_traces_of_another_tokenizers_lm_are_trained_on_as_what_they_say(
    finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], named: bool
) -> None:
    """From teacher to student. Traces from before they named their tokenizer are known by their text."""
    traces = finished.folder / "traces" / "step-2"
    if not named:
        kept = load_from_disk(str(traces)).remove_columns(["tokenizer", "base", "format"])
        kept.save_to_disk(str(traces := tmp_path / "old"))
    student = save_tiny_model(tmp_path / "student", backwards=True)
    words = fit(student, "--data.traces", str(traces), "--data.bootstrapping.demo_share", "0", schedule="w")
    done = cotune(words, capsys)
    assert done.code == 0, done.err
    written = load_traces(traces, finished.module.program)
    assert f"{len(written)} of {len(written)} traces are of another tokenizer" in done.out
    said = preview(capsys, "runs/tiny", "--rows", "100")
    assert said.code == 0, said.err
    shown = Counter(text.removesuffix("<|im_end|>") for text in re.findall(r"⟦(.*?)⟧", said.out, re.DOTALL))
    module = finished.module
    stages = module.program.stages
    assert shown == Counter(module.form.write(stages[trace.stage].signature, trace.outputs) for trace in written)


def test_forced_tokens_are_marked_apart() -> None:
    tokenizer = tiny_tokenizer()
    ids = {text: tokenizer(text).input_ids for text in ("ask", "answer: ", "4", " not trained")}
    completion = [*ids["answer: "], *ids["4"], *ids[" not trained"]]
    weights = (1.0,) * 9 + (0.0,) * 12
    row = TrainedRow(None, 0, Pair(ids["ask"], completion, ce=weights), (True,) * 8)  # type: ignore[arg-type]
    lm = SimpleNamespace(tokenizer=tokenizer)
    assert marked(row, lm, colour=False).plain == "ask⟨answer: ⟩⟦4⟧ not trained"  # type: ignore[arg-type]
    assert marked(row, lm, colour=True).plain == "askanswer: 4 not trained"  # type: ignore[arg-type]
