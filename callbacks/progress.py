"""Progress of the steps that are not training epochs: prompt search, trace collection, validation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from cotune.lightning_modules.lightning_internals import DescribedBar
from cotune.programs.lm import told_of_completions
from cotune.prompting import Candidate
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

_QUIET = 60.0
"""Seconds after which a log file is told how far a step is, where nothing else was said."""


class StepProgress:
    """A bar in a terminal; elsewhere a line per candidate, and one a minute. Satisfies `cotune.prompting.Progress`.

    Args:
        title: what the bar is of, e.g. "[1/3] prompt step".

    Attributes:
        tried: candidates so far that were scored to the end.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self.tried: list[Candidate] = []
        self._console = _console()
        self._bar = Progress(
            # A line that is too long for the terminal would be drawn anew below itself at every refresh.
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            # Time moves on also while one LM batch is under way, which can be all there is.
            TimeElapsedColumn(),
            TextColumn("•"),  # as in Lightning's bar
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            transient=True,
            refresh_per_second=4,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=None, rate="", visible=False)  # until it is known of what
        self._started, self._ended, self._calls, self._head = time.perf_counter(), 0, 0, ""
        self._said = self._started
        self._listening = told_of_completions(self._completed)

    def __enter__(self) -> StepProgress:
        self._bar.start()
        self._listening.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listening.__exit__(kind, error, trace)
        self._bar.stop()

    def start(self, total: int, what: str) -> None:
        self._started, self._ended, self._calls = time.perf_counter(), 0, 0
        what = f"{self._title}: {self._head or what}"
        self._bar.reset(self._task, total=total, visible=True, description=what, rate="")

    def advance(self, n: int) -> None:
        self._ended += n
        self._tell(n)

    def _completed(self, n: int) -> None:
        self._calls += n
        self._tell(0)

    def _tell(self, ended: int) -> None:
        """A pass can be one LM batch, or one a stage: then all examples end at once, and only LM calls tell before."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        said = [f"{self._ended / seconds:.1f} examples/s"] if self._ended else []
        said += [f"{self._calls:,} LM calls"] if self._calls else []
        self._bar.update(self._task, advance=ended, rate=said[0] if said else "")
        if not self._console.is_terminal and time.perf_counter() - self._said >= _QUIET:
            task = self._bar.tasks[0]
            total = "" if task.total is None else f"/{task.total:.0f}"
            self._print(", ".join([f"{task.description}: {task.completed:.0f}{total}", *said]))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Takes the bar off the terminal for a while."""
        shown = self._bar.tasks[0].visible
        self._bar.update(self._task, visible=False)  # a bar that starts again erases as many lines as it had
        self._bar.refresh()
        self._bar.stop()
        yield
        self._bar.start()
        self._bar.update(self._task, visible=shown)

    def candidate(self, index: int, total: int, candidate: Candidate, best: float) -> None:
        self._head = f"candidate {index + 2}/{total}, best {best:.3f}" if index + 1 < total else ""
        self.tried += [] if candidate.pruned else [candidate]
        ended = "pruned at" if candidate.pruned else "score"
        calls = [f"{n} of the {role}" for role, n in candidate.lineage.get("calls", {}).items()]
        spent = f"; LM calls so far: {', '.join(calls)}" if calls else ""
        scored = f"{ended} {candidate.score:.3f}, best {best:.3f}"
        self.say(f"candidate {index + 1}/{total} ({candidate.why}): {scored}{spent}")

    def say(self, line: str) -> None:
        """A line that stays, above the bar."""
        self._print(f"{self._title}: {line}")

    def _print(self, line: str) -> None:
        self._said = time.perf_counter()
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class TrainingBar(DescribedBar):
    """Lightning's bar in the words of the schedule, with the loss and the latest val score; gone when it is over.

    Args:
        title: gives the epoch under way in words; Lightning's own are counted from 0 and over all weight steps.
    """

    def __init__(self, title: Callable[[], str]) -> None:
        super().__init__()
        self._title = title

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        logged = super().get_metrics(trainer, pl_module)
        shown = {"loss": "train/loss", "val": "val/score"}
        return {name: logged[key] for name, key in shown.items() if key in logged}

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        # Narrow, and without the batches a second, so that all of it fits into 80 columns.
        text, _, batches, clock, _ = super().configure_columns(trainer)
        return [text, BarColumn(bar_width=10), batches, clock]

    def description(self) -> str:
        return self._title().replace("[", r"\[")  # the bar reads it as markup


def say(line: str) -> None:
    """A line that stays, on a terminal and in a log file."""
    _console().print(line, highlight=False, markup=False, soft_wrap=True)


def _console() -> Console:
    """Of several processes that do the same, the first one's is seen."""
    return Console(quiet=bool(getattr(rank_zero_only, "rank", 0)))


def say_if_piped(line: str) -> None:
    """A line of a log file; a terminal shows the same in Lightning's bar."""
    if not Console().is_terminal:
        say(line)


@contextmanager
def training_bar_paused(trainer: Trainer) -> Iterator[None]:
    """Takes Lightning's bar off the terminal, so that a bar of ours can stand there; puts it back afterwards."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.progress is not None and bar.progress.live.is_started:
        # Hidden, not only stopped: a bar that starts again first erases as many lines as it had when it stopped.
        shown = [task.id for task in bar.progress.tasks if task.visible]
        _set_visible(bar.progress, shown, False)
        bar.progress.stop()
        yield
        bar.progress.start()
        _set_visible(bar.progress, shown, True)
    elif isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        bar.train_progress_bar.clear()
        yield
        bar.train_progress_bar.refresh()
    else:
        yield


def _set_visible(bar: Progress, tasks: Sequence[TaskID], visible: bool) -> None:
    for task in tasks:
        bar.update(task, visible=visible)
    bar.refresh()
