"""A run that is broken off and continued gives, bit by bit, what it would have given in one go."""

from __future__ import annotations

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


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9, 0.97])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_broken_off_while_generating_goes_on_as_if_nothing_had_happened(
    name: str, share: float, tiny_model: Path, tmp_path: Path, uninterrupted: Any
) -> None:
    whole = uninterrupted(name)
    first = tiny_fit(tiny_model, tmp_path, **SETTINGS[name])
    first.lm.breaks_at = int(share * len(whole.lm.seen))
    with pytest.raises(BrokenOffError):
        first.run()
    second = tiny_fit(tiny_model, tmp_path, **SETTINGS[name]).run(first.last)
    assert second.outcome == whole.outcome


@pytest.mark.parametrize("share", [0.0, 0.4, 0.6, 0.9])
@pytest.mark.parametrize("name", SETTINGS)
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
