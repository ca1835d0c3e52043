"""alternate.steps: letters of the schedule with settings of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import fit
from cotune.callbacks.schedule import WeightStep, parse_schedule, weight_steps
from cotune.reporting.closing_table import read_history
from lightning.pytorch import Callback
from tiny_fit import BreakInTraining, BrokenOffError, tiny_fit

from cotune.__main__ import main


class Rates(Callback):
    """The largest learning rate of each epoch, by the number of boundaries reached."""

    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        (alternate,) = (c for c in trainer.callbacks if type(c).__name__ == "Alternate")
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.seen[alternate.state.boundaries] = max(self.seen.get(alternate.state.boundaries, 0.0), rate)


def test_a_letter_has_its_own_rate_and_epochs(tiny_model: Path, tmp_path: Path) -> None:
    steps = {"r": WeightStep(lr=1e-3, epochs=1)}
    run = tiny_fit(tiny_model, tmp_path, "w -> r", steps=steps, callbacks=[rates := Rates()]).run()
    assert [record["prefix"] for record in run.alternate.history] == ["vanilla", "w", "w -> r"]
    assert run.trainer.current_epoch == 2 + 1
    assert rates.seen[1] == pytest.approx(2e-2)
    assert rates.seen[2] == pytest.approx(1e-3)


def test_rounds_collect_with_the_weights_as_they_then_are(tiny_model: Path, tmp_path: Path) -> None:
    steps = {"r": WeightStep(rounds=2)}
    run = tiny_fit(tiny_model, tmp_path / "whole", "r", steps=steps).run()
    assert run.alternate.finished
    assert (tmp_path / "whole" / "traces" / "step-1" / "round-2" / "prompts.json").is_file()
    collecting = {adapter for requests, adapter in run.lm.seen if len(requests) and requests[0].seed is not None}
    assert len(collecting) >= 2
    for step in range(1, run.trainer.global_step):
        first = tiny_fit(tiny_model, tmp_path / str(step), "r", steps=steps, callbacks=[BreakInTraining(step)])
        with pytest.raises(BrokenOffError):
            first.run()
        assert tiny_fit(tiny_model, tmp_path / str(step), "r", steps=steps).run(first.last).outcome == run.outcome


def test_the_settings_of_w_may_be_given_as_well() -> None:
    assert weight_steps({"w": WeightStep(lr=1e-4)}, epochs=3)["w"] == WeightStep(lr=1e-4, epochs=3)
    assert parse_schedule("P -> R", ("w", "r")) == ("p", "r")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"p": {}}, '"p" is the prompt step, which alternate.search sets'),
        ({"two words": {}}, '"two words" is not a letter of a schedule'),
        ({"d": {"epochs": 0}}, "epochs 0 of a weight step is below 1"),
        ({"d": {"rounds": 2, "epochs": 2}}, "epochs 2 and rounds 2; give one"),
        ({"d": {"lr": 0.0}}, "lr 0 of a weight step must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, dict[str, Any]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        weight_steps({letter: WeightStep(**own) for letter, own in settings.items()}, epochs=5)


def test_letters_stand_in_a_config(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    steps = '{"r": {"epochs": 1, "lr": 0.001}}'
    assert main(fit(tiny_model, f"--alternate.steps={steps}", "--alternate.epochs=1", schedule="w -> r")) == 0
    records, _ = read_history(Path("runs/tiny/history.jsonl"))
    assert [record["prefix"] for record in records] == ["vanilla", "w", "w -> r"]
