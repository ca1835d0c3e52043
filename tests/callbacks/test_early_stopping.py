"""EarlyStopping ends a weight step, and not the run; each weight step begins with its counters as new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from tiny_fit import BreakInTraining, BreakInValidation, BrokenOffError, Fit, tiny_fit


def stopping_fit(
    model: Path, folder: Path, *more: Callback, at_epoch_end: bool = True, first: bool = False, **changed: Any
) -> Fit:
    """Two weight steps of up to five epochs whose val score never moves: two epochs each, with a patience of one."""
    early = EarlyStopping("val/score", mode="max", patience=1, check_on_train_epoch_end=at_epoch_end)
    options: dict[str, Any] = {"epochs": 5, "metric": lambda *_: 1.0, "save_every": 1, **changed}
    fit = tiny_fit(model, folder, "w -> p -> w", callbacks=[early, *more], **options)
    if first:
        fit.trainer.callbacks.remove(early)
        fit.trainer.callbacks.insert(0, early)
    return fit


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    return stopping_fit(tiny_model, tmp_path_factory.mktemp("whole")).run()


@pytest.mark.parametrize(("first", "at_epoch_end"), [(False, True), (True, True), (False, False), (True, False)])
def test_every_weight_step_is_stopped_and_the_schedule_goes_on(
    first: bool, at_epoch_end: bool, tiny_model: Path, tmp_path: Path, whole: Fit
) -> None:
    other = first or not at_epoch_end
    fit = stopping_fit(tiny_model, tmp_path, at_epoch_end=at_epoch_end, first=first).run() if other else whole
    assert fit.alternate.finished
    assert [record["prefix"] for record in fit.alternate.history] == ["vanilla", "w", "w -> p", "w -> p -> w"]
    assert fit.trainer.current_epoch == 4, "two epochs in each step; old counters would end the second after one"


def test_an_average_is_of_the_last_epochs_that_there_were(tiny_model: Path, tmp_path: Path) -> None:
    fit = stopping_fit(tiny_model, tmp_path, average_last=2, keep_best_epoch=False).run()
    for record in (fit.alternate.history[1], fit.alternate.history[3]):
        assert (record["epoch"], record["averaged"]) == (2, 2)


def test_kills_in_between_change_nothing(tiny_model: Path, tmp_path: Path, whole: Fit) -> None:
    checkpoint = None
    for breaks in (
        BreakInTraining(1),
        BreakInValidation(1),  # the epoch that ends the first step
        BreakInValidation(2),  # the first of the second step
        BreakInValidation(3),
    ):
        part = stopping_fit(tiny_model, tmp_path, breaks)
        with pytest.raises(BrokenOffError):
            part.run(checkpoint)
        checkpoint = part.last
    rest = stopping_fit(tiny_model, tmp_path).run(checkpoint)
    assert rest.outcome == whole.outcome
    assert rest.trainer.current_epoch == whole.trainer.current_epoch
    assert rest.trainer.global_step == whole.trainer.global_step


def test_kills_while_a_stopped_step_is_scored_change_nothing(tiny_model: Path, tmp_path: Path, whole: Fit) -> None:
    checkpoint, before = None, 0
    for share in (0.45, 0.6, 0.97):
        part = stopping_fit(tiny_model, tmp_path)
        part.lm.breaks_at = int(share * len(whole.lm.seen)) - before
        with pytest.raises(BrokenOffError):
            part.run(checkpoint)
        checkpoint, before = part.last, before + len(part.lm.seen)
    assert stopping_fit(tiny_model, tmp_path).run(checkpoint).outcome == whole.outcome
