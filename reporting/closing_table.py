"""The closing table: scores by prefix, what they cost, and where the result is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cotune.programs.faults import faults_from_dict
from cotune.programs.judge import Noise
from cotune.programs.usage import Usage
from cotune.storage.durable import DamagedFileError, lines_of, read_durably
from rich.console import Console
from rich.table import Table


def closing_table(folder: Path, console: Console | None = None) -> None:
    """Prints a finished run's table from its files.

    Raises:
        DamagedFileError: summary.json is not as the run wrote it.
    """
    console = console or Console()
    summary = json.loads(read_durably(folder / "summary.json"))
    records, damage = read_history(folder / "history.jsonl")
    kept = "the best on val" if summary["scores"][summary["best"]] == max(summary["scores"].values()) else "the last"
    table = Table(title=f"{folder.name}: {summary['schedule']}")
    cells = [_cells(record) for record in records]
    # Failures have columns where there are any. On a narrow terminal heads of numbers are broken, never a prefix.
    shown = [
        name for name in (cells or [{}])[0] if name not in _FAILURES or any(row[name] not in ("", "0") for row in cells)
    ]
    for name in ("after", *shown):
        table.add_column(name, justify="left" if name == "after" else "right", no_wrap=name == "after")
    for record, row in zip(records, cells, strict=True):
        best = record["prefix"] == summary["best"]
        first = record["prefix"] + (" *" if best else "")
        table.add_row(first, *(row[name] for name in shown), style="bold" if best else None)
    console.print(table)
    tested = summary["test_score"]
    message = "not tested" if tested is None else f"test score {tested:.3f}"
    if summary.get("ended"):
        steps = summary["schedule"].count("->") + 1
        where = "in the closing test" if len(records) > steps else f"in step {len(records)} of {steps}"
        message += f"; ended by {summary['ended']} {where}"
    if summary.get("found"):
        message += f"; exported is the search's {summary['found']}"
    console.print(
        f"* kept: {kept}; {message}. {summary['seconds']['total']:.0f} s in all.", highlight=False, soft_wrap=True
    )
    for line in set_metric_lines(summary, records):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    judged = judge_line(summary.get("judge"))
    for line in [*([f"Metric: {judged}"] if judged else []), *cost_lines(summary), *_fault_lines(summary)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if damage:
        console.print(damage, highlight=False, markup=False, soft_wrap=True)
    for line in coverage_lines(records):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"Export: {folder / 'export'}", highlight=False, markup=False, soft_wrap=True)


def rank_of(record: Mapping[str, Any]) -> tuple[float, float]:
    """What the prefixes of a run are chosen by, the highest first: val score, then how few tokens a run of val takes.

    Of equal ranks the earlier prefix is kept. Older records have no tokens.
    """
    return float(record["val_score"]), -float(record.get("val_tokens", 0.0))


def read_history(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The records of a history.jsonl; of a damaged one those up to the first that cannot be read, and what is wrong."""
    try:
        return [json.loads(line) for line in lines_of(read_durably(path))], ""
    except (DamagedFileError, FileNotFoundError) as error:
        damage = str(error)
    records: list[dict[str, Any]] = []
    lines = lines_of(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records, f"{damage} Shown are {len(records)} of {len(lines)} records; any of them may be wrong."


def set_metric_lines(summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each metric of a whole set: on val of the program that was kept, and on test, with their intervals."""
    kept = next((record for record in records if record["prefix"] == summary["best"]), {})
    val = (kept.get("diagnosis") or {}).get("set_metrics", {})
    parts = {"val": val, "test": summary.get("test_set_metrics") or {}}
    names = dict.fromkeys(name for found in parts.values() for name in found)
    return [
        f"{name}: "
        + ", ".join(
            f"{part} {found[name][0]:.3f} ({found[name][1]:.3f} to {found[name][2]:.3f})"
            for part, found in parts.items()
            if name in found
        )
        for name in names
    ]


def cost_lines(summary: Mapping[str, Any]) -> list[str]:
    """A line for each role whose LM was paid."""
    return [f"Paid, {role}: {Usage(**usage)}" for role, usage in (summary.get("costs") or {}).items()]


def judge_line(judge: Mapping[str, Any] | None) -> str:
    """What a judge's noise was measured to be; "" where it was not."""
    return str(Noise(**judge)) if judge else ""


def coverage_lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each weight step, how many examples had a passing trace, by label and by stage; and why it was undone."""
    lines = []
    for record in records:
        found = record.get("traces") or {}
        labels = [f"{label} {solved} of {total}" for label, (solved, total) in found.get("by_label", {}).items()]
        stages = [f"{stage} {count}" for stage, count in found.get("by_stage", {}).items()]
        parts = [*labels, *(stages if len(stages) > 1 else [])]
        if found and "solved" in found:
            reused = found.get("runs", 1) == 0
            count = f"reused, of {found['examples']}" if reused else f"{found['solved']} of {found['examples']}"
            head = f"Traces for {record['prefix']}: {count} examples"
            gold = f", {found['gold']} more with their gold answer" if found.get("gold") else ""
            lines.append((f"{head} ({'; '.join(parts)})" if parts else head) + gold)
            lines += [f"{record['prefix']}: {note}" for note in record.get("notes", ())]
    return lines


_FAILURES = ("closed at limit", "out of type", "no answer")


def _cells(record: Mapping[str, Any]) -> dict[str, str]:
    """What the table says of a boundary, by column; "" where the record does not know."""
    found = record.get("diagnosis") or {}
    moved = {name: str(len(found[name])) if name in found else "" for name in ("won", "lost")}
    missed = {
        name: str(found[key]) if key in found else ""
        for name, key in (("wrong", "wrong"), ("closed at limit", "closed"))
    }
    failed = {
        name: str(record["failures"].get(kind, 0)) for name, kind in (("out of type", "type"), ("no answer", "format"))
    }
    cost = {"LM calls": f"{record['lm_calls']:,}", "seconds": f"{record['seconds']:.0f}"}
    return {"val score": f"{record['val_score']:.3f}", **moved, **missed, **failed, **cost}


def _fault_lines(summary: Mapping[str, Any]) -> list[str]:
    """A line for each kind of fault of the user's code, in the run and in its closing test."""
    return [
        f"{where}the {kind} failed {fault}"
        for where, name in (("Faults, scored 0: ", "faults"), ("Faults on test, scored 0: ", "test_faults"))
        for kind, fault in faults_from_dict(summary.get(name) or {}).items()
    ]
