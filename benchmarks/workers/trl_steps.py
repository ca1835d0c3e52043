"""TRL's training steps: `SFTTrainer` with completion-only loss, no packing. Runs in the environment "trl"."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import transformers
import trl
from datasets import Dataset
from torch.utils.data import SequentialSampler

from benchmarks.workers.protocol import serve
from benchmarks.workers.trl_sides import KeptLosses, TRLSide, quiet_and_fast


class Clocked(KeptLosses, trl.SFTTrainer):  # type: ignore[misc]
    """Takes the rows in their order."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return SequentialSampler(self.train_dataset)


class Clock(transformers.TrainerCallback):  # type: ignore[misc]
    """Seconds of each step, from its begin to its end: fetching the batch is not counted."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)


class Side(TRLSide):
    """The steps of one trainer."""

    def run(
        self, *, batches: Sequence[Sequence[Sequence[list[int]]]], rate: float, rows_at_once: int
    ) -> dict[str, Any]:
        """Steps on batches of (prompt ids, completion ids) rows, all batches of one size, accumulated from parts."""
        self.put_back()
        rows = [row for batch in batches for row in batch]
        settings = trl.SFTConfig(
            max_steps=len(batches),
            per_device_train_batch_size=rows_at_once,
            gradient_accumulation_steps=len(batches[0]) // rows_at_once,
            learning_rate=rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            completion_only_loss=True,
            packing=False,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},  # ids and labels are given
            **quiet_and_fast(),
        )
        clock = Clock()
        trainer = Clocked(
            model=self.model,
            args=settings,
            train_dataset=Dataset.from_list(
                [{"input_ids": [*p, *c], "labels": [*[-100] * len(p), *c]} for p, c in rows]
            ),
            processing_class=self.tokenizer,
            callbacks=[clock],
        )
        trainer.train()
        parts = settings.gradient_accumulation_steps
        losses = [sum(trainer.losses[at : at + parts]) for at in range(0, len(trainer.losses), parts)]
        return {"seconds": clock.seconds, "losses": losses}


if __name__ == "__main__":
    side = Side()
    serve({"start": side.start, "run": side.run})
