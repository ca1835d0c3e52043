"""SayPlan: what a fit is going to do in its first lines, and after each step about how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cotune.callbacks.alternate import Alternate
from cotune.callbacks.boundary import Boundary, BoundaryListener
from cotune.callbacks.progress import say, training_bar_paused
from cotune.callbacks.schedule import PROMPTS
from cotune.datamodules import TraceDataModule
from cotune.datamodules.splits import NAMES
from cotune.lightning_modules import ProgramModule
from cotune.programs import Budget, Ledger
from lightning.pytorch import Callback, LightningModule, Trainer

Runs = tuple[float, float]
"""Fewest and most runs of the program."""


class SayPlan(Callback, BoundaryListener):
    """Says before the first LM call which program, LM, data and schedule a fit has and how often it will run the
    program; once the first calls and the first epoch have been timed, how long the rest will take.

    The range is that of the attempts at a training example: the fewest runs find a trace at the first attempt
    everywhere, the most never do.
    """

    def __init__(self) -> None:
        self._alternate: Alternate | None = None
        self._val = 0
        self._epochs, self._training, self._began = 0, 0.0, 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        found = [c for c in trainer.callbacks if isinstance(c, Alternate)]  # type: ignore[attr-defined]
        data = getattr(trainer, "datamodule", None)
        if stage != "fit" or not found or not isinstance(data, TraceDataModule):
            return
        assert isinstance(pl_module, ProgramModule)
        self._alternate, self._val = found[0], len(data.splits.val) * data.val_samples
        for line in plan(Path(trainer.default_root_dir).name, pl_module, data, found[0]):
            say(line)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._training += time.perf_counter() - self._began

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epochs += 1
        alternate = self._alternate
        # Alternate counts the epoch after this, and a weight step's last one ends at a boundary anyway.
        if self._epochs == 1 and alternate is not None and alternate.work.weight.epochs > 1:
            step = alternate.position
            runs = runs_left(alternate, trainer.datamodule, step + 1)  # type: ignore[attr-defined]
            data = trainer.datamodule  # type: ignore[attr-defined]
            rest = (alternate.work.weight.epochs - 1) * len(data.splits.val) * data.val_samples
            epochs = _epochs(alternate, step) - 1
            with training_bar_paused(trainer):
                say(f"first epoch done; {self._time(alternate, (runs[0] + rest, runs[1] + rest), epochs)}")

    def on_boundary(self, trainer: Trainer, module: LightningModule, boundary: Boundary) -> None:
        alternate = self._alternate
        if alternate is None:
            return
        head = f"[{boundary.index}/{len(alternate.schedule)}] {boundary.prefix}: val score {boundary.val_score:.3f}"
        took = f"{boundary.cost['lm_calls']:,} LM calls, {format_duration(boundary.cost['seconds'])}"
        runs = runs_left(alternate, trainer.datamodule, boundary.index)  # type: ignore[attr-defined]
        epochs = _epochs(alternate, boundary.index)
        message = f"; {self._time(alternate, runs, epochs)}" if boundary.index < len(alternate.schedule) else ""
        say(f"{head} ({took}){message}")

    def _time(self, alternate: Alternate, runs: Runs, epochs: int) -> str:
        """What so many runs and epochs will take, at the pace so far."""
        first = alternate.history[0]  # of val alone
        a_run = seconds_a_call(alternate.history) * first["lm_calls"] / max(self._val, 1)
        training = self._training / self._epochs * epochs if self._epochs else 0.0
        low, high = (format_duration(count * a_run + training) for count in runs)
        left = f"about {low} left" if low == high else f"about {low} to {high} left"
        return left if self._epochs or not epochs else f"{left}, and the training"


def seconds_a_call(history: Sequence[Mapping[str, Any]]) -> float:
    """What an LM call has taken in the run so far.

    Those that the completion store answered took no time, and a rest that it does not answer will. Where it has
    answered all, this run was here before, and the rest is in the store as well.

    >>> record = {"lm_calls": 40, "cached_calls": 30, "generating_seconds": 5.0}
    >>> seconds_a_call([record]), seconds_a_call([{**record, "cached_calls": 40}])
    (0.5, 0.125)
    """
    calls = sum(record["lm_calls"] for record in history)
    made = calls - sum(record["cached_calls"] for record in history)
    return float(sum(record["generating_seconds"] for record in history) / max(made or calls, 1))


def plan(name: str, module: ProgramModule, data: TraceDataModule, alternate: Alternate) -> list[str]:
    """The first lines of a run; loads its LM, to say of it what is and not what was asked for."""
    program, lm = module.program, module.lm.described(seed=module.seed)
    stages = ", ".join(program.stages)
    sizes = ", ".join(f"{len(getattr(data.splits, part))} {part}" for part in ("train", "dev", "val", "test"))
    low, high = runs_left(alternate, data, 0)
    vanilla = len(data.splits.val) * data.val_samples
    metric = getattr(data.metric, "__name__", type(data.metric).__name__)
    return [
        f"{name}: {type(program).__name__}, stage{'s' if len(program.stages) > 1 else ''} {stages}",
        f"  LM        {lm[0]}",
        *(f"            {line}" for line in lm[1:]),
        f"  data      {sizes} examples; metric {metric}",
        *(f"            {note}" for note in data.splits.notes),
        f"  schedule  {' -> '.join(alternate.schedule)}" + _step_sizes(alternate, data),
        *_rate_line(module, alternate),
        *_search_cost(alternate, data, len(program.stages)),
        f"  in all    {_range(low + vanilla, high + vanilla)} runs of the program{_unsaid(alternate, data)}",
        *(f"  {role:9} {lm}" for role, lm in module.ledger.asked.items() if role != "program"),
        *_budget(module.ledger, (low + vanilla) * len(program.stages)),
    ]


def _budget(ledger: Ledger, calls: float) -> list[str]:
    """What may be spent, and whether that is less than the run's runs take with one call for each stage."""
    if ledger.budget == Budget():
        return []
    spent = f", of which {ledger.spent} are spent" if ledger.roles else ""
    bound = ledger.budget.lm_calls
    short = bound is not None and bound < calls
    least = (
        f": the run needs at least about {calls:,.0f} calls, so it ends early, with the best so far" if short else ""
    )
    return [f"  budget    {ledger.budget}{spent}{least}"]


def runs_left(alternate: Alternate, data: TraceDataModule, done: int) -> Runs:
    """How often the program will be run after so many steps of the schedule, the closing test included."""
    train, dev, val, test = (len(getattr(data.splits, name)) for name in NAMES)
    steps = [runs_of(step, alternate, data, train=train, dev=dev, val=val) for step in alternate.schedule[done:]]
    return sum(low for low, _ in steps) + test, sum(high for _, high in steps) + test


def runs_of(step: str, alternate: Alternate, data: TraceDataModule, *, train: int, dev: int, val: int) -> Runs:
    """How often the program will be run in a step of the schedule, for sets of these sizes."""
    val *= data.val_samples
    chosen = alternate.options
    if step == PROMPTS:
        searched = _searched(alternate, train, dev) or 0
        return searched + val, searched + val
    settings = alternate.steps[step]
    scored = val * (settings.epochs_or_rounds + bool(chosen.average_last) + 1 + chosen.try_both_prompts + chosen.gate)
    few, most = settings.most_runs(data.bootstrapping)
    collected = train * (settings.rounds or 1) if settings.learns.runs or not data.reused_traces else 0
    return collected * few + scored, collected * most + scored


def _searched(alternate: Alternate, train: int, dev: int) -> int | None:
    """Most runs of the program in a prompt step, its scores on val left out; None where the search cannot say."""
    return alternate.search.most_runs(min(alternate.options.search_examples or train, train), dev)


def _unsaid(alternate: Alternate, data: TraceDataModule) -> str:
    train, dev = len(data.splits.train), len(data.splits.dev)
    if PROMPTS not in alternate.schedule or _searched(alternate, train, dev) is not None:
        return ""
    return f", and those of {type(alternate.search).__name__}, which does not say how many (most_runs)"


def _epochs(alternate: Alternate, done: int) -> int:
    """Training epochs in the steps of the schedule after so many."""
    return sum(alternate.steps[step].epochs_or_rounds for step in alternate.schedule[done:] if step != PROMPTS)


def format_duration(seconds: float) -> str:
    """A duration as one says it.

    >>> [format_duration(s) for s in (0.4, 42, 100, 1100, 9000)]
    ['1 s', '42 s', '2 min', '18 min', '2.5 h']
    """
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _step_sizes(alternate: Alternate, data: TraceDataModule) -> str:
    parts = []
    if PROMPTS in alternate.schedule:
        parts.append(f"p: {type(alternate.search).__name__}")
    for letter in dict.fromkeys(step for step in alternate.schedule if step != PROMPTS):
        settings = alternate.steps[letter]
        wanted = settings.learns.runs
        if wanted is not None:
            traces = f"{wanted.each} run{'s' if wanted.each > 1 else ''} per example"
        elif data.reused_traces:
            traces = "reused traces"
        else:
            traces = f"up to {data.bootstrapping.attempts} attempts per example"
        what = "round" if settings.rounds else "epoch"
        count = settings.epochs_or_rounds
        parts.append(f"{letter}: {count} {what}{'s' if count > 1 else ''} on {traces}")
    return f" ({'; '.join(parts)})"


def learning_rates(module: ProgramModule, alternate: Alternate) -> dict[str, str]:
    """Letter of each weight step -> its full learning rate and where it comes from; {} for an LM without weights."""
    optimizer = module.configure_optimizers()
    if isinstance(optimizer, list):
        return {}
    group = optimizer.param_groups[0]
    rates: dict[str, str] = {}
    for letter in dict.fromkeys(step for step in alternate.schedule if step != PROMPTS):
        step = alternate.steps[letter]
        why = "as the step says" if step.lr else "as set"
        if group["by_size"] and not step.lr:
            why = f"by the LM's size, {module.weights.size / 1e6:,.0f}M parameters"
        rates[letter] = f"{module.rate(step.learns, step.lr, group):.1e} ({why})"
    return rates


def _rate_line(module: ProgramModule, alternate: Alternate) -> list[str]:
    rates: dict[str, list[str]] = {}
    for letter, rate in learning_rates(module, alternate).items():
        rates.setdefault(rate, []).append(letter)
    message = "; ".join(f"{', '.join(letters)}: {rate}" for rate, letters in rates.items())
    return [f"  rate      {message}"] if message else []


def _search_cost(alternate: Alternate, data: TraceDataModule, stages: int) -> list[str]:
    """LM calls by role of a prompt step that has an LM write proposals."""
    train, dev = len(data.splits.train), len(data.splits.dev)
    proposals = alternate.search.about_proposals(stages, dev) if PROMPTS in alternate.schedule else 0
    if not proposals:
        return []
    runs = _searched(alternate, train, dev) or 0
    calls = f"up to {runs * stages:,} LM calls of the program at one per stage"
    return [f"  search    in a prompt step {calls}, about {proposals:,} of the proposer"]


def _range(low: float, high: float) -> str:
    return f"about {low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
