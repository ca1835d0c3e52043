"""Diagnosis: what a step won and lost on val, unreadable answers apart from wrong ones, and whose traces passed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cotune.datamodules import Trace
from cotune.programs import Example, Rollout

_MOST_LABELS = 100


def diagnose(done: Sequence[Rollout], before: Mapping[str, float] | None, *, threshold: float) -> dict[str, Any]:
    """The rollouts of a boundary, taken apart; plain types. An example passes from a score of `threshold` on.

    Args:
        before: example id -> score at the boundary before; None at the first.

    Returns:
        `passed` and `wrong`: how many examples; the rest failed. `unreadable`: stage -> how many examples' runs ended
        there, because the completion did not parse. `by_label`: label -> [passed, examples], where labels repeat.
        `won` and `lost`: ids of examples that pass now and did not before, and the other way round.
    """
    passed = {r.example.id for r in done if r.error is None and r.score >= threshold}
    failed = [r for r in done if r.error is not None]
    unreadable = Counter(r.steps[-1].stage for r in failed if r.error and r.error.kind == "format" and r.steps)
    found: dict[str, Any] = {
        "passed": len(passed),
        "wrong": len(done) - len(passed) - len(failed),
        "unreadable": dict(sorted(unreadable.items())),
        "by_label": by_label([r.example for r in done], passed),
    }
    if before is not None:
        known = [r.example.id for r in done if r.example.id in before]
        found["won"] = [id_ for id_ in known if id_ in passed and before[id_] < threshold]
        found["lost"] = [id_ for id_ in known if id_ not in passed and before[id_] >= threshold]
    return found


def trace_coverage(traces: Sequence[Trace], examples: Sequence[Example]) -> dict[str, Any]:
    """How many examples have a passing trace, by stage and by label; plain types. Those with gold answers do not count.

    Returns:
        `by_stage`: stage -> examples; `by_label`: label -> [examples with a trace, examples], where labels repeat.
    """
    stages: dict[str, set[str]] = {}
    traces = [trace for trace in traces if not trace.gold]
    for trace in traces:
        stages.setdefault(trace.stage, set()).add(trace.example)
    solved = {trace.example for trace in traces}
    return {"by_stage": {s: len(ids) for s, ids in stages.items()}, "by_label": by_label(examples, solved)}


def by_label(examples: Sequence[Example], passed: set[str]) -> dict[str, list[int]]:
    """Label -> [examples that passed, examples], by label; {} where labels are as good as unique."""
    total = Counter(_label(example) for example in examples)
    if len(total) > min(_MOST_LABELS, len(examples) / 2):
        return {}
    solved = Counter(_label(example) for example in examples if example.id in passed)
    return {label: [solved[label], count] for label, count in sorted(total.items())}


def _label(example: Example) -> str:
    return ", ".join(str(value) for value in example.labels.values())
