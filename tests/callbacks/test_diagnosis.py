"""Diagnosis: what is counted as wrong, closed at its limit, out of type, without an answer, won and lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cotune.callbacks.diagnosis import advice_without_traces, by_label, diagnose, trace_coverage
from cotune.datamodules import Bootstrapping, Report, Trace
from cotune.programs import Completion, Example, Failure, Filled, Rollout, Step
from cotune.reporting.closing_table import coverage_lines, set_metric_lines


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
    assert (found["closed"], found["out_of_type"]) == (0, 0)
    assert "won" not in found


def test_answers_closed_at_their_limit_and_out_of_type_are_counted_apart() -> None:
    cut = Completion("so", fields=(Filled("reasoning", "so", 0, 1, "length"),))
    done = [rollout("a", 0), rollout("b", 0), rollout("c", 1), rollout("d", 0)]
    done[1:3] = [replace(one, steps=(replace(one.steps[0], completion=cut),)) for one in done[1:3]]
    done[3] = replace(done[3], error=Failure("type", "no number"))
    found = diagnose(done, None, threshold=1)
    assert [found[name] for name in ("passed", "wrong", "closed", "out_of_type", "unreadable")] == [1, 1, 1, 1, {}]


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
    undone = {"prefix": "p -> w", "traces": {"solved": 1, "examples": 4}, "notes": ["nothing gained: unchanged"]}
    assert coverage_lines([undone])[1:] == ["p -> w: nothing gained: unchanged"]


def test_a_gold_answer_is_no_passing_trace() -> None:
    def trace(example: str, *, gold: bool) -> Trace:
        return Trace(example, 0, 1.0, "s", 0, {}, {}, [], "", (), True, "", gold=gold)

    examples = [Example(id_, {}, {"label": "a"}) for id_ in ("x", "y", "z", "v")]
    found = trace_coverage([trace("x", gold=False), trace("y", gold=True)], examples)
    assert found == {"by_stage": {"s": 1}, "by_label": {"a": [1, 4]}}


@pytest.mark.parametrize(
    ("counts", "options", "said", "unsaid"),
    [
        ({"wrong": 8}, {}, "Raise data.bootstrapping.attempts (now 10)", "max_new_tokens"),
        ({"format": 8, "too_long": 8}, {}, "No prompt fits the model's window", "attempts"),
        (
            {"format": 8, "cut_off": 8},
            {},
            "8 of the runs were cut off: raise model.sampling.max_new_tokens",
            "attempts",
        ),
        ({"wrong": 4, "format": 4, "cut_off": 4}, {}, "4 of the runs were cut off", "No prompt"),
        ({"metric": 8}, {}, "Fix the program or the metric", "attempts"),
        ({"wrong": 8}, {"temperature": 0.0, "fresh_demos": 0}, "temperature above 0", "attempts (now"),
    ],
)
def test_more_attempts_are_advised_only_where_they_could_help(
    counts: dict[str, int], options: dict[str, Any], said: str, unsaid: str
) -> None:
    found = advice_without_traces(Report(examples=4, runs=8, **counts), Bootstrapping(**options), gold_answers=False)
    assert said in found
    assert unsaid not in found
    assert "gold_answers" not in found


def test_a_label_of_several_answers_goes_by_the_first() -> None:
    found = by_label([Example.of({}, {"answer": ["red", "crimson"]}, id=str(n)) for n in range(4)], {"0"})
    assert found == {"red": [1, 4]}


def test_reused_traces_are_said_to_be_so() -> None:
    record = {"prefix": "w", "traces": {"solved": 12, "examples": 12, "runs": 0}}
    assert coverage_lines([record]) == ["Traces for w: reused, of 12 examples"]


def test_set_metrics_stand_in_the_diagnosis_and_in_the_closing_table_with_their_intervals() -> None:
    done = [Rollout(Example(f"{n}", {}, {"answer": "ab"[n % 2]}), (), {"answer": "a"}, 0.5) for n in range(20)]
    found = diagnose(done, None, threshold=1, set_metrics=["macro_f1"])["set_metrics"]
    assert found["macro_f1"][0] == pytest.approx(1 / 3)
    summary = {"best": "p", "test_set_metrics": {"macro_f1": [0.5, 0.4, 0.6]}}
    lines = set_metric_lines(summary, [{"prefix": "p", "diagnosis": {"set_metrics": found}}])
    assert lines[0].startswith("macro_f1: val 0.333 (")
    assert lines[0].endswith("test 0.500 (0.400 to 0.600)")
