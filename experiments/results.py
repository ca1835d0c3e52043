"""Results: what finished runs say of each strategy, read from their folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from cotune.experiments.runs import ALTERNATION, CONTROL, EQUAL_CALLS, Cell, Run, has_control
from cotune.experiments.strategies import Steps
from cotune.experiments.table_config import TableConfig, TableError
from cotune.reporting.closing_table import rank_of, read_history
from cotune.storage.durable import lines_of, read_durably
from cotune.storage.schedule_text import name_of

OUTCOME = "outcome.json"
"""Beside a run's own files: how the table's last start of it ended, where it did not end well."""


@dataclass(frozen=True)
class Tested:
    """One boundary on test."""

    scores: Mapping[str, float]
    unreadable: int


@dataclass(frozen=True)
class RunResult:
    """What a run has come to.

    Attributes:
        history: its boundaries; those it reached, where it is unfinished.
        tested: a boundary's test, by index.
        keep: "best" (the product's rule) or "last" (the paper's), as the run was made with.
        why_not: why it did not come to its end; "" if it did, or is not there.
    """

    run: Run
    history: Sequence[Mapping[str, Any]]
    tested: Mapping[int, Tested]
    keep: str
    finished: bool
    why_not: str = ""


@dataclass(frozen=True)
class Attempt:
    """A strategy on one seed.

    Attributes:
        chosen: the prefix whose program was taken.
        lm_calls, seconds: what all of the strategy's steps took, those not taken included, test excluded.
        noise: variance of one score by the metric alone, as far as its judge was asked twice.
    """

    seed: int
    score: float
    scores: Mapping[str, float]
    val_score: float
    chosen: str
    lm_calls: int
    seconds: float
    unreadable: int
    noise: float = 0.0


@dataclass(frozen=True)
class Row:
    """A strategy on a cell: an attempt for each seed that has one, and why others have none."""

    strategy: str
    attempts: Sequence[Attempt]
    missing: Mapping[int, str]


def read_result(run: Run, folder: Path) -> RunResult:
    """What a run's folder holds; an empty result where there is none.

    Raises:
        TableError: a file of it is damaged, or its rollouts on test were not recorded.
    """
    own = folder / run.name
    history, damage = read_history(own / "history.jsonl") if (own / "history.jsonl").is_file() else ([], "")
    if damage:
        raise TableError(f"{own}: {damage}")
    tested = {record["index"]: _tested(own, record) for record in history if "test_score" in record}
    outcome = read_outcome(own)
    return RunResult(run, history, tested, _keep(own), is_finished(own), str(outcome.get("message", "")))


def is_finished(run_folder: Path) -> bool:
    """Whether the run has come to its end, its closing test included.

    Raises:
        DamagedFileError: its summary is not as it was written.
    """
    try:
        summary = json.loads(read_durably(run_folder / "summary.json"))
    except FileNotFoundError:
        return False
    return summary.get("test_score") is not None


def read_outcome(run_folder: Path) -> dict[str, Any]:
    """{"state": ..., "message": ...} of a run that ended badly; {} otherwise."""
    path = run_folder / OUTCOME
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def rows_of(cell: Cell, config: TableConfig, results: Sequence[RunResult]) -> list[Row]:
    """A row for each strategy, in the table's order, and one for the control of equal LM calls after them."""
    own = [result for result in results if result.run.cell == cell]
    rows = [_row(name_of(s), s, config.seeds, [r for r in own if not r.run.equal], own) for s in config.strategies]
    if has_control(config):
        rows.append(_row(EQUAL_CALLS, CONTROL, config.seeds, [r for r in own if r.run.equal], own))
    return rows


def calls_of(result: RunResult, steps: Steps = ALTERNATION) -> int:
    """LM calls that a run made up to the end of these steps, test excluded."""
    return sum(int(record["lm_calls"]) for record in result.history[: len(steps) + 1])


def _row(
    name: str, steps: Steps, seeds: Sequence[int], candidates: Sequence[RunResult], all_of_cell: Sequence[RunResult]
) -> Row:
    attempts, missing = [], {}
    for seed in seeds:
        mine = [r for r in candidates if r.run.seed == seed and r.run.steps[: len(steps)] == steps]
        ready = [r for r in mine if len(r.history) > len(steps) and _all_tested(r, len(steps))]
        if ready:
            fellows = [r for r in all_of_cell if r.run.seed == seed and (r is ready[0] or not r.run.equal)]
            attempts.append(_attempt(ready[0], steps, fellows))
        else:
            missing[seed] = next((r.why_not for r in mine if r.why_not), "not run yet")
    return Row(name, attempts, missing)


def _attempt(result: RunResult, steps: Steps, fellows: Sequence[RunResult]) -> Attempt:
    reached = result.history[: len(steps) + 1]
    chosen = len(steps)
    if result.keep == "best":  # what the product returns
        chosen = max(range(len(reached)), key=lambda index: rank_of(reached[index]))
    tested = result.tested[chosen]
    own = [_cheapest(result, index, fellows) for index in range(len(reached))]
    return Attempt(
        seed=result.run.seed,
        score=sum(tested.scores.values()) / len(tested.scores),
        scores=tested.scores,
        val_score=reached[chosen]["val_score"],
        chosen=reached[chosen]["prefix"],
        lm_calls=sum(int(record["lm_calls"]) for record in reached),
        seconds=sum(float(record["seconds"]) for record in own),
        unreadable=tested.unreadable,
        noise=float((reached[-1].get("judge") or {}).get("variance", 0.0)),
    )


def _cheapest(result: RunResult, index: int, fellows: Sequence[RunResult]) -> Mapping[str, Any]:
    """The record of a boundary from that run of the seed which had least of it answered by the shared store.

    Runs that share a prefix take each other's completions from the store, so the later one's seconds say nothing; the
    calls are the same in all.
    """
    last_of_control = result.run.equal and index == len(result.run.steps)
    steps = result.run.steps[:index]
    same = [r.history[index] for r in fellows if r.run.steps[:index] == steps and len(r.history) > index]
    records = [result.history[index]] if last_of_control or not same else same
    return min(records, key=lambda record: record.get("cached_calls", 0))


def _all_tested(result: RunResult, count: int) -> bool:
    return all(index in result.tested for index in range(count + 1))


def _tested(own: Path, record: Mapping[str, Any]) -> Tested:
    path = own / "rollouts" / f"test-{record['index']}.jsonl"
    try:
        rows = [json.loads(line) for line in lines_of(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError) as error:
        raise TableError(
            f"{path} cannot be read ({error}). A table needs it: keep record.max_megabytes above 0. Remove the folder "
            f"{own} to run it again; stored completions are not generated again."
        ) from error
    unreadable = sum((row["error"] or {}).get("kind") in ("format", "type") for row in rows)
    return Tested({row["example"]: float(row["score"]) for row in rows}, unreadable)


def _keep(own: Path) -> str:
    path = own / "config.yaml"
    if not path.is_file():
        return "best"
    return str((yaml.safe_load(path.read_text(encoding="utf-8")).get("alternate") or {}).get("keep", "best"))
