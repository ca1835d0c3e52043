"""Runs: which fits a table needs, what they are called, and the command line of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cotune.experiments.strategies import Steps, covering
from cotune.experiments.table_config import TableConfig
from cotune.storage.schedule_text import name_of

CONTROL: Steps = ("p", "p")
ALTERNATION: Steps = ("p", "w", "p")
EQUAL_CALLS = "p -> p, equal calls"
"""The control's name in tables: as many LM calls as the alternation of the same cell and seed has made."""


@dataclass(frozen=True)
class Cell:
    """What the strategies of one table are compared on."""

    task: str
    lm: str
    preset: str

    def __str__(self) -> str:
        return f"{self.task}, {self.lm}, {self.preset}"


@dataclass(frozen=True)
class Run:
    """One fit: a schedule on a cell with a seed. `equal` marks the control, which waits for the run that it equals."""

    cell: Cell
    steps: Steps
    seed: int
    equal: bool = False

    @property
    def name(self) -> str:
        """The run's folder."""
        kind = "-".join(self.steps) + ("-equal" if self.equal else "")
        return f"{self.cell.task}_{self.cell.lm}_{self.cell.preset}_{kind}_{self.seed}"

    @property
    def schedule(self) -> str:
        return name_of(self.steps)


def cells_of(config: TableConfig) -> list[Cell]:
    """Every task with every LM and preset."""
    return [Cell(t, lm, preset) for t in config.tasks for lm in config.lms for preset in config.presets]


def runs_of(config: TableConfig) -> list[Run]:
    """All runs, in the order to start them: whole seeds first, so that each one ended is a row of the table.

    Within a seed the longest schedule comes first, and the control last: it needs the other's number of LM calls.
    """
    schedules = covering(config.strategies)
    runs: list[Run] = []
    for seed in config.seeds:
        for cell in cells_of(config):
            runs += [Run(cell, steps, seed) for steps in schedules]
            if has_control(config):
                runs.append(Run(cell, CONTROL, seed, equal=True))
    return runs


def needed(config: TableConfig, whole: TableConfig, finished: Callable[[Run], bool]) -> list[Run]:
    """The runs of a part of a table; in place of one that is not finished, a finished one of the table's that begins
    with its steps, if there is one."""
    others = [run for run in runs_of(whole) if not run.equal and finished(run)]
    found = []
    for run in runs_of(config):
        steps = run.steps if config.strategies != ((),) else ()  # vanilla alone is the beginning of each run
        is_source = has_control(config) and run.steps[: len(ALTERNATION)] == ALTERNATION
        longer = [o for o in others if (o.cell, o.seed) == (run.cell, run.seed) and o.steps[: len(steps)] == steps]
        found.append(run if run.equal or is_source or not longer or finished(run) else longer[0])
    return list(dict.fromkeys(found))


def joined(whole: TableConfig, part: TableConfig) -> TableConfig:
    """The table, with those strategies and seeds of a part of it that it does not list itself."""
    strategies, seeds = dict.fromkeys(whole.strategies + part.strategies), dict.fromkeys(whole.seeds + part.seeds)
    return replace(whole, strategies=tuple(strategies), seeds=tuple(seeds))


def shown(config: TableConfig, asked: Sequence[Run], finished: Callable[[Run], bool]) -> list[Run]:
    """The runs that a table's page is read from: those asked for, and all others of cells with one of these or with a
    finished run. Shorter runs, which an earlier part of the table has made, are among them once they are finished."""
    cells = cells_of(config)
    shorter = [Run(cell, s or ("p",), seed) for cell in cells for seed in config.seeds for s in config.strategies]
    runs = list(dict.fromkeys([*runs_of(config), *asked, *filter(finished, shorter)]))
    there = {run.cell for run in asked} | {run.cell for run in runs if finished(run)}
    return [run for run in runs if run.cell in there]


def has_control(config: TableConfig) -> bool:
    """Whether the table has a run that spends as many LM calls as the alternation does."""
    return config.equal_calls and {CONTROL, ALTERNATION} <= set(config.strategies)


def source_of(run: Run, config: TableConfig) -> Run | None:
    """The run whose LM calls a control spends; None for other runs."""
    if not run.equal:
        return None
    steps = next(steps for steps in covering(config.strategies) if steps[: len(ALTERNATION)] == ALTERNATION)
    return Run(run.cell, steps, run.seed)


def words_of(run: Run, config: TableConfig, folder: Path, *, lm_calls: int = 0) -> list[str]:
    """The words behind `cotune` that make this run in `folder`."""
    cell = run.cell
    control = ["--alternate.lm_calls", str(lm_calls)] if run.equal else []
    return [
        "fit",
        *config.words(cell.task, cell.lm, cell.preset),
        *("--runs_dir", str(folder), "--name", run.name, "--seed_everything", str(run.seed)),
        *("--alternate.schedule", run.schedule, "--alternate.test_prefixes", "true", *control),
        *("--trainer.enable_progress_bar", "false"),
    ]
