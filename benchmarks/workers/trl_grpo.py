"""TRL's policy gradient steps: `GRPOTrainer` on completions that are given. Runs in the environment "trl"."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import peft
import torch
import transformers
import trl
from datasets import Dataset
from torch import Tensor

from benchmarks.workers.clocks import Clock, forget_peak, peak
from benchmarks.workers.protocol import serve


class Given(trl.GRPOTrainer):  # type: ignore[misc]
    """Takes the completions that it is given where it would generate and score some."""

    given: dict[str, Tensor]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Tensor]:
        return dict(self.given)

    def training_step(self, *args: Any, **options: Any) -> Any:
        loss = super().training_step(*args, **options)
        self.losses = [*getattr(self, "losses", []), float(loss)]
        return loss


class StepClock(transformers.TrainerCallback):  # type: ignore[misc]
    """CPU seconds of each step, from its begin to its end."""

    def __init__(self) -> None:
        self.clock = Clock()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.clock.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.end()


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
        self,
        *,
        rows: Sequence[Sequence[list[int]]],
        advantages: Sequence[float],
        sampled: Sequence[Sequence[float]],
        steps: int,
        rate: float,
        rows_at_once: int,
    ) -> dict[str, Any]:
        """Steps on the same batch of (prompt ids, completion ids) rows of one length, accumulated from parts."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.adapter:
                    parameter.copy_(self.adapter[name])
        parts = len(rows) // rows_at_once
        settings = trl.GRPOConfig(
            output_dir=tempfile.mkdtemp(prefix="cotune-benchmark-trl-"),
            max_steps=steps,
            per_device_train_batch_size=rows_at_once,
            gradient_accumulation_steps=parts,
            num_generations=len(rows),
            max_completion_length=len(rows[0][1]),
            loss_type="grpo",
            beta=0.0,
            learning_rate=rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            # TRL's defaults trade time for memory that nobody lacks here.
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        clock = StepClock()
        trainer = Given(
            model=self.model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": "given"}] * (steps * len(rows))),
            processing_class=self.tokenizer,
            callbacks=[clock],
        )
        prompts, completions = (torch.tensor([row[part] for row in rows]) for part in (0, 1))
        trainer.given = {
            "prompt_ids": prompts,
            "prompt_mask": torch.ones_like(prompts),
            "completion_ids": completions,
            "completion_mask": torch.ones_like(completions),
            "advantages": torch.tensor(advantages),
            "old_per_token_logps": torch.tensor(sampled),
            "num_items_in_batch": torch.tensor(completions.numel()),
        }
        forget_peak()
        trainer.train()
        losses = [sum(trainer.losses[at : at + parts]) for at in range(0, len(trainer.losses), parts)]
        return {"seconds": clock.clock.seconds, "losses": losses, "peak": peak()}


if __name__ == "__main__":
    side = Side()
    serve({"start": side.start, "run": side.run})
