"""Scores: feedback may be about single stages, and is refused where it names none of the program's."""

from __future__ import annotations

from typing import Any

import pytest
from cotune.programs import Rollout, Score
from fakes import FakeLM, Loop, doubles, doubling, runner


def scored(stages: Any) -> Rollout:
    metric = lambda example, prediction: Score(0.5, stages=stages)  # noqa: E731
    program = Loop(1)
    one = runner(FakeLM(doubling), program, metric=metric, max_error_rate=1.0)
    return one.run(doubles(1), program.initial_prompts())[0]


def test_feedback_by_stage_stands_in_the_rollout() -> None:
    done = scored({"double": "it was halved"})
    assert (done.score, done.stages, done.error) == (0.5, {"double": "it was halved"}, None)


@pytest.mark.parametrize(("stages", "said"), [({"halve": "no"}, "'halve'"), ({"double": 3}, "is 3;")])
def test_feedback_for_no_stage_or_without_words_is_a_fault_of_the_metric(stages: Any, said: str) -> None:
    done = scored(stages)
    assert done.error is not None
    assert (done.error.kind, done.score) == ("metric", 0)
    assert said in done.error.message
    assert "a stage of the program (double)" in done.error.message
