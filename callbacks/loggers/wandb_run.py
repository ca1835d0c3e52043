"""RunLogger: a W&B logger that lives in the run's folder, and goes on where a resumed run goes on."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cotune.callbacks.progress import say
from cotune.callbacks.record_run import write_whole
from cotune.errors import CotuneError
from cotune.storage.redact import HIDDEN, is_secret, redacted
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only


class WandbError(CotuneError):
    """W&B does not take the run. The message says why, and what to do."""


class RunLogger(WandbLogger):
    """Lightning's WandbLogger for a cotune run: one W&B run, however often the process is stopped and continued.

    The id of the W&B run is kept in the run's folder. Each logged point has a number (W&B's `_step`), and
    `wandb/points.jsonl` says which point is which; what a resumed run logs a second time it logs under the same number.
    So W&B is not sent online what it already has. Offline each process writes a file of its own, and in all of them
    together a number stands for one point. What a killed process did not get written, its successor writes.

    Args:
        save_dir: the run's folder; W&B's files go into its `wandb/`.
        keep: go on with the points that are there, as a resumed run does; else their numbers begin at 0.
        options: those of Lightning's WandbLogger and of `wandb.init`; None leaves W&B's own default.
    """

    def __init__(self, save_dir: str | Path, *, keep: bool = False, **options: Any) -> None:
        folder = Path(save_dir) / "wandb"
        folder.mkdir(parents=True, exist_ok=True)  # W&B would else take a temporary folder
        own_id = options.pop("version", None) or options.pop("id", None)
        if options.get("settings") is None:
            options["settings"] = _settings()
        super().__init__(save_dir=str(save_dir), id=own_id or kept_id(folder), **options)
        self.points = Points(folder / "points.jsonl", keep=keep)
        self._mended = not keep

    @property
    def experiment(self) -> Any:
        from wandb.errors import Error

        try:
            with _redacted_command_line():
                return super().experiment
        except Error as error:  # no key, a key that is refused, no connection
            raise WandbError(
                f"W&B cannot be logged to ({' '.join(str(error).split())}) Run `wandb login`, set WANDB_API_KEY, or "
                "keep the run's log here with WANDB_MODE=offline, for `wandb sync` later."
            ) from error

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs one point; `step` is the trainer's."""
        if not self._mended:
            self._mended = True
            self._mend()
        named = {**metrics, **({} if step is None else {"trainer/global_step": step})}
        number = self.points.take(named, step=step or 0, boundary=metrics.get("boundary/index"))
        run = self.experiment
        if number >= run.starting_step:  # else W&B has it, from the process before
            run.log(named, step=max(number, run.step), commit=True)

    def forget(self, *, step: int, boundaries: int) -> None:
        """Gives back the numbers of the points that a run resumed here will log again (see MetricsFile)."""
        self.points.forget(step=step, boundaries=boundaries)

    def _mend(self) -> None:
        """Logs what the process before had logged and a kill kept from being written: its numbers, without tables."""
        run = self.experiment
        if run.offline:
            had = written_points(self.points.path.parent, but=Path(run.dir).parent.name)
        else:
            had = set(range(run.starting_step))
        for point in self.points.behind:
            if point.number not in had:
                run.log(point.metrics, step=point.number, commit=True)


@dataclass(frozen=True)
class Point:
    """One point of a W&B run, and the optimiser step and the boundary it belongs to; only numbers are kept of it."""

    number: int
    step: int
    boundary: int | None
    metrics: Mapping[str, float] = field(default_factory=dict)


class Points:
    """The points logged so far.

    Args:
        path: of the file with a line a point.
        keep: read what is there; else begin anew.
    """

    def __init__(self, path: Path, *, keep: bool) -> None:
        self.path = path
        self._known = {point.number: point for point in _read(path)} if keep else {}
        self._last = max(self._known, default=-1)
        self._write()

    @property
    def behind(self) -> list[Point]:
        """Those with numbers up to the last one given, or up to the first one that was given back."""
        return [self._known[number] for number in range(self._next()) if number in self._known]

    def take(self, metrics: Mapping[str, Any], *, step: int, boundary: float | None) -> int:
        """A number for the next point: the first after the last one given that no other point has."""
        self._last = self._next()
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        point = Point(self._last, step, None if boundary is None else int(boundary), numbers)
        self._known[self._last] = point
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(point))
        return self._last

    def forget(self, *, step: int, boundaries: int) -> None:
        """Frees the numbers of points at or after this optimiser step, or of boundaries past so many."""
        self._known = {
            number: point
            for number, point in self._known.items()
            if (point.step < step if point.boundary is None else point.boundary < boundaries)
        }
        self._last = -1
        self._write()

    def _next(self) -> int:
        number = self._last + 1
        while number in self._known:
            number += 1
        return number

    def _write(self) -> None:
        write_whole(self.path, "".join(_line(point) for point in self._known.values()))


def written_points(folder: Path, *, but: str = "") -> set[int]:
    """The numbers of the points in a folder's offline runs, read by W&B's own reader; `but` is one to leave out."""
    found: set[int] = set()
    for run in sorted(folder.glob("offline-run-*")):
        if run.name != but:
            command = [sys.executable, "-m", "wandb", "leet", "inspect", str(run), "--json"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                say(f"{run} cannot be read; what it lacks is in metrics.csv.")
            records = (json.loads(line) for line in done.stdout.splitlines())
            found |= {record["history"]["item"]["_step"] for record in records if record["type"] == "history"}
    return found


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


def _line(point: Point) -> str:
    return json.dumps(asdict(point)) + "\n"


def _read(path: Path) -> list[Point]:
    """The points of a file; a last line that a kill cut short is left out, its point will be logged again."""
    if not path.is_file():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [Point(**json.loads(line)) for line in lines]
