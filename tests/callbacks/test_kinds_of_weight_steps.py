"""Steps d, k and g in a whole run: what is collected, what it costs, and that a run broken off in them goes on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from cotune.callbacks.say_plan import plan, runs_left
from cotune.callbacks.schedule import WeightStep
from cotune.datamodules import load_traces
from cotune.lightning_modules.objectives import DPO, GRPO, KTO, Distil
from lightning.pytorch import Callback, Trainer
from tiny_fit import BreakInTraining, BrokenOffError, Fit, tiny_fit

STEPS = {
    "d": WeightStep(Distil(top_k=5, teacher="average"), rounds=2),
    "k": WeightStep(KTO(runs=2), rounds=1),
    "g": WeightStep(GRPO(runs=2, kl=0.1), rounds=2),
    "o": WeightStep(DPO(runs=2), rounds=1),
}


class LastBatches(Callback):
    """The last batch of training by each objective, counted over the run from 0."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.of[type(pl_module.objective).__name__] = trainer.global_step


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    return tiny_fit(tiny_model, tmp_path_factory.mktemp("whole"), "p -> d", steps=STEPS).run()


def test_every_run_teaches_by_the_prompts_from_before(whole: Fit) -> None:
    assert [record["prefix"] for record in whole.alternate.history] == ["vanilla", "p", "p -> d"]
    assert set(whole.alternate.history[-1]["scores"]) == {"initial", "current"}
    folder = Path(whole.trainer.default_root_dir) / "traces" / "step-2"
    first, second = (load_traces(at, whole.module.program) for at in (folder, folder / "round-2"))
    assert len(first) == len(whole.data.splits.train)
    assert {trace.score for trace in first} == {0.0, 1.0}
    assert {len(ids) for trace in first for ids in trace.candidates} == {5}
    assert first != second  # by the weights as they then were


def test_a_run_broken_off_inside_a_step_goes_on_as_if_nothing_had_happened(
    whole: Fit, tiny_model: Path, tmp_path: Path
) -> None:
    last_batch = whole.trainer.global_step - 1  # in the second round, which the average of the first teaches
    first = tiny_fit(tiny_model, tmp_path, "p -> d", steps=STEPS, callbacks=[BreakInTraining(last_batch)])
    with pytest.raises(BrokenOffError):
        first.run()
    assert tiny_fit(tiny_model, tmp_path, "p -> d", steps=STEPS).run(first.last).outcome == whole.outcome


def test_fresh_weights_are_refused_where_a_step_compares_itself_with_those_before_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    for letter in "kg":
        with pytest.raises(ValueError, match=f'weights is "fresh", but step {letter} of "w -> {letter}"'):
            tiny_fit(tiny_model, tmp_path, f"w -> {letter}", steps=STEPS, weights="fresh").run()


def test_so_does_one_of_preferences_and_policy_gradient_broken_off_in_each(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = LastBatches()
    whole = tiny_fit(tiny_model, tmp_path / "whole", "k -> o -> g", steps=STEPS, callbacks=[last]).run()
    said = capsys.readouterr().out
    assert re.search(r"traces: .* solved in 24 runs.*; \d+ good and \d+ bad calls", said)
    assert re.search(r"\d+ pairs of \d+ examples", said)
    assert len(re.findall(r"\d+ of 12 examples are left out, as all their runs have the same score", said)) == 2
    assert "nats on" in said
    assert "above 1e-4" not in said
    assert list(last.of) == ["KTO", "DPO", "GRPO"]
    checkpoint = None
    for batch in last.of.values():
        broken = tiny_fit(tiny_model, tmp_path, "k -> o -> g", steps=STEPS, callbacks=[BreakInTraining(batch)])
        with pytest.raises(BrokenOffError):
            broken.run(checkpoint)
        checkpoint = broken.last
    assert tiny_fit(tiny_model, tmp_path, "k -> o -> g", steps=STEPS).run(checkpoint).outcome == whole.outcome


def test_where_all_runs_score_alike_a_policy_gradient_has_nothing_to_learn_from(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = tiny_fit(tiny_model, tmp_path, "g", steps=STEPS, metric=lambda example, prediction: 1.0).run()
    assert fit.trainer.global_step == 0
    assert fit.alternate.finished
    said = (
        "nothing to learn from (12 of 12 examples are left out, as all their runs have the same score), so it ends here"
    )
    assert said in capsys.readouterr().out


def test_the_plan_knows_what_a_round_costs(whole: Fit) -> None:
    (said,) = (line for line in plan("tiny", whole.module, whole.data, whole.alternate) if "schedule" in line)
    assert "d: 2 rounds on 1 run per example" in said
    low, high = runs_left(whole.alternate, whole.data, 1)
    made = whole.alternate.history[-1]["lm_calls"]
    assert low == high == 2 * 12 + 4 * 10 + 4
    assert made <= high


def test_without_a_prompt_step_before_it_it_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'schedule "d -> p": step d distils the prompts that p found.* "p -> d -> p"'):
        tiny_fit(tiny_model, tmp_path, "d -> p").run()


def test_plain_prompts_have_nothing_to_teach(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = tiny_fit(tiny_model, tmp_path, "p -> d", metric=lambda example, prediction: 0.0)  # p finds nothing
    before: Any = fit.run().alternate.history[1]
    assert fit.trainer.global_step == 0
    assert fit.alternate.history[2]["prompts"] == before["prompts"]
    assert "the prompts are still the program's own, so there is nothing to distil" in capsys.readouterr().out
