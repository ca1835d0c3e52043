"""Claims about several runs of an example: their mean, or what most of them say."""

from __future__ import annotations

from typing import Any

import pytest
from cotune.programs import Example, Failure, Rollout, faults_of, settled
from cotune.programs.samples import Vote

ROW = Example.of({"q": "1+1"}, {"answer": "2"})


def run(answer: Any, score: float, fault: str = "") -> Rollout:
    if fault:
        return Rollout(ROW, (), {"answer": answer}, 0.0, Failure("metric", fault))
    error = Failure("format", "unreadable") if answer is None else None
    return Rollout(ROW, (), None if answer is None else {"answer": answer}, score, error)


@pytest.mark.parametrize(
    ("vote", "runs", "answer", "score"),
    [
        ("mean", [("2", 1.0), ("3", 0.0), ("2", 1.0), (None, 0.0)], "2", 0.5),
        ("mean", [(None, 0.0), ("2", 1.0)], "2", 0.5),
        ("majority", [("3", 0.0), ("2", 1.0), ("2", 1.0)], "2", 1.0),
        ("majority", [("2", 1.0), ("3", 0.0), ("3", 0.0)], "3", 0.0),
        ("majority", [("3", 0.0), ("2", 1.0)], "3", 0.0),
        ("majority", [(None, 0.0), (None, 0.0), ("2", 1.0)], "2", 1.0),
        ("majority", [([2, 3], 1.0), ([3, 2], 0.0), ([2, 3], 1.0)], [2, 3], 1.0),
        ("majority", [(None, 0.0)], None, 0.0),
    ],
)
def test_runs_of_an_example_become_one(vote: Vote, runs: list[tuple[Any, float]], answer: Any, score: float) -> None:
    (one,) = settled([[run(*given)] for given in runs], vote)
    assert one.score == score
    assert (one.prediction or {}).get("answer") == answer


def predicted(score: float, **prediction: Any) -> Rollout:
    return Rollout(ROW, (), prediction, score)


@pytest.mark.parametrize(
    "runs",
    [
        [predicted(0, reasoning="a", answer="3"), predicted(1, reasoning="b", answer="2"), predicted(1, answer="2")],
        [predicted(0, answer=3), predicted(1, answer=2), predicted(1, answer="2.0"), predicted(0, answer=3.5)],
        [predicted(0, answer=False), predicted(1, answer=True), predicted(1, answer="Yes.")],
        [predicted(0, answer=["a"]), predicted(1, answer="a"), predicted(1, answer="A")],
        [
            predicted(0, out="3", scores={}),
            predicted(1, out="2", scores={"a": 1}),
            predicted(1, reasoning="c", out="2"),
        ],
    ],
)
def test_the_vote_is_on_answers_however_they_were_reached_and_are_written(runs: list[Rollout]) -> None:
    (one,) = settled([[run] for run in runs], "majority")
    assert one is runs[1]


@pytest.mark.parametrize(("vote", "score"), [("mean", 0.25), ("majority", 1.0)])
def test_a_fault_of_the_users_code_in_one_run_is_not_hidden_by_another(vote: Vote, score: float) -> None:
    faulty = run("2", 0.0, "the metric raised ValueError: x")
    runs = [run("2", 1.0), faulty, run(None, 0.0), faulty]
    (one,) = settled([[one] for one in runs], vote)
    assert (one.score, one.prediction) == (score, {"answer": "2"})
    assert str(faults_of([one])["metric"]).endswith("in 2 of 4 runs: the metric raised ValueError: x")
