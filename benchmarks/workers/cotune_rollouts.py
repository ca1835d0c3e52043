"""cotune's own generation, as a fit calls it: chats in, a LoRA adapter merged into a second copy of the weights."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from cotune.lightning_modules import LanguageModel
from cotune.programs import Request, Sampling

from benchmarks.models import Endless, language_model
from benchmarks.workers.protocol import serve


class Engine:
    """Two LMs of the same weights: one ends its turns, one always writes all tokens."""

    def start(self, *, model: str, adapter: str, dtype: str, threads: int) -> dict[str, Any]:
        started = time.perf_counter()
        torch.set_num_threads(threads)
        self.lms: dict[bool, LanguageModel] = {}
        for ends, kind in ((True, LanguageModel), (False, Endless)):
            self.lms[ends] = language_model(kind, model, dtype=dtype, adapter=adapter, keep_prompts=True)
            self.lms[ends].load()
        return {"seconds": time.perf_counter() - started, "versions": {"torch": torch.__version__}}

    def run(self, *, chats: Sequence[Sequence[Mapping[str, str]]], new: int, ends: bool) -> dict[str, Any]:
        """Seconds of the batch (chats tokenised, text decoded) and the ids written, an end-of-turn token included."""
        requests = [Request(list(messages)) for messages in chats]
        started = time.perf_counter()
        completions = self.lms[ends].complete(requests, Sampling(max_new_tokens=new))
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": [list(completion.completion_ids) for completion in completions]}


if __name__ == "__main__":
    engine = Engine()
    serve({"start": engine.start, "run": engine.run})
