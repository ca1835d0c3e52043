"""The closing table: scores by prefix, what they cost, and where the result is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cotune.programs.faults import faults_from_dict


def closing_table(folder: Path, console: Console | None = None) -> None:
    """Prints a finished run's table from its files."""
    console = console or Console()
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    lines = (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
    kept = "the best on val" if summary["scores"][summary["best"]] == max(summary["scores"].values()) else "the last"
    table = Table(title=f"{folder.name}: {summary['schedule']}")
    for name in ("after", "val score", "format failures", "LM calls", "seconds"):
        table.add_column(name, justify="left" if name == "after" else "right")
    for record in map(json.loads, lines):
        best = record["prefix"] == summary["best"]
        table.add_row(
            record["prefix"] + (" *" if best else ""),
            f"{record['val_score']:.3f}",
            str(record["failures"].get("format", 0)),
            f"{record['lm_calls']:,}",
            f"{record['seconds']:.0f}",
            style="bold" if best else None,
        )
    console.print(table)
    tested = summary["test_score"]
    said = "not tested" if tested is None else f"test score {tested:.3f}"
    console.print(
        f"* kept: {kept}; {said}. {summary['seconds']['total']:.0f} s in all.", highlight=False, soft_wrap=True
    )
    for line in fault_lines(summary):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"Export: {folder / 'export'}", highlight=False, markup=False, soft_wrap=True)


def fault_lines(summary: Mapping[str, Any]) -> list[str]:
    """A line for each kind of fault of the user's code, in the run and in its closing test."""
    return [
        f"{where}the {kind} failed {fault}"
        for where, name in (("Faults, scored 0: ", "faults"), ("Faults on test, scored 0: ", "test_faults"))
        for kind, fault in faults_from_dict(summary.get(name) or {}).items()
    ]
