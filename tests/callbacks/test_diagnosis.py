"""Diagnosis: what is counted as wrong, unreadable, won and lost."""

from __future__ import annotations

from typing import Any

import pytest
from cotune.callbacks.diagnosis import by_label, diagnose, trace_coverage
from cotune.datamodules import Trace
from cotune.programs import Completion, Example, Failure, Rollout, Step

from cotune.closing_table import coverage_lines


def rollout(name: str, score: float, *, label: str = "x", unreadable_at: str = "") -> Rollout:
    stages = ["first", unreadable_at] if unreadable_at else ["first", "last"]
    steps = tuple(Step(stage, {}, {}, [], Completion("")) for stage in stages)
    error = Failure("format", "no answer") if unreadable_at else None
    return Rollout(Example(name, {}, {"answer": label}), steps, None, score, error)


def test_unreadable_answers_are_counted_at_their_stage_and_apart_from_wrong_ones() -> None:
    done = [
        rollout("a", 1),
        rollout("b", 0),
        rollout("c", 0, unreadable_at="last"),
        rollout("d", 0, unreadable_at="hop"),
    ]
    found = diagnose(done, None, threshold=1)
    assert (found["passed"], found["wrong"], found["unreadable"]) == (1, 1, {"hop": 1, "last": 1})
    assert "won" not in found


def test_won_and_lost_are_about_passing_and_not_about_any_change_of_score() -> None:
    before = {"a": 0.0, "b": 1.0, "c": 0.2, "d": 0.9}
    now = [rollout("a", 1), rollout("b", 0.5), rollout("c", 0.4), rollout("d", 0.8), rollout("new", 1)]
    found = diagnose(now, before, threshold=0.8)
    assert (found["won"], found["lost"]) == (["a"], ["b"])


@pytest.mark.parametrize(("labels", "shown"), [("xxyy", {"x": [1, 2], "y": [0, 2]}), ("xyz", {})])
def test_labels_are_told_apart_where_they_repeat(labels: str, shown: dict[str, Any]) -> None:
    examples = [Example(str(n), {}, {"answer": label}) for n, label in enumerate(labels)]
    assert by_label(examples, {"0"}) == shown


def test_the_closing_table_says_whose_traces_passed() -> None:
    traces = {"solved": 3, "examples": 4, "by_label": {"x": [3, 3], "y": [0, 1]}, "by_stage": {"hop": 3, "answer": 3}}
    (line,) = coverage_lines([{"prefix": "vanilla"}, {"prefix": "w", "traces": traces}])
    assert line == "Traces for w: 3 of 4 examples (x 3 of 3; y 0 of 1; hop 3; answer 3)"
    (line,) = coverage_lines([{"prefix": "w", "traces": {"solved": 0, "examples": 4, "gold": 3}}])
    assert line == "Traces for w: 0 of 4 examples, 3 more with their gold answer"


def test_a_gold_answer_is_no_passing_trace() -> None:
    def trace(example: str, *, gold: bool) -> Trace:
        return Trace(example, 0, 1.0, "s", 0, {}, {}, [], "", (), True, "", gold=gold)

    examples = [Example(id_, {}, {"label": "a"}) for id_ in ("x", "y", "z", "v")]
    found = trace_coverage([trace("x", gold=False), trace("y", gold=True)], examples)
    assert found == {"by_stage": {"s": 1}, "by_label": {"a": [1, 4]}}
