"""MetricsFile: metrics.csv of a run, which goes on where a resumed run goes on."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from cotune.lightning_modules.lightning_internals import WholeWriter
from cotune.storage.durable import as_not_written, write_whole
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only


class MetricsFile(CSVLogger):
    """Lightning's CSVLogger, which loses nothing: it writes each row at once, and keeps the rows of an earlier process.

    Args:
        folder: of metrics.csv.
        keep: go on with the file that is there, as a resumed run does; else it is replaced.
    """

    def __init__(self, folder: str | Path, *, keep: bool = False) -> None:
        path = Path(folder)
        super().__init__(str(path.parent), name=path.name, version="", flush_logs_every_n_steps=1)
        self.path, self._keep = path / ExperimentWriter.NAME_METRICS_FILE, keep
        self._writer: _Writer | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:  # each row is written as it comes, so the base class has nothing to finish
        self._writer = self._writer or _Writer(str(self.path.parent), keep=self._keep)
        return self._writer

    def forget(self, *, step: int, boundaries: int) -> list[dict[str, float]]:
        """Drops the rows that a run resumed at this step, with so many boundaries reached, will write again.

        Returns:
            The others.
        """
        if getattr(rank_zero_only, "rank", 0) or not self.path.is_file():
            return []
        names, rows = _read(self.path)
        kept = [row for row in rows if _before(row, step, boundaries)]
        write_whole(self.path, _csv_text(names, kept))
        return [{name: float(value) for name, value in row.items() if value} for row in kept]


class _Writer(WholeWriter):
    def __init__(self, folder: str, *, keep: bool) -> None:
        self._keep = keep
        super().__init__(folder)

    def save(self) -> None:
        with as_not_written(Path(self.metrics_file_path)):
            super().save()

    def begin(self) -> None:
        path = Path(self.metrics_file_path)
        if not self._keep:
            path.unlink(missing_ok=True)
        elif path.is_file():
            self.metrics_keys, _ = _read(path)

    def rewrite(self, names: list[str]) -> None:
        path = Path(self.metrics_file_path)
        write_whole(path, _csv_text(names, _read(path)[1]))


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Column names and whole rows. A row that a kill or a full disk cut short is dropped, with what was written after
    it on its line: a run is continued from a step before it, and writes both again."""
    text = path.read_bytes().decode("utf-8")
    whole = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(whole, newline=""))
    return list(reader.fieldnames or ()), [row for row in reader if None not in row and None not in row.values()]


def _before(row: dict[str, str], step: int, boundaries: int) -> bool:
    if not row.get("step"):
        return False
    if row.get("boundary/index"):
        return float(row["boundary/index"]) < boundaries
    return int(row["step"]) < step


def _csv_text(names: list[str], rows: list[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=names)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
