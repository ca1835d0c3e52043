"""A whole fit on a tiny model in a second or two: real Trainer, real LoRA, real search; only the sizes are small."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cotune.callbacks import Alternate
from cotune.datamodules import Bootstrapping, Iris, Sizes
from cotune.lightning_modules import LanguageModel, LearningRate, LoRA, ProgramModule
from cotune.programs import Completion, Example, Predict, Request, Sampling
from cotune.prompting import RandomDemoSearch
from lightning.pytorch import Callback, Trainer


class BrokenOffError(Exception):
    """A crash of the process, as far as a test can make one."""


class BreakInTraining(Callback):
    """Breaks the run off just before a batch of training, counted over all epochs and runs from 0."""

    def __init__(self, batch: int, error: type[BaseException] = BrokenOffError) -> None:
        self.batch, self.error = batch, error

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.batch:
            raise self.error


class CurtLM(LanguageModel):
    """A tiny LM that ends its turn at every third token id, so that most of its random text ends early.

    Attributes:
        seen: (requests, fingerprint of the adapter) of every `generate` call.
        breaks_at: the number of `generate` calls after which the process breaks; -1 for never.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[list[Request], str]] = []
        self.breaks_at = -1

    @property
    def end_ids(self) -> list[int]:
        return [*super().end_ids, *range(3, len(self.tokenizer), 3)]

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        if len(self.seen) == self.breaks_at:
            raise BrokenOffError
        self.seen.append((list(requests), self.fingerprint()))
        return super().generate(requests, sampling)


def digest(example: Example, prediction: Mapping[str, Any]) -> float:
    """Passes about half of all answers, and does so differently for each example; the weights decide which."""
    text = f"{example.id}|{prediction['answer']}"
    return float(hashlib.sha256(text.encode()).digest()[0] % 2)


@dataclass
class Fit:
    """The parts of one fit."""

    trainer: Trainer
    module: ProgramModule
    data: Iris
    alternate: Alternate

    @property
    def lm(self) -> CurtLM:
        assert isinstance(self.module.lm, CurtLM)
        return self.module.lm

    @property
    def last(self) -> Path:
        return Path(self.trainer.default_root_dir) / "checkpoints" / "last.ckpt"

    @property
    def outcome(self) -> dict[str, Any]:
        """All that must not depend on when, where and how often the run was stopped."""
        return {
            "history": [_without_clock(record) for record in self.alternate.history],
            "prompts": self.module.prompts,
            "adapter": self.lm.fingerprint(),
        }

    def run(self, checkpoint: Path | None = None) -> Fit:
        self.trainer.fit(self.module, datamodule=self.data, ckpt_path=checkpoint, weights_only=True)
        return self


def tiny_fit(
    model: Path,
    folder: Path,
    schedule: str = "p -> w -> p",
    *,
    callbacks: Sequence[Callback] = (),
    lora: LoRA = LoRA(r=4, alpha=8),  # noqa: B008 (frozen)
    bootstrapping: Bootstrapping = Bootstrapping(attempts=2),  # noqa: B008 (frozen)
    sizes: Sizes = Sizes(train=12, dev=6, val=10, test=4),  # noqa: B008 (frozen)
    metric: Any = digest,
    trainer: Mapping[str, Any] | None = None,
    epochs: int = 2,
    **alternate: Any,
) -> Fit:
    """A fit that is ready to run; `trainer` and `alternate` override what stands here."""
    module = ProgramModule(
        Predict("petal_length, petal_width, sepal_length, sepal_width -> answer", instruction="Classify."),
        CurtLM(str(model), lora=lora, device="cpu"),
        sampling=Sampling(max_new_tokens=8),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-2),
        learning_rate=LearningRate(warmup=2),
    )
    search = RandomDemoSearch(num_candidates=2, max_demos=2, max_labelled_demos=1)
    callback = Alternate(schedule, **{"search": search, "epochs": epochs, **alternate})
    options: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "reload_dataloaders_every_n_epochs": 1,
        "log_every_n_steps": 1,
    }
    return Fit(
        Trainer(**{**options, **(trainer or {})}, callbacks=[callback, *callbacks]),
        module,
        Iris(sizes=sizes, metric=metric, bootstrapping=bootstrapping, batch_size=3),
        callback,
    )


def _without_clock(record: Mapping[str, Any]) -> dict[str, Any]:
    """Nor what the completion store answered, which depends on what ran before."""
    return {
        name: _without_clock(value) if isinstance(value, Mapping) else value
        for name, value in record.items()
        if "seconds" not in name and name != "cached_calls"
    }
