"""TRL's policy gradient steps: `GRPOTrainer` on completions that are given. Runs in the environment "trl"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from torch import Tensor

from benchmarks.workers.clocks import Clock, forget_peak, peak
from benchmarks.workers.protocol import serve
from benchmarks.workers.trl_sides import KeptLosses, TRLSide, quiet_and_fast


class Given(KeptLosses, trl.GRPOTrainer):  # type: ignore[misc]
    """Takes the completions that it is given where it would generate and score some."""

    given: dict[str, Tensor]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Tensor]:
        return dict(self.given)


class StepClock(transformers.TrainerCallback):  # type: ignore[misc]
    """CPU seconds of each step, from its begin to its end."""

    def __init__(self) -> None:
        self.clock = Clock()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.clock.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.end()


class Side(TRLSide):
    """The steps of one trainer."""

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
        self.put_back()
        parts = len(rows) // rows_at_once
        settings = trl.GRPOConfig(
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
            **quiet_and_fast(),
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
