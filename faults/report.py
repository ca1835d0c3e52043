"""docs/FAULTS.md, made of the trials' results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from faults.trials import Trial, Trials

_HOW = {
    "SIGKILL": "at random times in every phase, tiny model; one run in five is killed three times",
    "SIGKILL, other shapes": "of runs that accumulate, have one batch an epoch, prompt steps alone, or no store",
    "SIGKILL, SmolLM2": "at random times in every phase, SmolLM2-135M-Instruct",
    "crash points": "around every flush, move, transaction and optimiser step",
    "SIGTERM": "at random times",
    "Ctrl-C": "at random times",
    "SIGTERM twice": "at random times, the second 10 ms after the first",
    "Ctrl-C twice": "at random times, the second 10 ms after the first",
    "two runs in one directory": "at once, or the second at a random moment of the first",
    "damaged files": "bits flipped at random, cuts at every record boundary and elsewhere; read as by a run",
    "damaged files, whole runs": "the same, and the same command again",
    "a disk that fills": "the run's folder on a tmpfs of 16 KiB, 32 KiB, …",
    "writes cut short": "RLIMIT_FSIZE of 512 B, 2.5 KiB, …: the last write is short, the next one fails",
    "NaN loss": "one row's loss, at every k-th computation of losses",
    "Inf loss": "one row's loss, at every k-th computation of losses",
    "out of memory in training": "torch.OutOfMemoryError for more than one row, from every k-th computation on",
    "out of memory in generation": "torch.OutOfMemoryError at every fifth forward pass, once",
    "little memory (RLIMIT_AS)": "address space of 2, 10, 18, … MB more than at the start",
    "several processes": "SIGKILL of the first, of another or of all, at random times; 1, 2 or 4 go on each time",
    "a key in the environment": "six variables hold a key; every file that the run writes is searched for it",
    "nonsense: rows": "Hypothesis: missing keys, wrong types, NaN, long texts, half surrogate pairs, equal ids",
    "nonsense: files": "Hypothesis: files of all formats, cut short and with bytes changed",
    "nonsense: completions": "Hypothesis: what an LM might write, field markers anywhere",
    "nonsense: templates": "Hypothesis: special tokens and field markers in inputs, demos and instructions",
    "nonsense: users_code": "Hypothesis: what a program yields and returns, and a metric gives",
    "nonsense: configs": "Hypothesis: options of the command line with values of all kinds",
}


def write_report(trials: Trials, path: Path) -> None:
    """Writes the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(trials), encoding="utf-8", errors="backslashreplace")


def page(trials: Trials) -> str:
    """The page as Markdown."""
    parts = {name: list(found.values()) for name, found in trials.parts.items() if found}
    machine = trials.machine
    lines = [
        "# Faults",
        "",
        "What happens to a run when it is killed, starved, interrupted, damaged or fed with nonsense. Made by "
        "`make faults` from `benchmarks/results/faults.json`; do not edit it by hand.",
        "",
        "Survived: after the fault, the same command again ended with the adapter (SHA-256), prompts and scores of a "
        "run that nobody disturbed; or, where the fault is the user's to mend, it was refused with one message. Units "
        "redone are LM waves and optimiser steps that were begun a second time, the one under way included. A silent "
        "loss is a wrong result, or a damaged file that was believed, without a word.",
        "",
        f"{machine.get('system', '')}, {machine.get('cores', '')} cores, Python {machine.get('python', '')}. The runs "
        "are children forked from a process that has everything imported, which saves ten seconds each; it is the "
        "child that is killed. The tiny model has two layers and random weights; loop, files and signals are real.",
        "",
        *table(
            ("fault", "how", "trials", "survived", "units redone", "silent losses"),
            [_row(name, found) for name, found in _ordered(parts)],
        ),
        "",
        *_kills(parts),
        *_stops(parts),
        *_damage(parts),
        *_messages(parts),
        *_failures(trials),
    ]
    return "\n".join(lines).rstrip() + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table."""
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows),
    ]


def _ordered(parts: Mapping[str, Sequence[Trial]]) -> list[tuple[str, Sequence[Trial]]]:
    known = list(_HOW)
    place = {name: known.index(name) if name in known else known.index("a disk that fills") - 0.5 for name in parts}
    return sorted(parts.items(), key=lambda item: place[item[0]])


def _row(name: str, found: Sequence[Trial]) -> tuple[Any, ...]:
    tried = [trial for trial in found if not trial.get("end")]
    count = sum(trial.get("trials", 1) for trial in tried)
    bad = sum(trial.get("silent", 0) if "verdicts" in trial else not trial["ok"] for trial in tried)
    how = _HOW.get(name, "the k-th such call on the run's files fails, every k (strace)")
    redone = sum(max(trial.get("redone", 0), 0) for trial in tried)
    return name, how, f"{count:,}", f"{count - bad:,}", redone, sum(trial.get("silent", 0) for trial in tried)


def _kills(parts: Mapping[str, Sequence[Trial]]) -> list[str]:
    names = [name for name in ("SIGKILL", "SIGKILL, other shapes", "SIGKILL, SmolLM2") if name in parts]
    if not names:
        return []
    rows = []
    for name in names:
        phases = Counter(phase for trial in parts[name] for phase in trial.get("phases", ()))
        kills = sum(phases.values())
        most = max((trial.get("redone", 0) / max(trial.get("kills", 1), 1) for trial in parts[name]), default=0)
        where = ", ".join(f"{phase} {count}" for phase, count in phases.most_common())
        rows.append((name, kills, f"{most:.2f}", where))
    return ["## Kills by phase", "", *table(("fault", "kills", "most units redone a kill", "where"), rows), ""]


def _stops(parts: Mapping[str, Sequence[Trial]]) -> list[str]:
    rows = []
    for name in ("SIGTERM", "Ctrl-C", "SIGTERM twice", "Ctrl-C twice"):
        found = [trial for trial in parts.get(name, ()) if "seconds to exit" in trial]
        if found:
            seconds = sorted(trial["seconds to exit"] for trial in found)
            codes = ", ".join(str(code) for code in sorted({trial["exit code"] for trial in found}))
            redone = max(trial["redone"] for trial in found)
            rows.append((name, f"{seconds[len(seconds) // 2]:.2f}", f"{seconds[-1]:.2f}", codes, redone))
    header = ("signal", "seconds to exit, median", "longest", "exit codes", "most units redone")
    note = "A negative exit code is the signal's own, before the command has begun to handle it."
    return ["## Stopping", "", *table(header, rows), "", note, ""] if rows else []


def _damage(parts: Mapping[str, Sequence[Trial]]) -> list[str]:
    found = [trial for trial in parts.get("damaged files", ()) if "verdicts" in trial]
    if not found:
        return []
    total: Counter[str] = Counter()
    for trial in found:
        total.update(trial["verdicts"])
    count = sum(total.values())
    said = ", ".join(f"{verdict} {number:,} ({100 * number / count:.1f} %)" for verdict, number in total.most_common())
    return ["## Damaged files", "", f"{count:,} damages of {len(found)} files: {said}.", ""]


def _messages(parts: Mapping[str, Sequence[Trial]]) -> list[str]:
    lines = ["## What is said", ""]
    for name, found in _ordered(parts):
        said = [trial["said"] for trial in found if trial.get("said") and trial["ok"]]
        if said:
            lines += [f"- **{name}**: `{_plain(Counter(said).most_common(1)[0][0])}`"]
    return [*lines, ""]


def _failures(trials: Trials) -> list[str]:
    failed = [(part, key, _plain(trial.get("said", ""))) for part, key, trial in trials.failures()]
    if not failed:
        return ["## What does not hold", "", "No trial failed."]
    return ["## What does not hold", "", *table(("fault", "trial", "said"), failed)]


def _plain(text: str, limit: int = 300) -> str:
    line = " ".join(text.replace("`", "'").split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
