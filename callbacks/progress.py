"""Progress of the steps that are not training epochs: prompt search, trace collection, validation."""

from __future__ import annotations

import time
from types import TracebackType

from cotune.prompting import Candidate
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class StepProgress:
    """A bar in a terminal; a line per candidate elsewhere. Satisfies `cotune.prompting.Progress`.

    Args:
        title: what the bar is of, e.g. "[1/3] prompt step".
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._console = Console(soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=None, rate="")
        self._started, self._ended, self._head = time.perf_counter(), 0, ""

    def __enter__(self) -> StepProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, total: int, what: str) -> None:
        self._started, self._ended = time.perf_counter(), 0
        head = f"{self._head} {what}".strip()
        self._bar.reset(self._task, total=total, description=f"{self._title}: {head}", rate="")

    def advance(self, n: int) -> None:
        self._ended += n
        seconds = max(time.perf_counter() - self._started, 1e-9)
        self._bar.update(self._task, advance=n, rate=f"{self._ended / seconds:.1f} examples/s")

    def candidate(self, index: int, total: int, candidate: Candidate, best: float) -> None:
        self._head = f"candidate {index + 2}/{total}, best {best:.3f}," if index + 1 < total else ""
        ended = "pruned at" if candidate.pruned else "score"
        self.say(f"candidate {index + 1}/{total} ({candidate.why}): {ended} {candidate.score:.3f}, best {best:.3f}")

    def say(self, line: str) -> None:
        """A line that stays, above the bar."""
        self._console.print(f"{self._title}: {line}", highlight=False, markup=False)
