"""The machine's own rates, measured in the run that quotes them, and the least time they allow a job.

A figure means little beside another machine's, or beside the same machine's under a neighbour's load. So each stands as
a ratio of two sides, and as a fraction of this limit: t >= max(FLOPs / GEMM rate, bytes / copy rate).
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Machine:
    """What this machine does at its best, with the threads given.

    Attributes:
        gemm: FLOP/s of square matrix products, by dtype.
        copy: bytes/s of a copy far larger than the caches, read and written bytes both counted.
    """

    processor: str
    cpus: int
    threads: int
    gemm: dict[str, float]
    copy: float

    def __str__(self) -> str:
        products = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in self.gemm.items())
        return (
            f"{self.processor}, {self.cpus} CPUs, {self.threads} threads: {products}, copy {self.copy / 1e9:.1f} GB/s"
        )


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder-only transformer that its costs follow from.

    Attributes:
        matrices: parameters of the layers' linear maps, each used once a token (embedding and output head left out).
        head: vocabulary x width: parameters of the output head.
        attention: layers x query heads x head size.
        cached: values kept a token in keys and values of all layers.
    """

    matrices: int
    head: int
    attention: int
    cached: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a transformers config of the Llama family (gated MLP, grouped queries)."""
        width, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
        size = getattr(config, "head_dim", None) or width // heads
        kv = (getattr(config, "num_key_value_heads", None) or heads) * size
        each = 2 * width * heads * size + 2 * width * kv + 3 * width * config.intermediate_size
        return cls(layers * each, config.vocab_size * width, layers * heads * size, 2 * layers * kv)


@dataclass(frozen=True)
class Work:
    """What a job cannot avoid, each distinct token of the prompts computed once."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, machine: Machine, dtype: str) -> float:
        """The least time: computing and moving overlap at best."""
        return max(self.flops / machine.gemm[dtype], self.bytes / machine.copy)


def measure(threads: int, *, seconds: float = 1.0) -> Machine:
    """Measures this machine with that many threads, about `seconds` for each rate. Leaves torch's setting as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gemm = {dtype: _gemm(getattr(torch, dtype), seconds) for dtype in BYTES}
        return Machine(processor(), os.cpu_count() or 1, threads, gemm, _copy(seconds))
    finally:
        torch.set_num_threads(before)


def prefill(shape: Shape, prompts: Sequence[Sequence[int]], dtype: str, *, known: Sequence[Sequence[int]] = ()) -> Work:
    """Reading the prompts: 2N FLOPs a distinct token, 4 a value of the context it attends to; the head once a prompt.

    Args:
        known: prompts whose keys and values are there already.
    """
    places = _new_places(prompts, known)
    flops = sum(2 * shape.matrices + 4 * shape.attention * (place + 1) for place in places)
    flops += 2 * shape.head * len(prompts)
    return Work(flops, (shape.matrices + shape.head) * BYTES[dtype] if prompts else 0)


def decode(shape: Shape, prompts: Sequence[Sequence[int]], written: Sequence[int], dtype: str) -> Work:
    """Writing `written[i]` tokens behind prompt i, all rows together; a shared prefix's cache is read once a step.

    The first token of a row comes from reading its prompt, so n tokens take n - 1 steps.
    """
    work = Work(0, 0)
    for step in range(1, max(written, default=0)):
        rows = [ids for ids, count in zip(prompts, written, strict=True) if count > step]
        context = sum(len(ids) + step for ids in rows)
        flops = len(rows) * 2 * (shape.matrices + shape.head) + 4 * shape.attention * context
        kept = len(_new_places(rows, ())) + step * len(rows)
        work += Work(flops, (shape.matrices + shape.head + kept * shape.cached) * BYTES[dtype])
    return work


def lora_step(shape: Shape, *, tokens: int, completion_tokens: int) -> Work:
    """A training step of an adapter: forward, and backward to the activations only; the head at completions only."""
    return Work(4.0 * shape.matrices * tokens + 4.0 * shape.head * completion_tokens, 0)


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _new_places(prompts: Sequence[Sequence[int]], known: Sequence[Sequence[int]]) -> list[int]:
    """The position of every token that has no equal path from the start among the earlier prompts or the known."""
    paths = sorted([(tuple(ids), False) for ids in known] + [(tuple(ids), True) for ids in prompts])
    places: list[int] = []
    # In sorted order a path shares most with a neighbour, so each is new from where it leaves the one before. A known
    # path must come first to count as known, and does not when it is the greater: look at the next known one as well.
    last: tuple[int, ...] = ()
    following = _next_known(paths)
    for (ids, wanted), after in zip(paths, following, strict=True):
        if wanted:
            places += range(max(_common(ids, last), _common(ids, after)), len(ids))
        last = ids
    return places


def _next_known(paths: Sequence[tuple[tuple[int, ...], bool]]) -> list[tuple[int, ...]]:
    following: list[tuple[int, ...]] = []
    after: tuple[int, ...] = ()
    for ids, wanted in reversed(paths):
        following.append(after)
        if not wanted:
            after = ids
    return following[::-1]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    most = min(len(a), len(b))
    return next((at for at in range(most) if a[at] != b[at]), most)


def _gemm(dtype: torch.dtype, seconds: float, size: int = 1024) -> float:
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / _best(lambda: a @ b, seconds)


def _copy(seconds: float) -> float:
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _best(lambda: target.copy_(source), seconds)


def _best(run: Callable[[], object], seconds: float) -> float:
    """The shortest of the calls made in about that time."""
    run()
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best


if __name__ == "__main__":
    print(measure(torch.get_num_threads()))
