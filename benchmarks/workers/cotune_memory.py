"""cotune's generation with its memory watched: how much the engine takes beyond what stood there before."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from cotune.programs import Request, Sampling

from benchmarks.models import Endless, language_model
from benchmarks.workers.protocol import serve

_CLEAR = Path("/proc/self/clear_refs")


def run(*, model: str, requests: int, new: int, cache_tokens: int, threads: int) -> dict[str, Any]:
    """Bytes: what stood there when model and requests were ready, the peak while generating, what the caller was given.

    The last is the completions' ids and texts: 8 bytes a place in a tuple, 32 an integer.
    """
    torch.set_num_threads(threads)
    lm = language_model(Endless, model, cache_tokens=cache_tokens)
    lm.load()
    lm.complete([_request(-1)], Sampling(max_new_tokens=1))  # makes the merged copy
    asked = [_request(number) for number in range(requests)]
    _forget_peak()
    ready = psutil.Process().memory_info().rss
    completions = lm.complete(asked, Sampling(max_new_tokens=new))
    return {
        "ready": ready,
        "peak": _peak(),
        "given": sum(40 * len(c.prompt_ids + c.completion_ids) + len(c.text.encode()) for c in completions),
        "prompt_tokens": sum(len(c.prompt_ids) for c in completions),
        "completion_tokens": sum(len(c.completion_ids) for c in completions),
    }


def _request(number: int) -> Request:
    """A stage prompt that all share, and about 100 tokens of its own: a hundred of them fill the engine's budget."""
    facts = " ".join(f"Country {n} lies {n * 7 % 90} degrees north." for n in range(20))
    own = " ".join(f"Compare {number} with {number + n}." for n in range(1, 10))
    return Request([{"role": "system", "content": facts}, {"role": "user", "content": f"Number {number}? {own}"}])


def _forget_peak() -> None:
    if _CLEAR.exists():
        _CLEAR.write_text("5", encoding="ascii")  # Linux: sets the high-water mark to what is resident now


def _peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    serve({"run": run})
