"""ProgramModule: the rate's course, checkpoints that hold the adapter alone, and a loss that falls."""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cotune.datamodules import Pair, Splits, TraceDataModule, collate
from cotune.datamodules.splits import Sizes
from cotune.errors import BadValueError
from cotune.lightning_modules import LanguageModel, LearningRate, LoRA, ProgramModule
from cotune.lightning_modules.objectives import GRPO, Rejection
from cotune.programs import Demo, Example, FaultyProgramError, Predict, Prompt, Sampling
from fakes import Loop, doubles
from lightning.pytorch import Callback, Trainer
from tiny import save_tiny_model
from tiny_fit import tiny_fit
from torch.utils.data import DataLoader


class Doubling(TraceDataModule):
    """Four tiny sets, and three fixed batches instead of traces."""

    def __init__(self) -> None:
        super().__init__(sizes=Sizes(1, 0, 2, 1), val_batch_size=1)

    def load(self) -> Splits:
        train, *rest = doubles(1, 2, 3, 4)
        return Splits((train,), (), tuple(rest[:2]), tuple(rest[2:]))

    def train_dataloader(self) -> Any:
        prompt = [1, *range(10, 40)]
        batches = [collate([[Pair([*prompt, n], [60 + n, 2]), Pair([*prompt, n, 9], [70, 71, 2])]]) for n in range(3)]
        return DataLoader(batches, batch_size=None)


def module(tiny_model: Path, *, lr: float = 0.01, **settings: Any) -> ProgramModule:
    lm = LanguageModel(str(tiny_model), device="cpu", lora=LoRA(r=4, alpha=8))
    sampling = Sampling(max_new_tokens=4)
    return ProgramModule(
        Loop(1),
        lm,
        sampling=sampling,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0),
        **settings,
    )


def trainer(folder: Path, **settings: Any) -> Trainer:
    given = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    return Trainer(default_root_dir=folder, num_sanity_val_steps=0, **{**given, "max_epochs": 2, **settings})


# The rate


def test_a_warm_up_as_long_as_the_weight_step_is_said(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = module(tiny_model, learning_rate=LearningRate(warmup=10))
    made.begin_weight_step(steps=20)
    assert not capsys.readouterr().out
    made.begin_weight_step(steps=10)
    assert "warmup is 10 but this weight step has only 10 optimiser steps" in capsys.readouterr().out


def test_the_rate_warms_up_and_then_falls_as_a_cosine() -> None:
    course = LearningRate(warmup=4, decay="cosine")
    factors = [course.factor(step, 24) for step in range(24)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 20)) for i in range(20)])
    assert factors[-1] < 0.01


@pytest.mark.parametrize(("lr", "own", "full"), [(0.0, None, 5e-4), (0.0, 3e-3, 3e-3), (0.01, None, 0.01)])
def test_a_rate_of_0_is_one_that_fits_the_lm_and_the_objective(
    lr: float, own: float | None, full: float, tiny_model: Path
) -> None:
    made = module(tiny_model, lr=lr)
    made.configure_model()
    group = made.configure_optimizers().param_groups[0]
    assert made.rate(Rejection(), own, group) == full
    assert made.rate(GRPO(), own, group) == pytest.approx(full * (0.1 if not (lr or own) else 1.0))
    assert made.lm.size == sum(p.numel() for p in made.parameters() if not p.requires_grad)


def test_a_late_decay_stays_whole_for_two_thirds_and_then_falls_to_zero() -> None:
    course = LearningRate(warmup=2, decay="late")
    factors = [course.factor(step, 14) for step in range(15)]
    assert factors[:2] == [0.5, 1.0]
    assert factors[2:11] == [1.0] * 9
    assert factors[11:] == pytest.approx([0.75, 0.5, 0.25, 0.0])


@pytest.mark.parametrize(("decay", "half"), [("cosine", 0.5), ("linear", 0.5), ("late", 1.0), ("constant", 1.0)])
def test_every_decay_starts_whole_and_never_turns_negative(decay: Any, half: float) -> None:
    course = LearningRate(warmup=0, decay=decay)
    assert course.factor(0, 10) == 1.0
    assert course.factor(5, 10) == pytest.approx(half)
    assert all(0 <= course.factor(step, 10) <= 1 for step in range(30))


def test_a_weight_step_shorter_than_the_warm_up_only_warms_up() -> None:
    assert [LearningRate(warmup=10).factor(step, 3) for step in range(3)] == [0.1, 0.2, 0.3]


def test_the_rate_that_callbacks_read_before_a_step_is_the_one_it_is_taken_with(
    tiny_model: Path, tmp_path: Path
) -> None:
    class Reads(Callback):
        read, taken, begun = [], [], []

        def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
            self.begun.append(trainer.optimizers[0].param_groups[0]["lr"])

        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            self.read.append(trainer.optimizers[0].param_groups[0]["lr"])

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            self.taken.append(float(trainer.callback_metrics["train/lr"]))

    reads = Reads()
    tiny_fit(tiny_model, tmp_path, "w -> w", callbacks=[reads]).run()
    assert len(reads.taken) == 2 * 2 * 3
    assert reads.read == pytest.approx(reads.taken)
    assert reads.begun == reads.read[::3]
    assert reads.read[6] == reads.read[0] == 0.01  # half of the full rate, as the second weight step warms up again


def test_a_negative_warm_up_is_refused() -> None:
    with pytest.raises(BadValueError, match=r"model.learning_rate.warmup -5 is below 0; 0 is no warm-up"):
        LearningRate(warmup=-5)


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (functools.partial(torch.optim.AdamW, lr=-1.0), "model.optimizer cannot be made: Invalid learning rate: -1.0"),
        (functools.partial(torch.optim.AdamW, beta=1), "model.optimizer cannot be made: .*'beta'"),
        (functools.partial(torch.optim.LBFGS, lr=1.0), "LBFGS computes the loss many times in a step"),
    ],
)
def test_an_optimiser_that_cannot_be_is_refused(tiny_model: Path, factory: Any, said: str) -> None:
    made = module(tiny_model)
    made.optimizer = factory
    made.configure_model()
    with pytest.raises(BadValueError, match=said):
        made.configure_optimizers()


def test_each_weight_step_runs_the_course_from_its_start(tiny_model: Path, tmp_path: Path) -> None:
    made = module(tiny_model, lr=0.5, learning_rate=LearningRate(warmup=2, decay="linear"))
    made.configure_model()
    optimizer = made.configure_optimizers()
    made.log = lambda *args, **options: None  # type: ignore[method-assign, assignment]
    made.trainer = SimpleNamespace(optimizers=[optimizer])  # type: ignore[assignment]

    def rates(steps: int) -> list[float]:
        found = []
        made.set_rate()
        for _ in range(steps):
            made.on_before_optimizer_step(optimizer)
            found.append(optimizer.param_groups[0]["lr"])
            made.on_train_batch_end()
        return found

    made.begin_weight_step(steps=4)
    assert rates(4) == [0.25, 0.5, 0.5, 0.25]
    made.begin_weight_step(steps=4)
    assert rates(2) == [0.25, 0.5]
    made.begin_weight_step(steps=4, done=3)
    assert rates(1) == [0.25]


# State


def test_a_state_dict_is_the_adapter_and_nothing_else(tiny_model: Path) -> None:
    made = module(tiny_model)
    made.configure_model()
    state = made.state_dict()
    assert len(state) == 28
    assert all("lora_" in name for name in state)
    assert sum(t.numel() for t in state.values()) < sum(p.numel() for p in made.parameters()) / 3


def test_a_state_that_does_not_fit_is_refused(tiny_model: Path) -> None:
    made = module(tiny_model)
    made.configure_model()
    before, state = made.lm.fingerprint(), made.state_dict()
    state.popitem()
    with pytest.raises(ValueError, match="does not fit: 1 tensors differ"):
        made.load_state_dict(state)
    assert made.lm.fingerprint() == before


def test_only_the_adapter_is_optimised(tiny_model: Path) -> None:
    made = module(tiny_model)
    made.configure_model()
    (group,) = made.configure_optimizers().param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in made.parameters() if p.requires_grad}
    assert group["initial_lr"] == group["lr"] == 0.01


def test_a_checkpoint_brings_back_adapter_prompts_and_place_in_the_weight_step(
    tiny_model: Path, tmp_path: Path
) -> None:
    made = module(tiny_model)
    made.begin_weight_step(steps=6)
    made.prompts = {"double": Prompt("Twice, please.", (Demo({"number": "9"}, {"answer": "18"}, "e"),))}
    run = trainer(tmp_path)
    run.fit(made, datamodule=Doubling())
    run.save_checkpoint(tmp_path / "last.ckpt")
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(stored["state_dict"]) == set(made.lm.adapter_state())

    again = module(tiny_model, seed=1)  # another adapter to begin with, so that loading shows
    again.configure_model()
    assert again.lm.fingerprint() != made.lm.fingerprint()
    found = trainer(tmp_path).validate(again, datamodule=Doubling(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert again.lm.fingerprint() == made.lm.fingerprint()
    assert again.prompts == made.prompts
    assert (again.optimiser_step, again.optimiser_steps) == (6, 6)
    assert found == [{"val/score": 0.0}]


# Training and scoring


def test_training_lowers_the_loss_and_leaves_the_base_alone(tiny_model: Path, tmp_path: Path) -> None:
    made = module(tiny_model, lr=0.02, learning_rate=LearningRate(warmup=0, decay="constant"))
    made.configure_model()
    base = {name: p.detach().clone() for name, p in made.named_parameters() if not p.requires_grad}
    losses: list[float] = []
    step = made.training_step

    def watched(batch: Any, batch_idx: int) -> Any:
        loss = step(batch, batch_idx)
        losses.append(float(loss.detach()))
        return loss

    made.training_step = watched  # type: ignore[method-assign]
    trainer(tmp_path, max_epochs=4).fit(made, datamodule=Doubling())
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert all(torch.equal(p, base[name]) for name, p in made.named_parameters() if not p.requires_grad)


def test_validation_between_epochs_does_not_disturb_training(tiny_model: Path, tmp_path: Path) -> None:
    def tuned(**settings: Any) -> str:
        made = module(tiny_model)
        trainer(tmp_path, **settings).fit(made, datamodule=Doubling())
        assert made.lm.usage.calls == (0 if settings else 4)  # two examples, after each of two epochs
        return made.lm.fingerprint()

    assert tuned() == tuned(limit_val_batches=0)


def test_scores_are_means_over_the_whole_set(tiny_model: Path, tmp_path: Path) -> None:
    made = module(tiny_model)
    data = Doubling()
    data.metric = lambda example, prediction: float(example.id == "2")
    made.program = Unparsed()
    made.prompts = made.program.initial_prompts()
    run = trainer(tmp_path)
    assert run.validate(made, datamodule=data, verbose=False) == [{"val/score": 0.5}]
    assert [rollout.example.id for rollout in made.evaluated] == ["2", "3"]
    assert run.test(made, datamodule=data, verbose=False) == [{"test/score": 0.0}]
    assert [rollout.example.id for rollout in made.evaluated] == ["4"]


def test_how_many_examples_fail_is_measured_over_the_whole_set_and_not_in_its_last_batch(
    tiny_model: Path, tmp_path: Path
) -> None:
    def breaks_on_3(example: Example, prediction: Any) -> float:
        if example.id in broken:
            raise OSError("no connection")
        return 1.0

    made, data, broken = module(tiny_model), Doubling(), {"3"}
    data.metric, data.val_batch_size = breaks_on_3, 1
    made.program = Unparsed()
    made.prompts = made.program.initial_prompts()
    run = trainer(tmp_path)
    assert run.validate(made, datamodule=data, verbose=False) == [{"val/score": 0.5}]
    broken.add("2")
    with pytest.raises(FaultyProgramError, match="the metric failed on 2 of 2 examples"):
        run.validate(made, datamodule=data, verbose=False)


def test_with_several_runs_of_an_example_each_run_that_fails_is_one_of_them(tiny_model: Path, tmp_path: Path) -> None:
    calls = itertools.count()

    def breaks_down_now_and_then(example: Example, prediction: Any) -> float:
        if next(calls) % 3 == 0:
            raise OSError("no connection")
        return 1.0

    made, data = module(tiny_model), Doubling()
    data.metric, data.val_samples = breaks_down_now_and_then, 4
    made.program = Unparsed()
    made.prompts = made.program.initial_prompts()
    (found,) = trainer(tmp_path).validate(made, datamodule=data, verbose=False)  # 3 of 8 runs fail, of both examples
    assert found["val/score"] == pytest.approx(5 / 8)


class Unparsed(Loop):
    """Needs no LM, so that every run ends well."""

    def run(self, number: int) -> Any:
        return {"answer": str(number)}
        yield  # a generator all the same


def test_predictions_need_no_metric(tiny_model: Path, tmp_path: Path) -> None:
    made = module(tiny_model)
    made.program = Unparsed()
    assert trainer(tmp_path).predict(made, datamodule=Doubling()) == [
        [{"id": "4", "prediction": {"answer": "4"}, "error": None}]
    ]


def test_runs_draw_by_the_modules_seed(tiny_model: Path) -> None:
    def said(seed: int) -> list[str]:
        made = module(tiny_model)
        made.sampling, made.seed = Sampling(temperature=1.0, max_new_tokens=6), seed
        made.lm.load(seed=0)
        runs = made.rollouts(doubles(1, 2), metric=None)
        return [step.completion.text for rollout in runs for step in rollout.steps]

    assert said(1) == said(1)
    assert said(1) != said(2)


def test_other_prompts_may_be_run_without_becoming_the_modules(tiny_model: Path) -> None:
    made = module(tiny_model)
    made.configure_model()
    (rollout,) = made.rollouts(doubles(1), metric=None, prompts={"double": Prompt("Another.")})
    assert "Another." in rollout.steps[0].messages[0]["content"]
    assert made.prompts == made.initial_prompts == Loop(1).initial_prompts()


def test_a_module_begins_with_the_programs_own_prompts(tiny_model: Path) -> None:
    program = Predict("question -> answer")
    made = ProgramModule(program, LanguageModel(str(tiny_model)))
    assert made.prompts == program.initial_prompts()


def test_a_checkpoint_names_its_lm_and_is_refused_by_one_of_another_tokenizer(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint: dict[str, Any] = {}
    made = module(tiny_model)
    made.configure_model()
    made.on_save_checkpoint(checkpoint)
    assert checkpoint["lm"]["base"] == str(tiny_model)
    made.on_load_checkpoint(checkpoint)
    other = module(save_tiny_model(tmp_path / "other", backwards=True))
    other.configure_model()
    with pytest.raises(ValueError, match=r'trained with ".*tiny", whose tokenizer differs from that of ".*other"'):
        other.on_load_checkpoint(checkpoint)
    other.on_load_checkpoint({name: value for name, value in checkpoint.items() if name != "lm"})  # from before
