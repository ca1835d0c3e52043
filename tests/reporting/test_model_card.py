"""What the card of an export says of prompts and rates."""

from __future__ import annotations

from typing import Any

import pytest
from cotune.reporting.model_card import Card

CALIBRATED = {"predict": {"instruction": "Say.", "demos": [], "calibration": {"answer": {"yes": -1.5, "no": 1.5}}}}


def card(best: str, prompts: dict[str, Any], rates: dict[str, str]) -> str:
    described = {
        "base_model": "tiny",
        "program": "Predict",
        "stages": {"predict": {"inputs": ["question"], "outputs": ["answer"]}},
        "model": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.0, "weight_decay": 0.01}}},
    }
    adapter = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    summary = {"scores": {"vanilla": 0.25, best: 0.5}, "best": best, "test_score": None, "learning_rates": rates}
    return Card("run", described, adapter, prompts, summary).text()


def test_the_rate_is_the_one_that_fitted_the_lm_and_not_the_zero_that_asks_for_it() -> None:
    text = card("p -> w", CALIBRATED, {"w": "5.0e-04 (by the LM's size, 135M parameters)"})
    assert "| learning rate | w: 5.0e-04 (by the LM's size, 135M parameters) |" in text
    assert "| optimiser | AdamW, weight_decay 0.01 |" in text


@pytest.mark.parametrize(("prompts", "said"), [(CALIBRATED, True), ({"predict": {"instruction": "Say."}}, False)])
def test_a_calibration_is_shown_with_where_it_does_not_hold(prompts: dict[str, Any], said: bool) -> None:
    text = card("p", prompts, {})
    assert ("nats on answer: yes -1.50, no +1.50" in text) is said
    assert ("Other libraries and servers do not" in text) is said


@pytest.mark.parametrize(("best", "said"), [("p", True), ("p -> p", True), ("p -> w", False), ("d", False)])
def test_a_prefix_without_a_weight_step_is_not_sold_as_tuned_weights(best: str, said: bool) -> None:
    assert (f"The exported prefix, `{best}`, has no weight step" in card(best, CALIBRATED, {})) is said
