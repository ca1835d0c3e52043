"""Hugging Face `generate` in two ways: on a left-padded batch, and behind an expanded prefix cache.

Runs in cotune's own environment, so that both sides have the same torch and transformers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from benchmarks.workers.protocol import serve


class Model:
    """One model; greedy, the whole batch at once."""

    def start(self, *, model: str, dtype: str, threads: int, prefix_cache: bool) -> dict[str, Any]:
        """Loads the model. With `prefix_cache`, what all prompts of a batch share is computed once and expanded, and
        kept for the next batch that begins with it."""
        started = time.perf_counter()
        torch.set_num_threads(threads)
        self.prefix_cache = prefix_cache
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        tokenizer = AutoTokenizer.from_pretrained(model)
        configured = self.model.generation_config.eos_token_id
        ends = configured if isinstance(configured, list) else [configured]
        self.end_ids = list(dict.fromkeys([tokenizer.eos_token_id, *(i for i in ends if i is not None)]))
        self.pad_id = self.end_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._kept: tuple[list[int], DynamicCache] | None = None
        return {
            "seconds": time.perf_counter() - started,
            "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        }

    def run(self, *, prompts: Sequence[Sequence[int]], new: int, ends: bool) -> dict[str, Any]:
        """Seconds of the batch and the ids written, an end-of-turn token included."""
        started = time.perf_counter()
        with torch.inference_mode():
            shared = _shared(prompts) if self.prefix_cache else 0
            rows = self._generate(prompts, shared, new, ends)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": [self._written(row) if ends else row for row in rows]}

    def _generate(self, prompts: Sequence[Sequence[int]], shared: int, new: int, ends: bool) -> list[list[int]]:
        width = max(map(len, prompts)) - shared
        pads = [width - (len(ids) - shared) for ids in prompts]  # between the shared prefix and a row's own tokens
        ids_BT = torch.tensor(
            [[*ids[:shared], *[self.pad_id] * pad, *ids[shared:]] for ids, pad in zip(prompts, pads, strict=True)]
        )
        mask_BT = torch.ones_like(ids_BT)
        for row, pad in zip(mask_BT, pads, strict=True):
            row[shared : shared + pad] = 0
        options: dict[str, Any] = (
            {"past_key_values": self._expanded(prompts[0][:shared], len(prompts))} if shared else {}
        )
        written: torch.Tensor = self.model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=new,
            min_new_tokens=None if ends else new,
            do_sample=False,
            # Without an end token no row ends; min_new_tokens alone would still rule that token out.
            eos_token_id=self.end_ids if ends else None,
            pad_token_id=self.pad_id,
            **options,
        )
        rows: list[list[int]] = written[:, ids_BT.shape[1] :].tolist()
        return rows

    def _expanded(self, prefix: Sequence[int], rows: int) -> DynamicCache:
        if self._kept is None or self._kept[0] != list(prefix):
            cache = DynamicCache(config=self.model.config)
            self.model(input_ids=torch.tensor([list(prefix)]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            self._kept = (list(prefix), cache)
        copy = DynamicCache(config=self.model.config)
        for at, layer in enumerate(self._kept[1].layers):
            copy.update(layer.keys.repeat(rows, 1, 1, 1), layer.values.repeat(rows, 1, 1, 1), at)
        return copy

    def _written(self, row: Sequence[int]) -> list[int]:
        """A row without the padding after its end-of-turn token."""
        end = next((at for at, token in enumerate(row) if token in self.end_ids), len(row) - 1)
        return list(row[: end + 1])


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, at most all but the last of the shortest."""
    low, high = min(map(list, prompts)), max(map(list, prompts))
    most = min(map(len, prompts)) - 1
    return next((at for at in range(most) if low[at] != high[at]), most)


if __name__ == "__main__":
    model = Model()
    serve({"start": model.start, "run": model.run})
