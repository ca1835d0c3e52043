"""Search tasks refuse what would make scores meaningless; candidates become plain data."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cotune.programs import Demo, Prompt
from cotune.prompting import Candidate, PromptSearch, SearchTask
from fakes import FakeLM, Loop, doubles, doubling, search_task


def task(**changes: Any) -> SearchTask:
    program = Loop(1)
    return search_task(FakeLM(doubling), program, **{"train": doubles(1, 2), "dev": doubles(3, 4), **changes})


def test_train_and_dev_must_not_overlap() -> None:
    with pytest.raises(ValueError, match="share 2 examples, the first is 2"):
        task(train=doubles(1, 2, 3), dev=doubles(3, 2, 4))


def test_dev_must_hold_something_and_train_need_not() -> None:
    with pytest.raises(ValueError, match="dev is empty"):
        task(dev=[])
    task(train=[])


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.01, float("nan")])
def test_a_threshold_that_all_or_none_would_pass_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"outside \(0, 1\]"):
        task(threshold=threshold)


@pytest.mark.parametrize("which", ["initial", "incumbent"])
def test_prompts_must_be_those_of_the_program(which: str) -> None:
    with pytest.raises(
        ValueError, match=f'the {which} prompts have none for stage "double"; Loop has the stages double'
    ):
        task(**{which: {}})
    with pytest.raises(ValueError, match='name "triple", which is no stage'):
        task(**{which: {"double": Prompt("Double."), "triple": Prompt("Triple.")}})


def test_a_demo_from_dev_is_refused() -> None:
    told = {"double": Prompt("Double.", (Demo({"number": "3"}, {"answer": "6"}, source="3"),))}
    with pytest.raises(ValueError, match='the incumbent prompts show stage "double" a demo of example 3'):
        task(incumbent=told)


def test_a_candidate_becomes_plain_data() -> None:
    candidate = Candidate({"double": Prompt("Double.")}, (1.0, 0.0), "p", "random 1", False, {"format": 1})
    data = json.loads(json.dumps(candidate.to_dict()))
    assert data == {
        "id": candidate.id,
        "parent": "p",
        "why": "random 1",
        "score": 0.5,
        "pruned": False,
        "scores": [1.0, 0.0],
        "errors": {"format": 1},
        "prompts": {"double": {"instruction": "Double.", "demos": []}},
    }


def test_a_candidate_without_scores_scores_0() -> None:
    assert Candidate({}, ()).score == 0.0


def test_a_search_has_one_method_to_write() -> None:
    assert PromptSearch.__abstractmethods__ == {"search"}
