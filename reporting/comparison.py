"""Runs side by side: scores, cost, what differs in their settings, and the examples on which they disagree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cotune.reporting.run_record import Json, ReportError, RunRecord
from cotune.reporting.statistics import Difference, paired_difference

_OF_THE_FOLDER = {"name", "runs_dir", "fresh", "ckpt_path", "weights_only", "trainer.default_root_dir"}
"""Settings that say where a run is kept, not what it is."""


@dataclass(frozen=True)
class Disagreement:
    """An example that one run answers better than the other."""

    example: str
    first: Json
    second: Json


@dataclass(frozen=True)
class Pair:
    """Two runs on the examples of val or test that both were scored on, each with the program it ended with.

    Attributes:
        part: "val" or "test".
        won: examples on which the second scores more; `lost` those on which it scores less.
        unlike: examples whose ids both runs have, but with other inputs or labels: they are not compared.
    """

    first: str
    second: str
    part: str
    difference: Difference
    won: Sequence[Disagreement]
    lost: Sequence[Disagreement]
    unlike: int


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        names: of the runs, told apart; all else goes by them.
        settings: setting -> run -> value, for the settings that differ; a run that lacks one has none.
        pairs: the first run against each of the others.
        notes: what could not be compared, in sentences.
    """

    names: Sequence[str]
    runs: Mapping[str, RunRecord]
    prefixes: Sequence[str]
    settings: Mapping[str, Mapping[str, Any]]
    pairs: Sequence[Pair]
    notes: Sequence[str]

    def score(self, name: str, prefix: str) -> float | None:
        """A run's val score after a prefix; None if it has no such prefix."""
        return next((p.val_score for p in self.runs[name].prefixes if p.name == prefix), None)

    def cost(self, name: str, what: str) -> float:
        """Sum over a run's phases, e.g. of "lm_calls" or "seconds"."""
        return sum(float(prefix.record.get(what) or 0) for prefix in self.runs[name].prefixes)


def compare_runs(runs: Sequence[RunRecord]) -> Comparison:
    """Compares the first run with each of the others.

    Raises:
        ReportError: there are fewer than two different runs.
    """
    if len({run.folder.resolve() for run in runs}) < len(runs) or len(runs) < 2:
        raise ReportError("give two or more different runs, e.g. cotune compare runs/a runs/b.")
    named = _named(runs)
    names = list(named)
    unfinished = [name for name in names if not named[name].finished]
    notes = [f"{name} is not finished; it is compared as far as it has come." for name in unfinished]
    pairs: list[Pair] = []
    for name in names[1:]:
        for part in ("val", "test"):
            found = _pair(names[0], name, named, part)
            if isinstance(found, Pair):
                pairs.append(found)
            else:
                notes.append(found)
    return Comparison(
        names=names,
        runs=named,
        prefixes=list(dict.fromkeys(prefix.name for run in runs for prefix in run.prefixes)),
        settings=_differing_settings({name: run.config for name, run in named.items()}),
        pairs=pairs,
        notes=notes,
    )


def _differing_settings(configs: Mapping[str, Json]) -> dict[str, dict[str, Any]]:
    """Setting -> run -> value, for the settings that are not the same in all runs.

    >>> _differing_settings({"a": {"data": {"seed": 1, "path": "x"}}, "b": {"data": {"seed": 2, "path": "x"}}})
    {'data.seed': {'a': 1, 'b': 2}}
    """
    flat = {name: dict(_leaves(config)) for name, config in configs.items() if config}
    found = {}
    for key in dict.fromkeys(key for leaves in flat.values() for key in leaves):
        values = {name: leaves[key] for name, leaves in flat.items() if key in leaves}
        same = len(values) == len(flat) and all(value == next(iter(values.values())) for value in values.values())
        if not same and key not in _OF_THE_FOLDER and not key.startswith("record."):
            found[key] = values
    return found


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their names on the command line."""
    if isinstance(value, Mapping) and value:
        for name, part in value.items():
            yield from _leaves(part, path if name == "init_args" else f"{path}.{name}".lstrip("."))
    else:
        yield path, value


def _named(runs: Sequence[RunRecord]) -> dict[str, RunRecord]:
    """Runs by the names of their folders, or by their paths where two have the same name."""
    names = [run.name for run in runs]
    return {run.name if names.count(run.name) == 1 else str(run.folder): run for run in runs}


def _pair(first: str, second: str, runs: Mapping[str, RunRecord], part: str) -> Pair | str:
    """The pair, or why there is none."""
    rows = []
    for name in (first, second):
        own = runs[name].test if part == "test" else runs[name].best.rollouts
        if own is None:
            return f"{first} and {second} on {part}: {name} has no rollouts of it, so examples cannot be compared."
        rows.append({str(row["example"]): row for row in own})
    common = [example for example in rows[0] if example in rows[1]]
    alike = [example for example in common if _same_example(rows[0][example], rows[1][example])]
    difference = paired_difference(*({0: {example: row[example]["score"] for example in alike}} for row in rows))
    if difference is None:
        return f"{first} and {second} on {part}: they have no example in common."
    gaps = [Disagreement(example, rows[0][example], rows[1][example]) for example in alike]
    return Pair(
        first,
        second,
        part,
        difference,
        won=[gap for gap in gaps if gap.second["score"] > gap.first["score"]],
        lost=[gap for gap in gaps if gap.second["score"] < gap.first["score"]],
        unlike=len(common) - len(alike),
    )


def _same_example(first: Json, second: Json) -> bool:
    if "steps" in (first.get("cut"), second.get("cut")):  # inputs and labels were left out; the id is all there is
        return True
    return bool(first["inputs"] == second["inputs"] and first["labels"] == second["labels"])
