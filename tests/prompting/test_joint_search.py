"""JointSearch: instructions and demo sets together, what they are made of, and that a search repeats itself."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from cotune.programs import DescribeThenDecide, Example, Predict, Prompt, Request
from cotune.prompting import Found, JointSearch, SearchTask
from fakes import FakeLM, Loop, asked, doubles, doubling, instruction, search_task, shown
from hypothesis import given, settings
from hypothesis import strategies as st
from killed import same_when_killed

DEV = doubles(*range(101, 121))


class Picky(FakeLM):
    """Right on train always; on dev only with the instruction "way 1" and at least two demos. Proposes five ways."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.proposals: list[str] = []

    def _answer(self, request: Request) -> str:
        if request.adapter == "":
            self.proposals.append(request.messages[0]["content"])
            return f"```\nDouble it, way {len(self.proposals) % 5}.\n```"
        right = int(asked(request, "number")) < 100 or ("way 1" in instruction(request) and shown(request) >= 2)
        return doubling(request) if right else "no"


def task(lm: Any, **changes: Any) -> SearchTask:
    return search_task(lm, Loop(1), **{"train": doubles(*range(1, 13)), "dev": DEV, **changes})


def search(lm: Any = None, *, options: Any = None, **changes: Any) -> Found:
    return JointSearch(**(options or {})).search(task(lm or Picky(), **changes))


def test_an_instruction_and_demos_that_help_only_together_are_found() -> None:
    found = search(options={"trials": 30})
    assert found.score == 1
    assert found.prompts["double"].instruction == "Double it, way 1."
    assert len(found.prompts["double"].demos) >= 2
    assert found.candidates[0].why == "incumbent"


def test_the_model_learns_which_choices_are_good() -> None:
    """Half credit for either, so that later trials should hold the good instruction more often than earlier ones."""

    class Graded(Picky):
        def _answer(self, request: Request) -> str:
            if request.adapter == "" or int(asked(request, "number")) < 100:
                return super()._answer(request)
            return doubling(request) if "way 1" in instruction(request) and int(asked(request, "number")) % 2 else "no"

    options = {"trials": 32, "num_instructions": 6, "num_demo_sets": 12, "racing": None}
    good = [0, 0]
    for seed in range(2):
        tried = search(Graded(), options=options, seed=seed).candidates[1:]
        for at, candidate in enumerate(tried):
            good[at >= 12] += "way 1" in candidate.prompts["double"].instruction
    assert good[1] / 20 > 1.5 * good[0] / 12, good


def test_a_request_holds_the_source_the_data_the_traces_and_the_instruction() -> None:
    lm = Picky()
    search(lm)
    assert len(lm.proposals) == 5
    for text in lm.proposals:
        assert "class Loop(Program):" in text
        assert 'Calls of "double" in runs that were right:\n# 1\nnumber: ' in text
        assert "Its instruction now:\n```\nDouble.\n```" in text
        assert not any(f"number: {example.id}" in text for example in DEV)
    assert len(set(lm.proposals)) > 1


def test_proposals_that_cannot_be_used_are_counted_and_the_rest_goes_on() -> None:
    class Twice(Picky):
        def _answer(self, request: Request) -> str:
            said = super()._answer(request)
            return (
                ["Double it, way 1.", "", "{}", "Double it, way 1.", "What do you want?"][len(self.proposals) - 1]
                if request.adapter == ""
                else said
            )

    found = search(Twice(), options={"trials": 30})
    assert found.score == 1
    assert [one.why for one in found.rejected] == ["empty", "JSON", "tried before", "a question or an excuse"]
    assert "proposals rejected: JSON" in found.notes


def test_each_choice_is_told() -> None:
    found = search(options={"trials": 6})
    for candidate in found.candidates[1:]:
        choice = candidate.lineage["choice"]
        assert set(choice) == {"double instruction", "double demos"}
        assert bool(choice["double demos"]) == bool(candidate.prompts["double"].demos)
    json.dumps([one.to_dict() for one in (*found.candidates, *found.rejected)])


def test_racing_takes_fewer_runs_than_scoring_one_by_one() -> None:
    class Ways(Picky):
        """Way n is right on n in five of dev."""

        def _answer(self, request: Request) -> str:
            if request.adapter == "" or int(asked(request, "number")) < 100:
                return super()._answer(request)
            way = int(instruction(request)[-2]) if "way" in instruction(request) else 0
            return doubling(request) if int(asked(request, "number")) * 7 % 5 < way else "no"

    raced, alone = Ways(), Ways()
    dev = doubles(*range(101, 201))
    one = search(raced, options={"trials": 12}, dev=dev)
    other = search(alone, options={"trials": 12, "racing": None}, dev=dev)
    assert one.score == other.score == 0.8
    assert raced.calls < 0.8 * alone.calls


def test_a_small_space_is_tried_to_its_end() -> None:
    found = search(options={"num_instructions": 2, "num_demo_sets": 1, "trials": 30})
    assert len(found.candidates) == 4
    assert "ended after 3 trials: no combination that is new came up" in found.notes


@pytest.mark.parametrize("sets", [1, 2, 6])
def test_a_stage_that_reasons_has_as_many_demo_sets_as_others(sets: int) -> None:
    lm = FakeLM(lambda request: f"reasoning: twice\nanswer: {doubling(request)}")
    given = search_task(lm, Predict("number -> answer", reasoning=True), train=doubles(*range(8)), dev=[*DEV, *wrong()])
    found = JointSearch(trials=4, num_instructions=1, num_demo_sets=sets).search(given)
    assert any(f"demo sets: {sets};" in note for note in found.notes)


def wrong() -> list[Example]:
    """One whose label is never reached, so that a search goes on."""
    return [Example.of({"number": 99}, {"answer": "no"}, id="wrong")]


def test_nothing_to_choose_from_leaves_the_prompts() -> None:
    found = search(options={"num_instructions": 1, "num_demo_sets": 0})
    assert found.prompts == Loop(1).initial_prompts()
    assert len(found.candidates) == 1


def test_a_frozen_stage_keeps_its_prompt() -> None:
    program = DescribeThenDecide("number -> answer", "Describe.", "Decide.")
    lm = FakeLM(lambda r: f"Way {r.seed % 99}." if r.adapter == "" else doubling(r))
    given = search_task(
        lm, program, train=doubles(*range(1, 9)), dev=doubles(*range(101, 105)), metric=lambda e, p: 0.5
    )
    found = JointSearch(frozen=["describe"], trials=5).search(SearchTask(**{**vars(given), "threshold": 0.5}))
    assert {candidate.prompts["describe"] for candidate in found.candidates} == {Prompt("Describe.")}
    assert len({candidate.prompts["decide"].instruction for candidate in found.candidates}) > 2
    assert any(candidate.prompts["decide"].demos for candidate in found.candidates)


def test_lm_calls_of_the_task_take_the_place_of_trials() -> None:
    lm = FakeLM(lambda r: f"Way {r.seed % 99}." if r.adapter == "" else "no")
    found = search(lm, options={"trials": 1, "racing": None}, lm_calls=200)
    assert 200 <= sum(found.calls.values()) <= 200 + 4 * len(DEV)


@settings(max_examples=12, deadline=None, database=None)
@given(st.integers(0, 9), st.integers(1, 4), st.integers(0, 4), st.integers(1, 5), st.booleans(), st.integers(0, 3))
def test_the_contract_holds(trials: int, texts: int, sets: int, width: int, racing: bool, seed: int) -> None:
    lm = Picky()
    options = JointSearch(trials, texts, sets, width=width, racing=0.98 if racing else None)
    incumbent = {"double": Prompt("Double it, way 1.")}
    found = options.search(task(lm, seed=seed, incumbent=incumbent))
    assert lm.calls - len(lm.proposals) <= options.most_runs(12, len(DEV))
    assert found.candidates[0].why == "incumbent"
    assert not found.candidates[0].pruned
    assert found.score >= found.candidates[0].score
    assert len({candidate.id for candidate in found.candidates}) == len(found.candidates) <= trials + 2
    sources = {demo.source for candidate in found.candidates for demo in candidate.prompts["double"].demos}
    assert not sources & {example.id for example in DEV}
    assert options.search(task(Picky(), seed=seed, incumbent=incumbent)) == found


def test_a_search_killed_anywhere_repeats_itself() -> None:
    def writer(request: Request) -> str:
        if request.adapter == "":
            return f"Double it, way {request.seed % 5}."
        return Picky()._answer(request)

    options = {"trials": 6, "num_instructions": 3, "racing": None}
    same_when_killed(lambda lm: search(lm, options=options), lambda: FakeLM(writer))


def test_without_optuna_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r'^JointSearch needs the optuna library: pip install "cotune\[joint\]"\.$'):
        JointSearch()


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ({"trials": -1}, "trials -1 is below 0"),
        ({"num_instructions": 0}, "num_instructions 0 is below 1"),
        ({"num_demo_sets": -1}, "num_demo_sets -1 is below 0"),
        ({"width": 0}, "width 0 is below 1"),
        ({"racing": 0.3}, "racing 0.3 is outside"),
    ],
)
def test_arguments_out_of_range_are_named(argument: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        JointSearch(**argument)
