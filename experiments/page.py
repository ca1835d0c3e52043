"""Page: a table as Markdown and JSON, its numbers beside the paper's."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cotune.experiments.paper import LMS, SOURCE, paper_scores
from cotune.experiments.results import Attempt, Row, RunResult, rows_of
from cotune.experiments.runs import CONTROL, EQUAL_CALLS, Cell, cells_of
from cotune.experiments.table_config import TableConfig
from cotune.reporting.statistics import paired_difference, standard_error, widened
from cotune.storage.schedule_text import name_of

_CONTROL = name_of(CONTROL)
_RULES = {
    "best": "that of the best prefix by val, as `cotune fit` returns it (`keep: best`)",
    "last": "that of the last step, as in the paper (`keep: last`)",
}


def table_record(config: TableConfig, results: Sequence[RunResult]) -> dict[str, Any]:
    """The cells that results are of in plain types: what table.json holds, and Markdown and plot are made of."""
    finished, cells = sum(result.finished for result in results), {result.run.cell for result in results}
    return {
        "name": config.name,
        "runs": len(results),
        "finished": finished,
        "seeds": list(config.seeds),
        "paper": SOURCE,
        "interval": "95 %, pigeonhole bootstrap over seeds and test examples, paired; not corrected for several rows",
        "cells": [_cell_record(cell, config, results) for cell in cells_of(config) if cell in cells],
    }


def markdown(record: Mapping[str, Any]) -> str:
    """The record as a Markdown page."""
    lines = [f"# {record['name']}", ""]
    if record["finished"] < record["runs"]:
        lines += [f"{record['finished']} of {record['runs']} runs are finished; what is missing is marked with –.", ""]
    for cell in record["cells"]:
        lines += [*_cell_lines(cell), ""]
    return "\n".join(lines)


def _cell_record(cell: Cell, config: TableConfig, results: Sequence[RunResult]) -> dict[str, Any]:
    rows = rows_of(cell, config, results)
    known = {row.strategy: row for row in rows}
    keeps = sorted({r.keep for r in results if r.run.cell == cell and r.history})
    return {
        "task": cell.task,
        "lm": cell.lm,
        "preset": cell.preset,
        "keep": keeps[0] if len(keeps) == 1 else "",
        "papers_task": config.tasks[cell.task].paper,
        "rows": [_row_record(row, known, cell, config.tasks[cell.task].paper) for row in rows],
    }


def _row_record(row: Row, known: Mapping[str, Row], cell: Cell, papers_task: str) -> dict[str, Any]:
    scores = [attempt.score for attempt in row.attempts]
    error = standard_error(scores)
    return {
        "strategy": row.strategy,
        "mean": _mean(scores),
        "standard_error": None if error != error else error,
        "seeds": len(scores),
        "examples": max((len(attempt.scores) for attempt in row.attempts), default=0),
        "by_seed": {attempt.seed: _without_scores(attempt) for attempt in row.attempts},
        "missing": dict(row.missing),
        "to_control": _difference_of(row, known.get(_CONTROL)),
        "to_equal_calls": _difference_of(row, known.get(EQUAL_CALLS)),
        "lm_calls": _mean([attempt.lm_calls for attempt in row.attempts]),
        "seconds": statistics.median([attempt.seconds for attempt in row.attempts]) if row.attempts else None,
        "unreadable": _mean([attempt.unreadable / max(len(attempt.scores), 1) for attempt in row.attempts]),
        "paper": paper_scores(papers_task, row.strategy),
        "papers_lm": cell.lm if cell.lm in LMS else "",
    }


def _without_scores(attempt: Attempt) -> dict[str, Any]:
    return {name: value for name, value in asdict(attempt).items() if name not in ("seed", "scores")}


def _difference_of(row: Row, control: Row | None) -> dict[str, Any] | None:
    if control is None or control.strategy == row.strategy:
        return None
    found = paired_difference(
        {attempt.seed: attempt.scores for attempt in control.attempts},
        {attempt.seed: attempt.scores for attempt in row.attempts},
    )
    if found is None:
        return None
    # Of a difference, the noise of both scores; over all pairs, as the judge errs in each anew.
    noise = sum(max((attempt.noise for attempt in one.attempts), default=0.0) for one in (row, control)) / found.pairs
    low, high = widened(found.mean, (found.low, found.high), noise, floor=-1.0) if noise else (found.low, found.high)
    return {**asdict(found), "low": low, "high": high}


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


# Markdown


def _cell_lines(cell: Mapping[str, Any]) -> list[str]:
    rows = cell["rows"]
    equal = any(row["to_equal_calls"] for row in rows)
    papers = _paper_heading(cell)
    heads = ["strategy", "test", "− p → p", *(["− p → p, equal calls"] if equal else []), "LM calls", "seconds"]
    heads += ["no answer", "seeds × examples", *([papers] if papers else [])]
    lines = [f"## {cell['task']}, {cell['lm']}, {cell['preset']}", "", _joined(heads)]
    lines.append(_joined(["---"] + ["---:"] * (len(heads) - 1)))
    for row in rows:
        cells = [row["strategy"].replace("->", "→"), _score(row), _difference(row["to_control"])]
        cells += [_difference(row["to_equal_calls"])] if equal else []
        cells += [_number(row["lm_calls"]), _number(row["seconds"]), _share(row["unreadable"])]
        cells += [f"{row['seeds']} × {row['examples']}", *([_paper(row)] if papers else [])]
        lines.append(_joined(cells))
    return [*lines, "", _caption(cell, equal=equal), *_dashes(rows)]


def _caption(cell: Mapping[str, Any], *, equal: bool) -> str:
    rule = _RULES.get(cell["keep"], "that of each run's own `keep`")
    message = (
        f"Test score in per cent, mean ± standard error over seeds; a strategy's program is {rule}. Differences are "
        "paired by seed and test example, with 95 % intervals (pigeonhole bootstrap over both; no correction for "
        "several rows). LM calls (mean) and seconds (median over seeds) are those of all the strategy's steps, test "
        "excluded; seconds where the completion store had least to give. No answer: test answers that did not parse."
    )
    if equal:
        message += (
            " Equal calls: p → p whose second search keeps trying random demo sets until the run has made as many LM "
            "calls as p → w → p of the same seed; what training costs beside LM calls is not counted there."
        )
    return f"{message} Paper: {SOURCE}." if cell["papers_task"] else message


def _dashes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why cells are empty, each reason once."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for seed, why in row["missing"].items():
            reasons.setdefault(why, {}).setdefault(row["strategy"].replace("->", "→"), []).append(str(seed))
    lines = []
    for why, where in reasons.items():
        named = (f"{name} (seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)})" for name, seeds in where.items())
        lines += ["", f"– {', '.join(named)}: {why}"]
    return lines


def _paper_heading(cell: Mapping[str, Any]) -> str:
    if not cell["papers_task"]:
        return ""
    named = next((row["papers_lm"] for row in cell["rows"] if row["papers_lm"]), "")
    return f"paper, {named}" if named else "paper, " + " / ".join(name.split("-instruct")[0] for name in LMS)


def _paper(row: Mapping[str, Any]) -> str:
    found = row["paper"]
    names = [row["papers_lm"]] if row["papers_lm"] else list(LMS)
    return " / ".join("–" if found[name] is None else f"{found[name]:.1f}" for name in names) if found else ""


def _score(row: Mapping[str, Any]) -> str:
    if row["mean"] is None:
        return "–"
    error = row["standard_error"]
    return f"{100 * row['mean']:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{100 * found['mean']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _joined(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
