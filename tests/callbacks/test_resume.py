"""A run that is broken off and continued gives, bit by bit, what it would have given in one go."""

from __future__ import annotations

import csv
import errno
import os
import signal
from functools import cache
from pathlib import Path
from shutil import copy, copytree
from typing import Any

import pytest
import torch
from cotune.callbacks import Alternate
from cotune.callbacks.checkpoint import CheckpointError, Checkpoints
from cotune.callbacks.loggers.log_program import LogProgram
from cotune.callbacks.loggers.metrics_file import MetricsFile
from cotune.callbacks.stop_signals import StopOnSignal, Stopped, StopSignals
from cotune.datamodules import Sizes
from cotune.lightning_modules import LoRA
from cotune.storage.durable import NotWrittenError, file_sum, record_sums
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_fit import BreakInTraining, BreakInValidation, BrokenOffError, Fit, tiny_fit

SETTINGS: dict[str, dict[str, Any]] = {
    "p -> w -> p": {},
    "w -> p -> w, continue": {"schedule": "w -> p -> w", "weights": "continue"},
    "w -> p -> w, fresh": {"schedule": "w -> p -> w", "weights": "fresh"},
    "p -> w -> w, fresh, last, dropout": {
        "schedule": "p -> w -> w",
        "weights": "fresh",
        "keep": "last",
        "lora": LoRA(r=4, alpha=8, dropout=0.2),
    },
    "w -> p, averaged, tested": {
        "schedule": "w -> p",
        "epochs": 3,
        "average_last": 2,
        "keep_best_epoch": False,
        "test_prefixes": True,
    },
}


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def run(name: str) -> Fit:
        return tiny_fit(tiny_model, tmp_path_factory.mktemp("whole"), **SETTINGS[name]).run()

    return run


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        # In the first prompt step; while collecting, or scoring an epoch; in the last prompt step.
        ("p -> w -> p", [0.1, 0.5, 0.9]),
        ("w -> p -> w, continue", [0.3, 0.6, 0.95]),
        ("w -> p -> w, fresh", [0.7, 0.9]),
        ("p -> w -> w, fresh, last, dropout", [0.6, 0.97]),
        ("w -> p, averaged, tested", [0.2, 0.9]),
    ],
)
def test_a_run_broken_off_while_generating_goes_on_as_if_nothing_had_happened(
    name: str, shares: list[float], tiny_model: Path, tmp_path: Path, uninterrupted: Any
) -> None:
    whole = uninterrupted(name)
    checkpoint, before = None, 0
    for share in shares:
        part = tiny_fit(tiny_model, tmp_path, **SETTINGS[name])
        part.lm.breaks_at = int(share * len(whole.lm.seen)) - before
        with pytest.raises(BrokenOffError):
            part.run(checkpoint)
        checkpoint, before = part.last, before + len(part.lm.seen)
    assert tiny_fit(tiny_model, tmp_path, **SETTINGS[name]).run(checkpoint).outcome == whole.outcome


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("p -> w -> p", [0.0, 0.7]),
        ("w -> p -> w, continue", [0.6]),
        ("w -> p -> w, fresh", [0.6, 0.9]),
        ("p -> w -> w, fresh, last, dropout", [0.3, 0.6]),
        ("w -> p, averaged, tested", [0.95]),  # in the last of the epochs that are averaged
    ],
)
def test_a_run_broken_off_while_training_goes_on_as_if_nothing_had_happened(
    name: str, shares: list[float], tiny_model: Path, tmp_path: Path, uninterrupted: Any
) -> None:
    whole = uninterrupted(name)
    checkpoint = None
    for share in shares:
        breaks = BreakInTraining(int(share * whole.trainer.global_step))
        part = tiny_fit(tiny_model, tmp_path, callbacks=[breaks], **SETTINGS[name])
        with pytest.raises(BrokenOffError):
            part.run(checkpoint)
        checkpoint = part.last
    assert tiny_fit(tiny_model, tmp_path, **SETTINGS[name]).run(checkpoint).outcome == whole.outcome


@pytest.fixture(scope="module")
def nearly_done(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, uninterrupted: Any) -> Path:
    """The folder of a run that was broken off while its last boundary was scored."""
    first = tiny_fit(tiny_model, tmp_path_factory.mktemp("nearly"))
    first.lm.breaks_at = len(uninterrupted("p -> w -> p").lm.seen) - 1
    with pytest.raises(BrokenOffError):
        first.run()
    return first.last.parent.parent


def test_a_resumed_run_that_had_no_training_left_saves_its_end(
    tiny_model: Path, tmp_path: Path, nearly_done: Path, uninterrupted: Any
) -> None:
    copytree(nearly_done, tmp_path, dirs_exist_ok=True)
    second = tiny_fit(tiny_model, tmp_path).run(tmp_path / "checkpoints" / "last.ckpt")
    again = tiny_fit(tiny_model, tmp_path).run(second.last)
    assert again.lm.seen == []
    assert again.outcome == uninterrupted("p -> w -> p").outcome


def test_a_finished_run_that_is_resumed_does_nothing(tiny_model: Path, tmp_path: Path, uninterrupted: Any) -> None:
    whole = uninterrupted("p -> w -> p")
    again = tiny_fit(tiny_model, tmp_path).run(whole.last)
    assert again.lm.seen == []
    assert again.outcome == whole.outcome


def test_ctrl_c_leaves_a_run_that_resumes(tiny_model: Path, tmp_path: Path, uninterrupted: Any) -> None:
    first = tiny_fit(tiny_model, tmp_path, callbacks=[BreakInTraining(5, KeyboardInterrupt)])
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):  # Lightning turns a KeyboardInterrupt into it
            first.run()
    finally:
        signal.signal(signal.SIGINT, handler)
    second = tiny_fit(tiny_model, tmp_path).run(first.last)
    assert second.outcome == uninterrupted("p -> w -> p").outcome


MORE = Sizes(train=24, dev=6, val=10, test=4)
INSIDE: dict[str, dict[str, Any]] = {
    "every step": {"save_every": 1},
    "every step, dropout": {"save_every": 1, "lora": LoRA(r=4, alpha=8, dropout=0.2)},
    "every second step": {"save_every": 2},
    "two batches a step": {"save_every": 1, "trainer": {"accumulate_grad_batches": 2}},
    "auto": {},
}


class CountBatches(Callback):
    """Which batches were trained on, by step of the schedule, epoch and place; all processes of a run together."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int, int]] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        (alternate,) = [c for c in trainer.callbacks if isinstance(c, Alternate)]  # type: ignore[attr-defined]
        self.batches.append((alternate.position, alternate.state.rounds, args[-1]))


def inside(model: Path, folder: Path, name: str, *more: Callback, resumes: bool = False) -> Fit:
    """A fit whose epochs have several batches, and which logs."""
    settings = dict(INSIDE[name])
    trainer = {"logger": MetricsFile(folder, keep=resumes), **settings.pop("trainer", {})}
    return tiny_fit(model, folder, sizes=MORE, trainer=trainer, callbacks=[LogProgram(), *more], **settings)


@pytest.fixture(scope="module")
def whole_inside(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def run(name: str) -> tuple[Fit, list[tuple[int, int, int]]]:
        count = CountBatches()
        return inside(tiny_model, tmp_path_factory.mktemp("inside"), name, count).run(), count.batches

    return run


@pytest.mark.parametrize(
    ("name", "breaks"),
    [
        ("every step", [1, 3, 4, 5, 7]),
        ("every step, dropout", [2, 7]),
        ("every second step", [4]),
        ("two batches a step", [1, 3]),
        ("auto", [5]),
    ],
)
def test_a_run_broken_off_inside_an_epoch_goes_on_there(
    name: str, breaks: list[int], tiny_model: Path, tmp_path: Path, whole_inside: Any
) -> None:
    whole, expected = whole_inside(name)
    assert len({batch for _, _, batch in expected}) >= 4, "epochs have several batches"
    count, checkpoint = CountBatches(), None
    for step in breaks:
        part = inside(tiny_model, tmp_path, name, BreakInTraining(step), count, resumes=checkpoint is not None)
        with pytest.raises(BrokenOffError):
            part.run(checkpoint)
        checkpoint = part.last
    last = inside(tiny_model, tmp_path, name, count, resumes=True).run(checkpoint)
    assert last.outcome == whole.outcome
    assert last.lm.usage.calls == whole.lm.usage.calls
    assert metrics(tmp_path) == metrics(Path(whole.trainer.default_root_dir))
    assert set(count.batches) == set(expected)
    redone = len(count.batches) - len(expected)
    most = {"every step": 0, "every step, dropout": 0, "every second step": 1, "two batches a step": 1}.get(name, 99)
    assert redone <= most * len(breaks), "the batch at which it broke had not begun"


@pytest.mark.parametrize(
    ("name", "breaks"),
    [
        ("every step, dropout", [0, 0, 1]),  # twice in the same validation
        ("two batches a step", [1]),
    ],
)
def test_a_run_broken_off_in_the_validation_behind_an_epoch_repeats_the_last_step_only(
    name: str, breaks: list[int], tiny_model: Path, tmp_path: Path, whole_inside: Any
) -> None:
    # Behind an epoch's last batch nothing can be saved: Lightning would resume past the validation.
    whole, expected = whole_inside(name)
    count, checkpoint = CountBatches(), None
    for number in breaks:
        part = inside(tiny_model, tmp_path, name, BreakInValidation(number), count, resumes=checkpoint is not None)
        with pytest.raises(BrokenOffError):
            part.run(checkpoint)
        checkpoint = part.last
    last = inside(tiny_model, tmp_path, name, count, resumes=True).run(checkpoint)
    assert last.outcome == whole.outcome
    assert last.lm.usage.calls == whole.lm.usage.calls
    assert metrics(tmp_path) == metrics(Path(whole.trainer.default_root_dir))
    again = [batch for batch in expected if count.batches.count(batch) > 1]
    last_steps = {max(b for b in expected if b[:2] == batch[:2]) for batch in again}
    assert len(count.batches) - len(expected) <= len(breaks) * (2 if "two batches" in name else 1)
    assert last_steps <= set(again) or not again


def test_a_run_broken_off_at_an_epochs_first_batch_does_not_validate_the_last_one_again(
    tiny_model: Path, tmp_path: Path, whole_inside: Any
) -> None:
    whole, expected = whole_inside("every step")
    of_an_epoch = len(expected) // 2
    first = inside(tiny_model, tmp_path, "every step", BreakInTraining(of_an_epoch))
    with pytest.raises(BrokenOffError):
        first.run()
    last = inside(tiny_model, tmp_path, "every step", resumes=True).run(first.last)
    assert len(first.lm.seen) + len(last.lm.seen) == len(whole.lm.seen)
    assert last.outcome == whole.outcome


class StopAt(Callback):
    """Asks the process to end while these optimiser steps are under way."""

    def __init__(self, signals: StopSignals, *steps: int) -> None:
        self.signals, self.steps = signals, steps

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step in self.steps:
            self.signals.requested = signal.SIGTERM


@pytest.mark.parametrize("name", ["every step", "two batches a step", "auto"])
def test_a_run_that_is_asked_to_end_in_training_writes_each_row_of_metrics_once(
    name: str, tiny_model: Path, tmp_path: Path, whole_inside: Any
) -> None:
    whole, expected = whole_inside(name)
    a_step = 2 if name == "two batches a step" else 1
    of_an_epoch = -(-len([batch for batch in expected if batch[1] == 0]) // a_step)
    count, checkpoint, ends = CountBatches(), None, [0, 1, of_an_epoch - 1, of_an_epoch, whole.trainer.global_step - 1]
    for step in ends:  # in an epoch's first steps, in its last, in the next one's first, in the last of all
        signals = StopSignals()
        stops = [StopOnSignal(signals), StopAt(signals, step), count]
        part = inside(tiny_model, tmp_path, name, *stops, resumes=checkpoint is not None)
        with pytest.raises(Stopped):
            part.run(checkpoint)
        checkpoint = part.last
    last = inside(tiny_model, tmp_path, name, count, resumes=True).run(checkpoint)
    assert last.outcome == whole.outcome
    assert metrics(tmp_path) == metrics(Path(whole.trainer.default_root_dir))
    redone = len(count.batches) - len(expected)
    assert name == "auto" or redone <= 2 * a_step, "only an epoch's last step, which cannot be saved, is done again"


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_only_the_runs_own_checkpoints_are_continued_from(tiny_model: Path, tmp_path: Path, uninterrupted: Any) -> None:
    """ModelCheckpoint saves before the epoch counts: it would be trained once more."""
    others = ModelCheckpoint(tmp_path / "others", monitor="val/score", save_top_k=-1)
    first = tiny_fit(
        tiny_model, tmp_path, callbacks=[others, BreakInTraining(5)], trainer={"enable_checkpointing": True}
    )
    with pytest.raises(BrokenOffError):
        first.run()
    (theirs, *_) = sorted((tmp_path / "others").iterdir())
    with pytest.raises(
        CheckpointError, match=r"epoch=0.* is not one of the run's own .*continue from <run>/checkpoints"
    ):
        tiny_fit(tiny_model, tmp_path).run(theirs)
    moved = tmp_path / "moved" / "mine.ckpt"
    moved.parent.mkdir()
    copy(first.last, moved)
    assert tiny_fit(tiny_model, tmp_path).run(moved).outcome == uninterrupted("p -> w -> p").outcome


def test_a_checkpoint_of_an_older_version_which_has_no_mark_is_continued_from(
    tiny_model: Path, tmp_path: Path, nearly_done: Path, uninterrupted: Any
) -> None:
    copytree(nearly_done, tmp_path, dirs_exist_ok=True)
    last = tmp_path / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)
    del saved["cotune"]
    torch.save(saved, last)
    with pytest.raises(CheckpointError):
        tiny_fit(tiny_model, tmp_path).run(last)
    record_sums(last.parent, {last.name: file_sum(last)})
    assert tiny_fit(tiny_model, tmp_path).run(last).outcome == uninterrupted("p -> w -> p").outcome


def test_the_time_of_a_run_counts_that_of_testing_its_prefixes(uninterrupted: Any) -> None:
    tested = uninterrupted("w -> p, averaged, tested").alternate
    seconds = sum(record["seconds"] + record["test_cost"]["seconds"] for record in tested.history)
    assert tested.work.seconds_before == pytest.approx(seconds)


def metrics(folder: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv, less what the clock says."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if v and "seconds" not in k and "cached" not in k} for row in rows]


def test_a_kill_before_the_boundary_of_a_resumed_run_repeats_no_prompt_step(tiny_model: Path, tmp_path: Path) -> None:
    whole = tiny_fit(tiny_model, tmp_path / "whole", "w -> p -> p").run()
    after_first_search = len(whole.lm.seen) - 3
    checkpoint, before = None, 0
    for at in (after_first_search - 8, after_first_search):
        part = tiny_fit(tiny_model, tmp_path, "w -> p -> p")
        part.lm.breaks_at = at - before
        with pytest.raises(BrokenOffError):
            part.run(checkpoint)
        checkpoint, before = part.last, before + len(part.lm.seen)
    last = tiny_fit(tiny_model, tmp_path, "w -> p -> p")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["optimizer_states"][0]["state"], "the optimiser of the weight step is not lost"
    assert last.run(checkpoint).outcome == whole.outcome


def test_a_checkpoint_cut_short_is_seen_and_the_one_before_it_taken(
    tiny_model: Path, tmp_path: Path, nearly_done: Path, uninterrupted: Any
) -> None:
    copytree(nearly_done, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints"
    with (folder / "last.ckpt").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff")
    newest, wrong = Checkpoints(folder).newest()
    assert newest == folder / "previous.ckpt"
    assert wrong[0].startswith(f"{folder / 'last.ckpt'} is not what was written")
    assert tiny_fit(tiny_model, tmp_path).run(newest).outcome == uninterrupted("p -> w -> p").outcome
    assert Checkpoints(folder).newest() == (folder / "last.ckpt", [])
    for name in ("last.ckpt", "previous.ckpt"):
        (folder / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint is intact: .*last.ckpt .*previous.ckpt .*--fresh"):
        Checkpoints(folder).newest()


def test_a_checkpoint_that_a_kill_left_beside_its_place_is_found(
    tiny_model: Path, tmp_path: Path, nearly_done: Path, uninterrupted: Any
) -> None:
    copytree(nearly_done, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints"
    (folder / "last.ckpt").rename(folder / "last.ckpt.partial")  # listed, and the two renamings still to come
    (folder / "previous.ckpt").rename(folder / "last.ckpt")
    newest, wrong = Checkpoints(folder).newest()
    assert (newest, wrong) == (folder / "last.ckpt.partial", [])
    assert tiny_fit(tiny_model, tmp_path).run(newest).outcome == uninterrupted("p -> w -> p").outcome
    assert Checkpoints(folder).newest() == (folder / "last.ckpt", [])


def test_a_disk_that_cannot_be_written_leaves_the_last_checkpoint(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Any
) -> None:
    first = tiny_fit(tiny_model, tmp_path)

    def full(source: Any, target: Any) -> None:
        if str(target).endswith("last.ckpt") and first.alternate.position == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(
            NotWrittenError, match=r"last.ckpt could not be written: No space left on device\. What it held"
        ):
            first.run()
    newest, _ = Checkpoints(first.last.parent).newest()
    assert newest is not None
    assert tiny_fit(tiny_model, tmp_path).run(newest).outcome == uninterrupted("p -> w -> p").outcome


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"schedule": "p -> w"}, "alternate.schedule p -> w -> p, but this run has p -> w. Set it back"),
        ({"epochs": 3}, "alternate.epochs 2, but this run has 3. Set it back to resume, or start a new run"),
    ],
)
def test_a_changed_schedule_is_refused(changed: dict[str, Any], said: str, tiny_model: Path, tmp_path: Path) -> None:
    first = tiny_fit(tiny_model, tmp_path)
    first.lm.breaks_at = 3
    with pytest.raises(BrokenOffError):
        first.run()
    with pytest.raises(ValueError, match=said):
        tiny_fit(tiny_model, tmp_path, **changed).run(first.last)


def test_a_kill_before_the_gate_has_decided_changes_no_later_step(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gated(folder: Path) -> Fit:
        return tiny_fit(tiny_model, folder, "w -> w", metric=lambda example, prediction: 1.0, gate=True)

    broken = gated(tmp_path / "broken")
    score = broken.alternate.work._score

    def breaks(module: Any, examples: Any, what: str, prompts: Any = None) -> Any:
        if what == "weights as before":
            raise BrokenOffError
        return score(module, examples, what, prompts)

    monkeypatch.setattr(broken.alternate.work, "_score", breaks)
    with pytest.raises(BrokenOffError):
        broken.run()
    trained = Adam()
    resumed = gated(tmp_path / "broken")
    resumed.trainer.callbacks.append(trained)  # type: ignore[attr-defined]
    whole = gated(tmp_path / "whole").run()
    assert resumed.run(broken.last).outcome == whole.outcome
    assert trained.remembered[0] == 0  # nothing of the weights that were undone
    assert trained.remembered[-1] > 0


class Adam(Callback):
    """How many parameters the optimiser remembers something of, before each batch."""

    def __init__(self) -> None:
        self.remembered: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.remembered.append(len(trainer.optimizers[0].state))
