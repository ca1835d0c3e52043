"""A run that is broken off and continued gives, bit by bit, what it would have given in one go."""

from __future__ import annotations

import signal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cotune.lightning_modules import LoRA
from tiny_fit import BreakInTraining, BrokenOffError, Fit, tiny_fit

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
        ("p -> w -> p", [0.1]),  # in the first prompt step
        ("p -> w -> p", [0.5]),  # while collecting, or scoring an epoch
        ("p -> w -> p", [0.9]),  # in the last prompt step
        ("w -> p -> w, continue", [0.3, 0.6]),  # twice
        ("w -> p -> w, continue", [0.95]),
        ("w -> p -> w, fresh", [0.7, 0.9]),
        ("p -> w -> w, fresh, last, dropout", [0.6]),
        ("p -> w -> w, fresh, last, dropout", [0.97]),
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
    ("name", "share"),
    [
        ("p -> w -> p", 0.0),
        ("p -> w -> p", 0.7),
        ("w -> p -> w, continue", 0.6),
        ("w -> p -> w, fresh", 0.6),
        ("w -> p -> w, fresh", 0.9),
        ("p -> w -> w, fresh, last, dropout", 0.3),
        ("p -> w -> w, fresh, last, dropout", 0.6),
    ],
)
def test_a_run_broken_off_while_training_goes_on_as_if_nothing_had_happened(
    name: str, share: float, tiny_model: Path, tmp_path: Path, uninterrupted: Any
) -> None:
    whole = uninterrupted(name)
    batch = int(share * whole.trainer.global_step)
    first = tiny_fit(tiny_model, tmp_path, callbacks=[BreakInTraining(batch)], **SETTINGS[name])
    with pytest.raises(BrokenOffError):
        first.run()
    second = tiny_fit(tiny_model, tmp_path, **SETTINGS[name]).run(first.last)
    assert second.outcome == whole.outcome


def test_a_resumed_run_that_had_no_training_left_saves_its_end(tiny_model: Path, tmp_path: Path) -> None:
    first = tiny_fit(tiny_model, tmp_path)
    whole = tiny_fit(tiny_model, tmp_path / "whole").run()
    first.lm.breaks_at = len(whole.lm.seen) - 1
    with pytest.raises(BrokenOffError):
        first.run()
    second = tiny_fit(tiny_model, tmp_path).run(first.last)
    again = tiny_fit(tiny_model, tmp_path).run(second.last)
    assert again.lm.seen == []
    assert again.outcome == whole.outcome


def test_a_finished_run_that_is_resumed_does_nothing(tiny_model: Path, tmp_path: Path) -> None:
    whole = tiny_fit(tiny_model, tmp_path).run()
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


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"schedule": "p -> w"}, "alternate.schedule p -> w -> p, this run has p -> w. Continue with the same"),
        ({"epochs": 3}, "alternate.epochs 2, this run has 3. Continue with the same, or start a new run"),
    ],
)
def test_a_changed_schedule_is_refused(changed: dict[str, Any], said: str, tiny_model: Path, tmp_path: Path) -> None:
    first = tiny_fit(tiny_model, tmp_path)
    first.lm.breaks_at = 3
    with pytest.raises(BrokenOffError):
        first.run()
    with pytest.raises(ValueError, match=said):
        tiny_fit(tiny_model, tmp_path, **changed).run(first.last)
