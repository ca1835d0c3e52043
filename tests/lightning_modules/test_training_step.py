"""The training step inside Lightning: accumulation by tokens, and steps that are skipped without a trace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cotune.datamodules import Batch, Pair, Splits, TraceDataModule, collate
from cotune.datamodules.splits import Sizes
from cotune.lightning_modules import LanguageModel, LearningRate, LoRA, ProgramModule
from cotune.lightning_modules.objectives import Rejection
from cotune.lightning_modules.training import gradients
from cotune.lightning_modules.training.packing import rounds_products
from cotune.lightning_modules.training.skips import NonFiniteError, SkipLimits
from fakes import Loop, doubles
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader


class Given(TraceDataModule):
    """These batches, and no validation."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        super().__init__(sizes=Sizes(1, 0, 0, 0))
        self.batches = batches

    def load(self) -> Splits:
        return Splits(tuple(doubles(1)), (), (), ())

    def train_dataloader(self) -> Any:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]


def batch(*completions: int, name: str = "e") -> Batch:
    """A row for each completion, of that many tokens."""
    prompt = [1, *range(10, 30)]
    return collate(
        [[Pair([*prompt, i], range(60, 60 + count), name=f"{name}{i}") for i, count in enumerate(completions)]]
    )


def module(tiny_model: Path, *, momentum: bool = True, **settings: Any) -> ProgramModule:
    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        if momentum:
            return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
        return torch.optim.SGD(parameters, lr=1.0)  # the weights show the gradients

    made = ProgramModule(
        Loop(1),
        LanguageModel(str(tiny_model), device="cpu", lora=LoRA(r=4, alpha=8)),
        optimizer=optimizer,
        learning_rate=LearningRate(warmup=0, decay="constant"),
        **settings,
    )
    made.configure_model()
    with torch.no_grad():
        for i, p in enumerate(made._trained()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return made


class Gradients(Callback):
    """Keeps what each optimiser step is given, after clipping nothing."""

    def __init__(self) -> None:
        self.steps: list[list[torch.Tensor | None]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.steps.append([None if p.grad is None else p.grad.clone() for p in pl_module._trained()])


def fit(made: ProgramModule, batches: Sequence[Batch], folder: Path, **settings: Any) -> Trainer:
    options: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "max_epochs": 1,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
    }
    trainer = Trainer(**{**options, **settings})
    trainer.fit(made, datamodule=Given(batches))
    return trainer


def of_whole(tiny_model: Path, *batches: Batch) -> list[torch.Tensor]:
    """The gradient of the mean over all tokens of these batches together."""
    made = module(tiny_model)
    whole = Batch(tuple(segment for each in batches for segment in each.segments))
    found = gradients.BatchGradients().compute(made.lm.model, made._trained(), whole, Rejection()).gradients
    return [gradient for gradient in found if gradient is not None]


def apart(found: Sequence[Any], expected: Sequence[torch.Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


# Accumulation


def test_batches_that_accumulate_count_by_their_tokens(tiny_model: Path, tmp_path: Path) -> None:
    batches = [batch(1), batch(9, 20), batch(3), batch(2), batch(30)]
    watched = Gradients()
    made = module(tiny_model)
    before = [p.detach().clone() for p in made._trained()]

    class Still(Callback):
        """Puts the weights back, so that each window starts from the same."""

        def on_train_batch_end(self, *_: Any) -> None:
            with torch.no_grad():
                for p, old in zip(made._trained(), before, strict=True):
                    p.copy_(old)

    fit(made, batches, tmp_path, accumulate_grad_batches=2, callbacks=[watched, Still()])
    windows = [batches[:2], batches[2:4], batches[4:]]  # the epoch's last window is one batch short
    assert len(watched.steps) == 3
    for found, window in zip(watched.steps, windows, strict=True):
        assert apart(found, of_whole(tiny_model, *window)) < 1e-5


@pytest.mark.parametrize("settings", [{"micro_batch_size": 1}, {"gradient_checkpointing": True}])
def test_saving_memory_leaves_the_step_as_it_is(tiny_model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    found = []
    for given in ({}, settings):
        made, watched = module(tiny_model, **given), Gradients()
        fit(made, [batch(4, 1, 12)], tmp_path, callbacks=[watched], gradient_clip_val=1.0)
        found.append(watched.steps[0])
    assert apart(found[1], found[0]) < 1e-5  # type: ignore[arg-type]


def test_gradients_are_clipped_after_they_are_known(tiny_model: Path, tmp_path: Path) -> None:
    made = module(tiny_model, momentum=False)
    before = torch.cat([p.detach().flatten() for p in made._trained()])
    fit(made, [batch(4)], tmp_path, gradient_clip_val=0.01)
    after = torch.cat([p.detach().flatten() for p in made._trained()])
    assert float((after - before).norm()) == pytest.approx(0.01, rel=1e-3)


def test_mixed_precision_still_trains(tiny_model: Path, tmp_path: Path) -> None:
    found = []
    for precision in ("32-true", "bf16-mixed"):
        made, watched = module(tiny_model), Gradients()
        fit(made, [batch(4, 9)], tmp_path, callbacks=[watched], precision=precision)
        found.append(watched.steps[0])
    assert apart(found[1], found[0]) < 0.2  # type: ignore[arg-type]


# Steps that are not finite


class Poison:
    """Makes the loss of named rows NaN, or leaves it and makes their gradient infinite."""

    def __init__(self, *names: str, gradient: bool = False) -> None:
        self.names, self.gradient, self.real = names, gradient, gradients.log_probs

    def __call__(self, model: Any, part: Batch, ids_nK: torch.Tensor, given_nK: Any = None) -> Any:
        found_nK, weighted = self.real(model, part, ids_nK, given_nK)
        rows = [pair.name for pair in part.pairs for _ in pair.bearing]
        bad = torch.tensor([name in self.names for name in rows])
        if not self.gradient:
            return found_nK.masked_fill(bad[:, None], float("nan")), weighted * (float("nan") if bad.any() else 1)
        for _ in range(int(bad.any())):
            nothing = weighted - weighted.detach()
            weighted = weighted + nothing.sqrt()  # 0, with an infinite slope
        return found_nK, weighted


def state(made: ProgramModule) -> list[torch.Tensor]:
    """Weights and the optimiser's state."""
    optimizer = made.trainer.optimizers[0]
    kept = [p.detach() for p in made._trained()]
    kept += [t for p in made._trained() for t in optimizer.state.get(p, {}).values()]
    return [t.clone() for t in kept]


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_that_is_not_finite_touches_nothing_and_names_the_example(
    tiny_model: Path,
    tmp_path: Path,
    gradient: bool,
    clip: float | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gradients, "log_probs", Poison("b1", gradient=gradient))
    made = module(tiny_model)
    states: list[list[torch.Tensor]] = []

    class Watch(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            states.append(state(made))

    batches = [batch(4, 5, name="a"), batch(3, 6, 2, name="b"), batch(4, 5, name="c")]
    trainer = fit(made, batches, tmp_path, callbacks=[Watch()], gradient_clip_val=clip)
    one, two, three = states
    assert len(one) == len(two)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(two, three, strict=True))
    assert all(torch.isfinite(t).all() for t in three)
    assert trainer.callback_metrics["train/skipped_steps"] == 1
    assert math.isfinite(trainer.callback_metrics["train/loss"])
    what = "gradient" if gradient else "loss"
    assert f"training step 1: the {what} is not finite (examples b1). The step is skipped" in capsys.readouterr().out


def test_a_bad_batch_drops_out_of_the_window_it_accumulates_in(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "log_probs", Poison("b0"))
    batches = [batch(2, name="a"), batch(5, name="b"), batch(9, 1, name="c")]
    watched = Gradients()
    fit(module(tiny_model), batches, tmp_path, accumulate_grad_batches=3, callbacks=[watched])
    (found,) = watched.steps
    monkeypatch.undo()
    assert apart(found, of_whole(tiny_model, batches[0], batches[2])) < 1e-5


@pytest.mark.parametrize(("limits", "steps"), [(SkipLimits(in_a_row=2), 3), (SkipLimits(in_a_row=9, total=4), 5)])
def test_too_many_skipped_steps_stop_the_run_with_the_ways_out(
    tiny_model: Path, tmp_path: Path, limits: SkipLimits, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "log_probs", Poison("b0"))
    made = module(tiny_model, skip_limits=limits)
    before = made.lm.fingerprint()
    with pytest.raises(NonFiniteError, match=r"examples b0.*lower learning rate \(now 1.0e-02\).*clip.*float32"):
        fit(made, [batch(3, name="b")] * 9, tmp_path)
    assert made.skips.total == steps
    assert made.lm.fingerprint() == before


def test_a_good_step_ends_a_row_of_bad_ones(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "log_probs", Poison("b0"))
    made = module(tiny_model, skip_limits=SkipLimits(in_a_row=1))
    fit(made, [batch(3, name=name) for name in "abababc"], tmp_path)
    assert (made.skips.total, made.skips.in_a_row) == (3, 0)


def test_counts_and_the_size_that_fitted_go_into_checkpoints_as_plain_numbers(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "log_probs", Poison("b0"))
    made = module(tiny_model, micro_batch_size=2)
    trainer = fit(made, [batch(3, name="a"), batch(3, name="b")], tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert (stored["skips"], stored["rows_at_once"]) == ({"total": 1, "in_a_row": 1}, 2)
    again = module(tiny_model)
    again.on_load_checkpoint(stored)
    assert (again.skips.state(), again._gradients.rows_at_once) == ({"total": 1, "in_a_row": 1}, 2)


def test_limits_below_zero_are_refused() -> None:
    with pytest.raises(ValueError, match=r"skip_limits.total -1 is below 0"):
        SkipLimits(total=-1)


def test_a_cpu_does_not_round_products() -> None:
    assert not rounds_products(torch.device("cpu"))
