"""ProgramModule: a program, its prompts and its LM as a LightningModule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from cotune.datamodules.collate import Batch, Segment
from cotune.lightning_modules.language_model import LanguageModel
from cotune.lightning_modules.loss import completion_loss
from cotune.lightning_modules.quantization import refuse_plugin
from cotune.programs import (
    ChatTemplate,
    Example,
    Metric,
    Program,
    Prompts,
    Rollout,
    Sampling,
    Template,
    mean_score,
    prompts_from_dict,
    prompts_to_dict,
    rollouts,
)
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor


@dataclass(frozen=True)
class LearningRate:
    """How the learning rate moves within one weight step: up from 0 over `warmup` steps, then along `decay`.

    Attributes:
        warmup: optimiser steps to the full rate.
        decay: "cosine" or "linear" to zero at the weight step's end; "late": whole, then linear to zero over the last
            third (warm-up, stable, decay); or "constant".
    """

    warmup: int = 10
    decay: Literal["cosine", "linear", "late", "constant"] = "late"

    def factor(self, step: int, total: int) -> float:
        """What the rate is multiplied by at optimiser step `step` (from 0) of `total`.

        >>> [round(LearningRate(warmup=2, decay="linear").factor(i, 6), 2) for i in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = min((step - self.warmup) / max(total - self.warmup, 1), 1.0)
        courses = {
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
            "linear": 1 - done,
            "late": min(1.0, 3 * (1 - done)),
            "constant": 1.0,
        }
        return courses[self.decay]


class ProgramModule(LightningModule):
    """Trains the LM on the program's own steps; validates by running the program.

    Args:
        program: what to tune.
        lm: the shared LM.
        template: how stages talk to it.
        sampling: how the program's completions are drawn, in prompt steps, validation and test.
        optimizer: for the adapter's parameters.
        learning_rate: its course within a weight step.
        seed: of the adapter's initial values and of every draw while running the program.
        max_error_rate: share of examples on which the program or the metric may raise before the run stops.
    """

    def __init__(
        self,
        program: Program,
        lm: LanguageModel,
        template: Template | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.0),
        learning_rate: LearningRate = LearningRate(),
        seed: int = 0,
        max_error_rate: float = 0.5,
    ) -> None:
        super().__init__()
        self.program, self.lm, self.sampling = program, lm, sampling
        self.template: Template = template or ChatTemplate()
        self.optimizer, self.learning_rate = optimizer, learning_rate
        self.seed, self.max_error_rate = seed, max_error_rate
        self.initial_prompts: Prompts = program.initial_prompts()
        self.prompts: Prompts = self.initial_prompts
        self.weight_step = 0  # optimiser steps taken in this weight step, and how many it will take
        self.weight_steps = 1
        self.evaluated: list[Rollout] = []
        # Checkpoints hold the adapter alone: the base never changes, and is checked by what is missing on load.
        self.strict_loading = False

    def setup(self, stage: str) -> None:
        refuse_plugin(self.trainer)

    def configure_model(self) -> None:
        self.lm.load(seed=self.seed)

    def rollouts(
        self,
        examples: Sequence[Example],
        *,
        metric: Metric | None,
        prompts: Prompts | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Rollout]:
        """Runs the program as it stands (current weights; current prompts unless others are given)."""
        return rollouts(
            self.program,
            examples,
            lm=self.lm,
            prompts=self.prompts if prompts is None else prompts,
            template=self.template,
            metric=metric,
            sampling=self.sampling,
            seed=self.seed,
            max_error_rate=self.max_error_rate,
            progress=progress,
        )

    def begin_weight_step(self, *, steps: int, done: int = 0) -> None:
        """Starts the learning rate's course for a weight step of `steps` optimiser steps, `done` of them taken."""
        self.weight_step, self.weight_steps = done, steps

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = completion_loss(self.lm.model, batch)
        rows = sum(segment.ids.shape[0] for segment in batch.segments)
        self.log("train/loss", loss.detach(), prog_bar=True, on_step=True, on_epoch=True, batch_size=rows)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        factor = self.learning_rate.factor(self.weight_step, self.weight_steps)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.weight_step += 1
        self.log("train/lr", optimizer.param_groups[0]["lr"])

    def validation_step(self, batch: list[Example], batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: list[Example], batch_idx: int) -> None:
        self._evaluate(batch)

    def predict_step(self, batch: list[Example], batch_idx: int) -> list[dict[str, Any]]:
        """A plain dict an example, because Lightning moves what it returns and stops at frozen dataclasses."""
        return [
            {
                "id": rollout.example.id,
                "prediction": None if rollout.prediction is None else dict(rollout.prediction),
                "error": None if rollout.error is None else rollout.error.message,
            }
            for rollout in self.rollouts(batch, metric=None)
        ]

    def on_validation_epoch_start(self) -> None:
        self.evaluated = []

    def on_test_epoch_start(self) -> None:
        self.evaluated = []

    def on_validation_epoch_end(self) -> None:
        self.log("val/score", mean_score(self.evaluated), prog_bar=True)

    def on_test_epoch_end(self) -> None:
        self.log("test/score", mean_score(self.evaluated))

    def _evaluate(self, examples: list[Example]) -> None:
        self.evaluated += self.rollouts(examples, metric=self.trainer.datamodule.metric)  # type: ignore[attr-defined]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        # Lightning would walk into the frozen examples and fail; only token tensors have a device.
        if isinstance(batch, Batch):
            return Batch(tuple(Segment(*(tensor.to(device) for tensor in segment)) for segment in batch.segments))
        return batch

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The adapter only."""
        return dict(self.lm.adapter_state())

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads an adapter.

        Raises:
            ValueError: names or shapes do not fit; nothing is changed then.
        """
        self.lm.load_adapter_state(state_dict)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["prompts"] = prompts_to_dict(self.prompts)
        checkpoint["weight_step"] = [self.weight_step, self.weight_steps]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.prompts = prompts_from_dict(checkpoint["prompts"])
        self.weight_step, self.weight_steps = checkpoint["weight_step"]
