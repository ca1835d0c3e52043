"""cotune's training steps by each objective, as a fit takes them: passes, gradients, clipping, AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from cotune.datamodules import Batch, Pair, collate
from cotune.lightning_modules import LanguageModel
from cotune.lightning_modules.objectives import DPO, GRPO, KTO, Distil, Objective, Rejection
from cotune.lightning_modules.training.gradients import BatchGradients

from benchmarks.workers.clocks import Clock, forget_peak, peak
from benchmarks.workers.protocol import serve

OBJECTIVES: dict[str, Objective] = {
    "completion loss": Rejection(),
    "distil": Distil(),
    "KTO": KTO(),
    "DPO": DPO(),
    "grpo": GRPO(),
    "grpo, kl": GRPO(kl=0.1),
}


class Side:
    """One model, whose adapter is put back before each run."""

    def start(self, *, model: str, adapter: str, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        self.lm = LanguageModel(model, adapter=adapter, device="cpu")
        self.lm.load(seed=0)
        self.lm.model.train()
        self.adapter = self.lm.adapter_state()
        return {"torch": torch.__version__}

    def likeliest(self, *, rows: Sequence[Sequence[list[int]]]) -> dict[str, Any]:
        """CPU seconds of the pass that scores the rows by a reference, made once a collection, and what it found."""
        self.lm.load_adapter_state(self.adapter)
        batch = collate([[Pair(*row) for row in rows]])
        clock = Clock()
        clock.begin()
        _, values = BatchGradients().likeliest(self.lm.model, batch, 0)
        clock.end()
        found = iter(values[:, 0].tolist())
        return {"seconds": clock.seconds[0], "log_probs": [[next(found) for _ in row[1]] for row in rows]}

    def run(
        self,
        *,
        objective: str,
        rows: Sequence[Sequence[list[int]]],
        advantages: Sequence[float],
        steps: int,
        rate: float,
    ) -> dict[str, Any]:
        """Steps on the same batch of (prompt ids, completion ids) rows; the first warms up."""
        self.lm.load_adapter_state(self.adapter)
        chosen = OBJECTIVES[objective]
        batch = self._batch(chosen, rows, advantages)
        parameters = [p for p in self.lm.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        losses, clock = [], Clock()
        forget_peak()
        for _ in range(steps):
            clock.begin()
            computed = BatchGradients().compute(self.lm.model, parameters, batch, chosen)
            for parameter, gradient in zip(parameters, computed.gradients, strict=True):
                parameter.grad = gradient
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            clock.end()
            losses.append(float(computed.loss))
        return {"seconds": clock.seconds, "losses": losses, "peak": peak()}

    def _batch(self, objective: Objective, rows: Sequence[Sequence[list[int]]], advantages: Sequence[float]) -> Batch:
        """The rows as the objective has them, with what its reference says of them."""
        pairs = [Pair(*row, name=f"row {number}") for number, row in enumerate(rows)]
        if isinstance(objective, Rejection):
            return collate([pairs])
        reference = objective.reference
        assert reference is not None
        ids, values = BatchGradients().likeliest(self.lm.model, collate([pairs]), reference.top_k)
        known = iter(zip(ids.tolist(), values.tolist(), strict=True))
        made = []
        for number, (pair, advantage) in enumerate(zip(pairs, advantages, strict=True)):
            told = [next(known) for _ in pair.completion_ids]
            count = len(told)
            weight = 1 / count if isinstance(objective, GRPO) else 1.0
            row = replace(pair, ce=(), kl=(weight,) * count, desirable=advantage > 0, group=f"pair {number // 2}")
            if isinstance(objective, GRPO):
                row = replace(row, pg=(advantage * weight,) * count, sampled=[own for _, (own, *_) in told], group="")
            else:
                row = replace(row, reference=[values for _, values in told])
            if reference.top_k:
                row = replace(row, candidates=[likeliest for likeliest, _ in told])
            made.append(row)
        return collate([made])


if __name__ == "__main__":
    side = Side()
    serve({"start": side.start, "likeliest": side.likeliest, "run": side.run})
