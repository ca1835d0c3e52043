"""Cost: what a table will take before any of it is run: LM calls and tokens at most, and about how long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cotune.callbacks.say_plan import runs_of
from cotune.datamodules.splits import NAMES, Sizes
from cotune.experiments.parts import Parts
from cotune.experiments.results import RunResult
from cotune.experiments.runs import Cell, Run
from cotune.experiments.strategies import Steps
from cotune.experiments.table_config import TableError


@dataclass(frozen=True)
class Cost:
    """Most that something takes; `seconds` is None where nothing has been measured.

    Attributes:
        calls: of the LM.
        pairs: trained on, counted once an epoch.
        prompt_tokens: as measured on a few prompts with demos; None without a measurement.
        completion_tokens: calls times the longest completion.
    """

    calls: int = 0
    pairs: int = 0
    completion_tokens: int = 0
    prompt_tokens: float | None = None
    seconds: float | None = None

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.calls + other.calls,
            self.pairs + other.pairs,
            self.completion_tokens + other.completion_tokens,
            _sum(self.prompt_tokens, other.prompt_tokens),
            _sum(self.seconds, other.seconds),
        )


@dataclass(frozen=True)
class Pace:
    """What a warm-up measured: tokens and seconds of an LM call and of a training pair, and
    the seconds until a run's first call."""

    prompt_tokens: float
    seconds_a_call: float
    seconds_a_pair: float
    seconds_a_start: float = 0.0

    @classmethod
    def read(cls, text: str) -> Pace:
        return cls(**json.loads(text))

    def write(self) -> str:
        return json.dumps(asdict(self))


def cost_of(run: Run, parts: Parts, pace: Pace | None, *, equals: Steps = ()) -> Cost:
    """The most that a run can take, from its options: every attempt used up, nothing pruned, nothing in the store.

    A program is taken to call each of its stages once.

    Args:
        equals: the steps whose LM calls a control spends.
    """
    stages = len(parts.module.program.stages)
    steps = equals or run.steps
    runs, rows = _runs(steps, parts)
    prefixes = len(run.steps) + 1
    tested = (prefixes + 1) * parts.data.sizes.test
    calls = (runs + tested) * stages
    pairs = 0 if equals else rows * stages
    return Cost(
        calls,
        pairs,
        calls * parts.module.sampling.max_new_tokens,
        None if pace is None else calls * pace.prompt_tokens,
        None if pace is None else pace.seconds_a_start + calls * pace.seconds_a_call + pairs * pace.seconds_a_pair,
    )


def measured(run: Run, results: Sequence[RunResult]) -> float | None:
    """Mean seconds of finished runs of the same cell and schedule, tests included; None without one."""
    same = [
        sum(float(r["seconds"]) + float(r.get("test_cost", {}).get("seconds", 0)) for r in result.history)
        for result in results
        if result.finished and (result.run.cell, result.run.steps, result.run.equal) == (run.cell, run.steps, run.equal)
    ]
    return sum(same) / len(same) if same else None


def warm_up(words: Sequence[str], environment: Mapping[str, str]) -> Pace:
    """Loads the LM in a process of its own, runs a few examples and takes one training step.

    Raises:
        TableError: the process failed; the message is its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, began = Path(folder) / "pace.json", time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "cotune.fit.warm_up", str(out), *words],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **environment},
        )
        if done.returncode or not out.is_file():
            lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            message = lines[-1].removeprefix("cotune: error: ") if lines else f"exit code {done.returncode}"
            raise TableError(f"the warm-up failed: {message}")
        took, found = time.perf_counter() - began, Pace.read(out.read_text(encoding="utf-8"))
        return replace(found, seconds_a_start=max(took - found.seconds_a_start, 0.0))


def totals(costs: Mapping[Run, Cost]) -> dict[Cell, Cost]:
    """Cell -> the sum of its runs."""
    found: dict[Cell, Cost] = {}
    for run, cost in costs.items():
        # The sum's own prompt tokens and seconds are known as long as all of its parts' are.
        found[run.cell] = found[run.cell] + cost if run.cell in found else cost
    return found


def _runs(steps: Steps, parts: Parts) -> tuple[int, int]:
    """(runs of the program at most, runs that are trained on, counted once an epoch)."""
    data, alternate = parts.data, parts.alternate
    sizes = data.sizes
    if data.folds is not None:  # which share out all rows but test's, so the data says how many
        sizes = Sizes(*(len(getattr(data.splits, name)) for name in NAMES))
    runs = [runs_of(s, alternate, data, train=sizes.train, dev=sizes.dev, val=sizes.val) for s in steps]
    trained = 0
    for settings in (alternate.steps[step] for step in steps if step in alternate.steps):
        wanted = settings.learns.runs
        rows = data.bootstrapping.traces_per_example if wanted is None else wanted.each
        trained += rows * settings.epochs_or_rounds * sizes.train
    return round(sizes.val + sum(most for _, most in runs)), trained


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other
