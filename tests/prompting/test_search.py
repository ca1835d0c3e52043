"""Search tasks refuse what would make scores meaningless; candidates become plain data."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cotune.programs import Demo, Prompt
from cotune.prompting import (
    CalibratedSearch,
    Candidate,
    FormSearch,
    Found,
    PromptSearch,
    Proposal,
    SearchTask,
    choose,
    score_candidate,
)
from cotune.prompting.search import searched
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


class Returns(PromptSearch):
    """A search of somebody else's that gives back whatever it was made with."""

    def __init__(self, found: Any) -> None:
        self.found = found

    def search(self, task: SearchTask) -> Found:
        return self.found(task) if callable(self.found) else self.found


GOOD = {"double": Prompt("Do double.")}
MISSPELT = {**GOOD, "duoble": Prompt("Double.")}
OF_DEV = {"double": Prompt("Double.", (Demo({"number": "3"}, {"answer": "6"}, source="3"),))}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (GOOD, r"^Returns\.search returned \{'double': Prompt.*; return a Found"),
        (None, r"^Returns\.search returned None; return a Found"),
        (Found(GOOD, 1.0, ("one",)), r"^Returns\.search returned a Found whose candidates are no Candidates"),  # type: ignore[arg-type]
        (Found("Do double.", 1.0, ()), r"^Returns\.search: the prompts it found are 'Do double\.'; give a mapping"),  # type: ignore[arg-type]
        (Found({}, 1.0, ()), r'^Returns\.search: the prompts it found have none for stage "double"'),
        (Found(MISSPELT, 1.0, ()), 'name "duoble", which is no stage; Loop has the stages double'),
        (
            Found({"double": "Do it."}, 1.0, ()),
            "the prompts it found have 'Do it.' for stage .*; give a Prompt",
        ),
        (Found({"double": Prompt("Do it.", ("3 6",))}, 1.0, ()), "\"double\" '3 6' as a demo; give a Demo"),  # type: ignore[arg-type]
        (Found(OF_DEV, 1.0, ()), "a demo of example 3, which is in dev"),
    ],
)
def test_what_anybodys_search_returns_is_checked_and_the_error_names_it(found: Any, said: str) -> None:
    for search in (Returns(found), FormSearch(["tags"], Returns(found)), CalibratedSearch(Returns(found))):
        with pytest.raises((TypeError, ValueError), match=said):
            searched(search, task())


@pytest.mark.parametrize(
    ("proposal", "said"),
    [
        (GOOD, r"a proposal is \{'double'.*; give a Proposal"),
        (Proposal(MISSPELT, "mine"), 'the prompts of proposal "mine" name "duoble", which is no stage'),
        (Proposal({"double": "Do it."}, "mine"), "have 'Do it.' for stage"),  # type: ignore[dict-item]
        (Proposal(OF_DEV, "mine"), "a demo of example 3, which is in dev"),
    ],
)
def test_what_anybodys_search_proposes_is_checked_before_anything_is_run(proposal: Any, said: str) -> None:
    given = task()
    for way in (lambda task: choose(task, [proposal]), lambda task: score_candidate(task, proposal)):
        with pytest.raises(ValueError, match=rf"^Returns\.search: .*{said}"):
            searched(Returns(way), given)
    assert given.runner.lm.requests == []  # type: ignore[attr-defined]
    assert searched(Returns(lambda task: choose(task, [Proposal(GOOD, "mine")])), given).score == 1


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
