"""Journeys: how each val example fared from prefix to prefix, and what each step won and lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cotune.reporting.run_record import Json, Prefix, RunRecord
from cotune.reporting.statistics import Difference, paired_difference

_MAX_LABELS = 12
"""Labels with more different values than this are text, and are not counted by value."""


@dataclass(frozen=True)
class Journey:
    """One example on its way through the prefixes whose rollouts were recorded.

    Attributes:
        number: its place in val, from 0; anchors in the page go by it.
        rollouts: index of the prefix -> its row.
    """

    number: int
    example: str
    rollouts: Mapping[int, Json]

    @property
    def inputs(self) -> Json:
        return next((row["inputs"] for row in self.rollouts.values() if row["inputs"]), {})

    @property
    def labels(self) -> Json:
        return next((row["labels"] for row in self.rollouts.values() if row["labels"]), {})

    def group(self, threshold: float) -> str:
        """ "changed", "right" (all the way) or "wrong" (all the way)."""
        scores = [row["score"] for row in self.rollouts.values()]
        if len({*map(float, scores)}) > 1:
            return "changed"
        return "right" if scores[0] >= threshold else "wrong"


@dataclass(frozen=True)
class Change:
    """What a step did to the examples of val: those that score more after it, and those that score less."""

    before: Prefix
    after: Prefix
    won: Sequence[Journey]
    lost: Sequence[Journey]
    stayed_right: int
    stayed_wrong: int
    difference: Difference


def journeys(run: RunRecord) -> list[Journey]:
    """A journey an example, in the order of val."""
    rows: dict[str, dict[int, Json]] = {}
    for prefix in run.prefixes:
        for row in prefix.rollouts or ():
            rows.setdefault(str(row["example"]), {})[prefix.index] = row
    return [Journey(number, example, found) for number, (example, found) in enumerate(rows.items())]


def changes(run: RunRecord, ways: Sequence[Journey]) -> list[Change]:
    """A change a step, and one from the first prefix to the best if more than a step lies between them."""
    pairs = list(zip(run.prefixes, run.prefixes[1:], strict=False))
    if run.best.index > 1:
        pairs.append((run.prefixes[0], run.best))
    found = [_change(before, after, ways, run.threshold) for before, after in pairs]
    return [change for change in found if change is not None]


def outcome(row: Json, threshold: float) -> str:
    """What became of a rollout: "right", "wrong", or the kind of its error, e.g. "format"."""
    if row["error"] is not None:
        return str(row["error"]["kind"])
    return "right" if row["score"] >= threshold else "wrong"


def failure(kind: str) -> str:
    """What a rollout of this kind of error is called in the singular."""
    return {"format": "missing answer", "type": "out-of-type answer"}.get(kind, f"{kind} failure")


def pieces(step: Json) -> list[tuple[bool, str]]:
    """A completion's text in pieces, each with whether the engine put it there; one piece where that is not known."""
    text, place, found = step["completion"], 0, list[tuple[bool, str]]()
    for start, end in step.get("put_there", ()):
        found += [(False, text[place:start]), (True, text[start:end])]
        place = end
    return [(put, piece) for put, piece in (*found, (False, text[place:])) if piece]


def answer_text(row: Json) -> str:
    """What the program answered, in a line: the predicted values that have labels, or all of them."""
    if row["prediction"] is None:
        return row["error"]["message"] if row["error"] else "nothing"
    wanted = {name: value for name, value in row["prediction"].items() if name in row["labels"]} or row["prediction"]
    return one_line(wanted)


def one_line(values: Mapping[str, Any]) -> str:
    """
    >>> one_line({"answer": "setosa"}), one_line({"a": 1, "b": "x"})
    ('setosa', 'a: 1, b: x')
    """
    if len(values) == 1:
        return " ".join(str(next(iter(values.values()))).split())
    return " ".join(", ".join(f"{name}: {value}" for name, value in values.items()).split())


def by_label(run: RunRecord, ways: Sequence[Journey]) -> list[dict[str, Any]]:
    """Successes by label and prefix, {"label", "n", "scores": {index: (successes, n)}}; [] if labels are text."""
    labels = Counter(one_line(way.labels) for way in ways if way.labels)
    if not 1 < len(labels) <= _MAX_LABELS or sum(labels.values()) < 2 * len(labels):
        return []
    table = []
    for label, count in sorted(labels.items()):
        own = [way for way in ways if one_line(way.labels) == label]
        table.append({"label": label, "n": count, "scores": _successes(own, run)})
    return table


def by_stage(prefix: Prefix, threshold: float) -> list[dict[str, Any]]:
    """What a prefix's stages did on val: calls; how many in runs that succeeded, that ended there without an answer or
    with a value out of type, and with a text closed at its limit; mean tokens."""
    rows = prefix.rollouts or ()
    calls = [(step, row, place + 1 == len(row["steps"])) for row in rows for place, step in enumerate(row["steps"])]
    table = []
    for stage in dict.fromkeys(step["stage"] for step, _, _ in calls):
        own = [(step, row, last) for step, row, last in calls if step["stage"] == stage]
        failed = Counter(row["error"]["kind"] for _, row, last in own if last and row["error"] is not None)
        table.append(
            {
                "stage": stage,
                "calls": len(own),
                "right": sum(outcome(row, threshold) == "right" for _, row, _ in own),
                "format": failed["format"],
                "type": failed["type"],
                "closed": sum(step["finished"] == "length" or bool(step.get("closed")) for step, _, _ in own),
                "prompt_tokens": sum(step["prompt_tokens"] for step, _, _ in own) / len(own),
                "completion_tokens": sum(step["completion_tokens"] for step, _, _ in own) / len(own),
            }
        )
    return table


def trace_counts(prefix: Prefix) -> list[dict[str, Any]]:
    """What a weight step learnt from: traces by stage, and by output value where outputs are labels."""
    table = []
    for stage in dict.fromkeys(row["stage"] for row in prefix.traces):
        own = [row for row in prefix.traces if row["stage"] == stage]
        values = {}
        for name in own[0]["outputs"]:
            counts = Counter(row["outputs"].get(name, "") for row in own)
            if len(counts) <= _MAX_LABELS:
                values[name] = counts.most_common()
        table.append({"stage": stage, "traces": len(own), "values": values})
    return table


def _change(before: Prefix, after: Prefix, ways: Sequence[Journey], threshold: float) -> Change | None:
    both = [way for way in ways if before.index in way.rollouts and after.index in way.rollouts]
    scores = [{0: {way.example: way.rollouts[prefix.index]["score"] for way in both}} for prefix in (before, after)]
    difference = paired_difference(*scores)
    if difference is None:
        return None
    pairs = [(way, way.rollouts[before.index]["score"], way.rollouts[after.index]["score"]) for way in both]
    return Change(
        before,
        after,
        won=[way for way, old, new in pairs if new > old],
        lost=[way for way, old, new in pairs if new < old],
        stayed_right=sum(old == new and new >= threshold for _, old, new in pairs),
        stayed_wrong=sum(old == new and new < threshold for _, old, new in pairs),
        difference=difference,
    )


def _successes(ways: Sequence[Journey], run: RunRecord) -> dict[int, tuple[int, int]]:
    found = {}
    for prefix in run.prefixes:
        rows = [way.rollouts[prefix.index] for way in ways if prefix.index in way.rollouts]
        found[prefix.index] = (sum(row["score"] >= run.threshold for row in rows), len(rows))
    return found
