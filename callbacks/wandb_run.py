"""RunLogger: a W&B logger that lives in the run's folder, and goes on where a resumed run goes on."""

from __future__ import annotations

import csv
import json
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cotune.callbacks.record_run import write_whole
from cotune.callbacks.redact import HIDDEN, is_secret, redacted
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only


class RunLogger(WandbLogger):
    """Lightning's WandbLogger for a cotune run: one W&B run, however often the process is stopped and continued.

    The id of the W&B run is kept in the run's folder. Each logged point has a number (W&B's `_step`), and
    `wandb/points.csv` says which point is which; what a resumed run logs a second time it logs under the same number.
    So W&B drops online what it already has. Offline each process writes a file of its own, and in all of them together
    a number stands for one point.

    Args:
        save_dir: the run's folder; W&B's files go into its `wandb/`.
        keep: go on with the points that are there, as a resumed run does; else their numbers begin at 0.
        options: those of Lightning's WandbLogger and of `wandb.init`; None leaves W&B's own default.
    """

    def __init__(self, save_dir: str | Path, *, keep: bool = False, **options: Any) -> None:
        folder = Path(save_dir) / "wandb"
        folder.mkdir(parents=True, exist_ok=True)  # W&B would else take a temporary folder
        own_id = options.pop("version", None) or options.pop("id", None)
        options.setdefault("settings", _settings())
        super().__init__(save_dir=str(save_dir), id=own_id or kept_id(folder), **options)
        self.points = Points(folder / "points.csv", keep=keep)

    @property
    def experiment(self) -> Any:
        if self._experiment is not None:
            return self._experiment
        with _redacted_command_line():
            return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs one point; `step` is the trainer's."""
        number = self.points.take(step=step or 0, boundary=metrics.get("boundary/index"))
        run = self.experiment
        if number < run.starting_step:  # W&B has it, from the process before
            return
        named = {**metrics, **({} if step is None else {"trainer/global_step": step})}
        run.log(named, step=max(number, run.step), commit=True)

    def forget(self, *, step: int, boundaries: int) -> None:
        """Gives back the numbers of the points that a run resumed here will log again (see MetricsFile)."""
        self.points.forget(step=step, boundaries=boundaries)


class Points:
    """The numbers of the points logged so far, each with the optimiser step and the boundary it belongs to.

    Args:
        path: of the csv file with a line a point.
        keep: read what is there; else begin anew.
    """

    def __init__(self, path: Path, *, keep: bool) -> None:
        self.path = path
        self._known: dict[int, tuple[int, int | None]] = _read(path) if keep else {}
        self._last = max(self._known, default=-1)
        self._write()

    def take(self, *, step: int, boundary: float | None) -> int:
        """A number for the next point: the first after the last one given that no other point has."""
        self._last += 1
        while self._last in self._known:
            self._last += 1
        self._known[self._last] = (step, None if boundary is None else int(boundary))
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow(_row(self._last, self._known[self._last]))
        return self._last

    def forget(self, *, step: int, boundaries: int) -> None:
        """Frees the numbers of points at or after this optimiser step, or of boundaries past so many."""
        self._known = {
            number: (at, boundary)
            for number, (at, boundary) in self._known.items()
            if (at < step if boundary is None else boundary < boundaries)
        }
        self._last = -1
        self._write()

    def _write(self) -> None:
        rows = [("point", "step", "boundary"), *(_row(number, where) for number, where in self._known.items())]
        write_whole(self.path, "".join(",".join(map(str, row)) + "\n" for row in rows))


def kept_id(folder: Path) -> str:
    """The id of the W&B run that this folder belongs to; a new one, written down, if it has none."""
    path = folder / "run.json"
    if path.is_file():
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    made = secrets.token_hex(4)
    write_whole(path, json.dumps({"id": made}) + "\n")
    return made


def _settings() -> Any:
    """W&B writes its file every 15 seconds and a killed process loses what was not written; 1 second loses less."""
    import wandb

    name = "x_transaction_log_flush_interval"
    return wandb.Settings(**{name: 1.0}) if name in wandb.Settings.model_fields else None


@contextmanager
def _redacted_command_line() -> Iterator[None]:
    """W&B records sys.argv when a run begins."""
    words = sys.argv
    sys.argv = [
        HIDDEN if before.startswith("--") and is_secret(before) else _redacted_word(word)
        for before, word in zip(["", *words], words, strict=False)
    ]
    try:
        yield
    finally:
        sys.argv = words


def _redacted_word(word: str) -> str:
    name, equals, _ = word.partition("=")
    return f"{name}={HIDDEN}" if equals and word.startswith("--") and is_secret(name) else str(redacted(word))


def _row(number: int, where: tuple[int, int | None]) -> tuple[Any, ...]:
    step, boundary = where
    return number, step, "" if boundary is None else boundary


def _read(path: Path) -> dict[int, tuple[int, int | None]]:
    """The points of a file; a last line that a kill cut short is left out, its point will be logged again."""
    if not path.is_file():
        return {}
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    rows = [line.strip().split(",") for line in lines[1:]]
    return {int(number): (int(step), int(boundary) if boundary else None) for number, step, boundary in rows}
