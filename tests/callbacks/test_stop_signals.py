"""Claims about SIGTERM and Ctrl-C: the first waits for the end of a unit of work, the second does not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from cotune.callbacks.stop_signals import OutOfTime, StopOnSignal, Stopped, StopSignals
from lightning.pytorch import Callback
from tiny_fit import Fit, tiny_fit


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_waits_where_work_is_under_way(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        signals.check()
        signals.patient = True
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped) as stopped:
            signals.check()
    assert stopped.value.exit_code == 128 + number
    assert "cotune: stopping after this batch; a second Ctrl-C or signal stops at once." in capfd.readouterr().err
    assert signal.getsignal(number) is before


def test_where_nothing_can_be_lost_the_first_signal_ends_it() -> None:
    with StopSignals(), pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)


def test_the_second_signal_ends_the_process_at_once() -> None:
    child = os.fork()
    if child == 0:
        with StopSignals() as signals:
            signals.patient = True
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGINT


class SignalAt(Callback):
    """Sends the process a signal before a batch of training."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: object, pl_module: object, batch: object, batch_idx: int) -> None:
        if trainer.global_step == self.step:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    return tiny_fit(tiny_model, tmp_path_factory.mktemp("whole")).run()


@pytest.mark.parametrize("step", [2, 3])
def test_a_signal_in_training_saves_after_the_step_and_stops(
    step: int, tiny_model: Path, tmp_path: Path, whole: Fit
) -> None:
    with StopSignals() as signals:
        first = tiny_fit(tiny_model, tmp_path, callbacks=[StopOnSignal(signals), SignalAt(step)])
        with pytest.raises(Stopped):
            first.run()
    assert first.trainer.global_step == step + 1
    assert tiny_fit(tiny_model, tmp_path).run(first.last).outcome == whole.outcome


class SignalInValidation(Callback):
    """Sends the process a signal when the validation behind the second epoch has begun."""

    def on_validation_batch_start(self, trainer: object, *args: object) -> None:
        if trainer.current_epoch == 1:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_in_a_validation_loses_the_step_before_it_and_no_more(tiny_model: Path, tmp_path: Path) -> None:
    options = {"epochs": 3, "save_every": 1}
    whole = tiny_fit(tiny_model, tmp_path / "whole", **options).run()
    with StopSignals() as signals:
        first = tiny_fit(tiny_model, tmp_path, callbacks=[StopOnSignal(signals), SignalInValidation()], **options)
        with pytest.raises(Stopped):
            first.run()
    assert torch.load(first.last, weights_only=True)["global_step"] == first.trainer.global_step - 1
    second = tiny_fit(tiny_model, tmp_path, **options).run(first.last)
    assert second.outcome == whole.outcome
    assert second.lm.usage.calls == whole.lm.usage.calls


def test_time_that_is_over_ends_a_fit_like_a_signal_and_counts_earlier_starts(
    tiny_model: Path, tmp_path: Path, whole: Fit
) -> None:
    first = tiny_fit(tiny_model, tmp_path, callbacks=[StopOnSignal(StopSignals(max_seconds=0.0))], save_every=1)
    with pytest.raises(OutOfTime) as stopped:
        first.run()
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    part = tiny_fit(tiny_model, tmp_path, callbacks=[EndsTimeAt(3)], save_every=1)
    with pytest.raises(OutOfTime):
        part.run()
    assert torch.load(part.last, weights_only=True)["global_step"] == 3
    again = StopSignals(max_seconds=1e-9)
    with pytest.raises(OutOfTime):
        tiny_fit(tiny_model, tmp_path, callbacks=[StopOnSignal(again)], save_every=1).run(part.last)
    assert again.seconds_before > 0
    signals = StopSignals(max_seconds=3600.0)
    rest = tiny_fit(tiny_model, tmp_path, callbacks=[StopOnSignal(signals)], save_every=1).run(part.last)
    assert rest.outcome == whole.outcome


class EndsTimeAt(StopOnSignal):
    """Time is over while a step of training is under way."""

    def __init__(self, step: int) -> None:
        super().__init__(StopSignals(max_seconds=3600.0))
        self.step = step

    def on_train_batch_start(self, trainer: object, pl_module: object, batch: object, batch_idx: int) -> None:
        if trainer.global_step == self.step - 1:  # type: ignore[attr-defined]
            self.signals.max_seconds = 0.0
