"""TRL's training steps: `SFTTrainer` with completion-only loss, no packing. Runs in the environment "trl"."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from typing import Any

import peft
import torch
import transformers
import trl
from datasets import Dataset
from torch.utils.data import SequentialSampler

from benchmarks.workers.protocol import serve


class Clocked(trl.SFTTrainer):  # type: ignore[misc]
    """Takes the rows in their order, and keeps the loss of each part of a step (their sum is the step's)."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return SequentialSampler(self.train_dataset)

    def training_step(self, *args: Any, **options: Any) -> Any:
        loss = super().training_step(*args, **options)
        self.losses = [*getattr(self, "losses", []), float(loss)]
        return loss


class Clock(transformers.TrainerCallback):  # type: ignore[misc]
    """Seconds of each step, from its begin to its end: fetching the batch is not counted."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)


class Side:
    """One model, whose adapter is put back before each run."""

    def start(self, *, model: str, adapter: str, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        self.model = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)
        self.adapter = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        return {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}

    def run(
        self, *, batches: Sequence[Sequence[Sequence[list[int]]]], rate: float, rows_at_once: int
    ) -> dict[str, Any]:
        """Steps on batches of (prompt ids, completion ids) rows, all batches of one size, accumulated from parts."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.adapter:
                    parameter.copy_(self.adapter[name])
        rows = [row for batch in batches for row in batch]
        settings = trl.SFTConfig(
            output_dir=tempfile.mkdtemp(prefix="cotune-benchmark-trl-"),
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
            # TRL's defaults trade time for memory that nobody lacks here.
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
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
