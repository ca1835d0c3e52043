"""Training steps as a plain loop over a Hugging Face model with PEFT takes them: padded rows, labels, AdamW."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import peft
import torch
import transformers

from benchmarks.workers.protocol import serve


class Side:
    """One model, whose adapter is put back before each run."""

    def start(self, *, model: str, adapter: str, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.model = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.adapter = [p.detach().clone() for p in self.parameters]
        return {"peft": peft.__version__, "transformers": transformers.__version__, "torch": torch.__version__}

    def run(
        self, *, batches: Sequence[Sequence[Sequence[list[int]]]], rate: float, rows_at_once: int
    ) -> dict[str, Any]:
        """Steps on batches of (prompt ids, completion ids) rows, accumulated from parts."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.adapter, strict=True):
                parameter.copy_(value)
        optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.0)
        seconds, losses = [], []
        for rows in batches:
            started = time.perf_counter()
            count, total = sum(len(completion) for _, completion in rows), 0.0
            for at in range(0, len(rows), rows_at_once):
                part = _padded(rows[at : at + rows_at_once])
                loss = self.model(**part, use_cache=False, num_items_in_batch=count).loss
                loss.backward()
                total += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - started)
            losses.append(total)
        return {"seconds": seconds, "losses": losses}


def _padded(rows: Sequence[Sequence[list[int]]]) -> dict[str, torch.Tensor]:
    """Padded on the right, with the labels of prompts and padding ignored."""
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    pads = [width - len(prompt) - len(completion) for prompt, completion in rows]
    return {
        "input_ids": torch.tensor([[*p, *c, *[0] * pad] for (p, c), pad in zip(rows, pads, strict=True)]),
        "attention_mask": torch.tensor([[1] * (width - pad) + [0] * pad for pad in pads]),
        "labels": torch.tensor([[*[-100] * len(p), *c, *[-100] * pad] for (p, c), pad in zip(rows, pads, strict=True)]),
    }


if __name__ == "__main__":
    side = Side()
    serve({"start": side.start, "run": side.run})
