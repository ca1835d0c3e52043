"""cotune compare: runs side by side, in the terminal and as an HTML page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # the command line is parsed before anything heavy is imported
    from cotune.reporting.comparison import Comparison, Pair
    from cotune.reporting.run_record import RunRecord

_SHOWN = 5
"""Disagreements of a kind that the terminal shows; the page shows all."""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        "cotune compare",
        allow_abbrev=False,
        description="Shows runs side by side: scores by prefix, test, cost and the settings that differ. Over the "
        "examples that they share: the paired difference to the first run, and the examples on which they disagree. "
        "What is no run, or has no score yet, is named and left out.",
    )
    made.add_argument(
        "runs", metavar="RUN_FOLDER", nargs="+", help="folders of two or more runs; the first is the base"
    )
    made.add_argument("--out", metavar="FILE", help="also write an HTML page here, e.g. compare.html")
    return made


def main(options: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ReportError: a folder is not there or damaged, or there are fewer than two runs.
    """
    from cotune.reporting.comparison import compare_runs
    from cotune.reporting.page import render_comparison
    from cotune.reporting.run_record import ReportError
    from cotune.storage.durable import write_whole

    compared = compare_runs(_runs(options.runs))
    _print_comparison(compared, Console())
    if options.out:
        if Path(options.out).is_dir():
            raise ReportError(f'"{options.out}" is a folder; give --out a file, e.g. --out compare.html.')
        write_whole(Path(options.out), render_comparison(compared))
        print(options.out)
    return 0


def _runs(folders: Sequence[str]) -> list[RunRecord]:
    """The runs among them: `runs/*` also names what a refused command has left, and files."""
    from cotune.reporting.run_record import ReportError, read_run

    runs: list[RunRecord] = []
    left: list[ReportError] = []
    for path in map(Path, folders):
        try:
            runs.append(read_run(path))
        except ReportError as error:
            if not path.exists() or (path / "history.jsonl").is_file():
                raise
            left.append(error)
    if left and len(runs) < 2:
        raise left[0]
    for why in left:
        print(f"left out: {why}", file=sys.stderr)
    return runs


def _print_comparison(compared: Comparison, console: Console) -> None:
    """Tables of a terminal's width, then a paragraph a pair."""
    console.print(_runs_table(compared))
    console.print(_scores_table(compared))
    if compared.settings:
        console.print(_settings_table(compared))
    else:
        console.print("The settings do not differ.")
    for pair in compared.pairs:
        for line in _pair_lines(pair):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    for note in compared.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def _pair_lines(pair: Pair) -> Iterator[str]:
    """What a pair says, in lines."""
    from cotune.reporting.journeys import answer_text

    gap = pair.difference
    chance = "" if gap.clear or not (pair.won or pair.lost) else ", which may be chance"
    yield (
        f"{pair.second} against {pair.first} on {pair.part}: {gap.mean:+.3f}, 95 % {gap.low:+.3f} to {gap.high:+.3f} "
        f"(paired bootstrap over {gap.pairs} common examples){chance}; {len(pair.won)} won, {len(pair.lost)} lost."
    )
    if pair.unlike:
        yield f"  {pair.unlike} more have the same id but other inputs or labels, and are left out."
    for what, gaps in (("won", pair.won), ("lost", pair.lost)):
        for gap_ in gaps[:_SHOWN]:
            yield f"  {what} {gap_.example}: {_brief(answer_text(gap_.first))} -> {_brief(answer_text(gap_.second))}"
        if len(gaps) > _SHOWN:
            yield f"  … {len(gaps) - _SHOWN} more {what}"


def _runs_table(compared: Comparison) -> Table:
    table = Table(title="runs")
    for title in ("run", "schedule", "ended with", "val", "test", "LM calls", "tokens", "seconds"):
        table.add_column(title, justify="left" if title in ("run", "schedule", "ended with") else "right")
    for name in compared.names:
        run = compared.runs[name]
        tokens = compared.cost(name, "prompt_tokens") + compared.cost(name, "completion_tokens")
        table.add_row(
            _plain(name),
            " -> ".join(run.schedule),
            run.best.name,
            f"{run.best.val_score:.3f}",
            _score(run.summary.get("test_score")),
            f"{compared.cost(name, 'lm_calls'):,.0f}",
            f"{tokens:,.0f}",
            f"{compared.cost(name, 'seconds'):.0f}",
        )
    return table


def _scores_table(compared: Comparison) -> Table:
    table = Table(title="val score by prefix")
    table.add_column("after")
    for name in compared.names:
        table.add_column(_plain(name), justify="right")
    for prefix in compared.prefixes:
        table.add_row(prefix, *(_score(compared.score(name, prefix)) for name in compared.names))
    return table


def _settings_table(compared: Comparison) -> Table:
    table = Table(title="settings that differ")
    table.add_column("setting", overflow="fold")
    for name in compared.names:
        table.add_column(_plain(name), overflow="fold")
    for key, values in compared.settings.items():
        table.add_row(_plain(key), *(_plain(_value(values, name)) for name in compared.names))
    return table


def _value(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        return "–"
    return "null" if values[name] is None else str(values[name])


def _plain(text: str) -> Any:
    """Text that rich shows as it is, square brackets included."""
    from rich.text import Text

    return Text(text)


def _score(value: Any) -> str:
    return "–" if value is None else f"{float(value):.3f}"


def _brief(text: str) -> str:
    return text if len(text) <= 50 else text[:49] + "…"
