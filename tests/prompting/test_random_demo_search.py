"""RandomDemoSearch, the paper's prompt step: which candidates, in which order, made of what."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import pytest
from cotune.programs import (
    Call,
    Demo,
    DescribeThenDecide,
    Example,
    Program,
    Prompt,
    Request,
    Sampling,
    Signature,
    Stage,
    prompts_id,
)
from cotune.prompting import Candidate, Found, RandomDemoSearch, SearchTask
from fakes import FakeLM, Loop, asked, doubles, doubling, instruction, search_task, shown
from hypothesis import given, settings
from hypothesis import strategies as st

DEV = doubles(101, 102, 103, 104)


def task(lm: FakeLM, train: list[Example], program: Program | None = None, **changes: Any) -> SearchTask:
    program = program or Loop(1)
    return search_task(lm, program, train=train, **{"dev": DEV, **changes})


def needs_demos(least: int = 1) -> FakeLM:
    """Right on train (numbers to 99) always, on dev only when shown at least so many demos."""
    return FakeLM(lambda r: doubling(r) if shown(r) >= least or int(asked(r, "number")) < 100 else "no idea")


def named(found: Found, why: str) -> Candidate:
    return next(candidate for candidate in found.candidates if candidate.why == why)


def demo_sources(candidate: Candidate, stage: str = "double") -> list[str]:
    return [demo.source for demo in candidate.prompts[stage].demos]


def test_candidates_come_in_the_order_of_the_method() -> None:
    incumbent = {"double": Prompt("Double it.")}
    found = RandomDemoSearch(num_candidates=2).search(task(needs_demos(), doubles(*range(1, 9)), incumbent=incumbent))
    assert [candidate.why for candidate in found.candidates] == [
        "incumbent",
        "zero-shot",
        "labels-only",
        "bootstrap unshuffled",
        "random 1",
        "random 2",
    ]
    initial = prompts_id(Loop(1).initial_prompts())
    assert [candidate.parent for candidate in found.candidates] == ["", "", *[initial] * 4]


def test_demos_that_help_are_found() -> None:
    found = RandomDemoSearch().search(task(needs_demos(3), doubles(*range(1, 9))))
    assert found.score == 1.0
    assert len(found.prompts["double"].demos) == 3
    assert found.candidates[0].score == 0.0


def test_the_incumbent_stays_when_demos_hurt() -> None:
    lm = FakeLM(lambda r: "confused" if shown(r) else doubling(r))
    found = RandomDemoSearch().search(task(lm, doubles(1, 2, 3)))
    assert (found.prompts, found.score) == (Loop(1).initial_prompts(), 1.0)


def test_at_first_incumbent_and_zero_shot_are_one_and_a_note_says_so() -> None:
    found = RandomDemoSearch(num_candidates=0).search(task(needs_demos(), doubles(1)))
    assert [candidate.why for candidate in found.candidates][:2] == ["incumbent", "labels-only"]
    assert '"zero-shot" equals "incumbent": not scored again' in found.notes


def test_unshuffled_shows_the_first_successes_in_train_order() -> None:
    lm = FakeLM(lambda r: "no" if asked(r, "number") in ("8", "6") else doubling(r))
    found = RandomDemoSearch(max_demos=2, max_labelled_demos=0).search(task(lm, doubles(8, 7, 6, 5, 4, 3)))
    assert demo_sources(named(found, "bootstrap unshuffled")) == ["7", "5"]


def test_labelled_demos_fill_up_behind_bootstrapped_ones_from_other_examples() -> None:
    lm = FakeLM(lambda r: doubling(r) if asked(r, "number") == "2" else "no")
    found = RandomDemoSearch(max_demos=3, max_labelled_demos=3, num_candidates=4).search(task(lm, doubles(1, 2, 3, 4)))
    for candidate in found.candidates[2:]:
        first, *rest = demo_sources(candidate)
        assert first == "2"
        assert len(rest) == len(set(rest)) == 2
        assert "2" not in rest


@pytest.mark.parametrize(("labelled", "expected"), [(0, 2), (1, 2), (2, 2), (5, 5)])
def test_the_number_of_demos_is_the_larger_of_drawn_and_labelled(labelled: int, expected: int) -> None:
    search = RandomDemoSearch(max_demos=2, max_labelled_demos=labelled, num_candidates=0)
    found = search.search(task(needs_demos(99), doubles(*range(1, 9))))
    assert len(demo_sources(named(found, "bootstrap unshuffled"))) == expected


def test_without_a_success_labels_are_drawn_and_unshuffled_is_skipped() -> None:
    found = RandomDemoSearch(num_candidates=3).search(task(FakeLM(lambda r: "no"), doubles(*range(1, 9))))
    whys = [candidate.why for candidate in found.candidates]
    assert whys == ["incumbent", "labels-only", "random 1", "random 2", "random 3"]
    assert '"bootstrap unshuffled" skipped: there are no demos for it' in found.notes
    assert found.notes[0].startswith("bootstrap: 0 of 8 train examples solved")


def test_without_successes_and_labels_only_the_given_prompts_are_left_and_all_is_noted() -> None:
    search = RandomDemoSearch(num_candidates=1, max_labelled_demos=0)
    found = search.search(task(FakeLM(lambda r: "no"), doubles(1, 2)))
    assert [candidate.why for candidate in found.candidates] == ["incumbent"]
    for why in ("labels-only", "bootstrap unshuffled", "random 1"):
        assert f'"{why}" skipped: there are no demos for it' in found.notes


def test_no_train_is_no_error() -> None:
    found = RandomDemoSearch().search(task(needs_demos(), []))
    assert found.prompts == Loop(1).initial_prompts()


def describing(request: Request) -> str:
    """A size in words, and a decision that is right unless the number is in dev and no demo is shown."""
    number = asked(request, "number")
    if instruction(request) == "Describe.":
        return f"about {number}"
    return str(2 * int(number)) if shown(request) or int(number) < 100 else "no idea"


def test_demos_of_different_stages_show_the_same_examples() -> None:
    program = DescribeThenDecide("number -> answer", "Describe.", "Decide.")
    lm = FakeLM(describing)
    found = RandomDemoSearch(num_candidates=5).search(task(lm, doubles(*range(1, 9)), program=program))
    tried = [candidate for candidate in found.candidates if candidate.why.startswith(("bootstrap", "random"))]
    assert len(tried) >= 4
    for candidate in tried:
        assert demo_sources(candidate, "describe") == demo_sources(candidate, "decide")
    # No stage has all its inputs and a label: describing has no label, deciding lacks the description.
    assert '"labels-only" skipped: there are no demos for it' in found.notes
    assert found.score == 1.0


def test_one_call_of_a_stage_called_twice_is_shown_and_each_can_be() -> None:
    program, dev = Loop(2), [Example.of({"number": 200}, {"answer": "800"}, id="dev")]
    train = [Example.of({"number": n}, {"answer": str(4 * n)}, id=str(n)) for n in range(1, 9)]
    search = RandomDemoSearch(num_candidates=12, max_labelled_demos=0)
    found = search.search(
        task(FakeLM(lambda r: doubling(r) if int(asked(r, "number")) < 99 else ""), train, program, dev=dev)
    )
    later = set()
    for candidate in found.candidates[1:]:
        assert len(set(demo_sources(candidate))) == len(demo_sources(candidate))
        later |= {demo.inputs["number"] != demo.source for demo in candidate.prompts["double"].demos}
    assert later == {False, True}


class Optional(Program):
    """Only even numbers are checked; the answer comes from `double` either way."""

    check = Stage(Signature.parse("number -> verdict", instruction="Check."))
    double = Stage(Signature.parse("number -> answer", instruction="Double."))

    def run(self, number: int) -> Generator[Call, Mapping[str, str], Mapping[str, Any]]:
        if number % 2 == 0:
            yield self.check(number=number)
        return (yield self.double(number=number))


def test_a_stage_without_demos_keeps_its_prompt() -> None:
    lm = FakeLM(lambda r: "fine" if instruction(r).startswith("Check") else doubling(r))
    found = RandomDemoSearch(num_candidates=0, max_labelled_demos=0).search(
        task(lm, doubles(1, 3, 5), program=Optional())
    )
    candidate = named(found, "bootstrap unshuffled")
    assert candidate.prompts["check"] == Prompt("Check.")
    assert demo_sources(candidate) == ["1", "3", "5"]


OLD = Demo({"number": "50"}, {"answer": "100"}, source="50")


@pytest.mark.parametrize(("restart", "bootstrapped_with", "words"), [(True, 0, "Double."), (False, 1, "Do double.")])
def test_restart_goes_back_to_the_initial_prompts(restart: bool, bootstrapped_with: int, words: str) -> None:
    lm = needs_demos(2)
    search = RandomDemoSearch(restart=restart, num_candidates=2)
    found = search.search(task(lm, doubles(1, 2, 3), incumbent={"double": Prompt("Do double.", (OLD,))}))
    assert [shown(request) for request in lm.batches[0]] == [bootstrapped_with] * 3
    assert {candidate.prompts["double"].instruction for candidate in found.candidates[2:]} == {words}
    assert all("50" not in demo_sources(candidate) for candidate in found.candidates[2:])
    start = prompts_id({"double": Prompt("Do double.", (OLD,))} if not restart else Loop(1).initial_prompts())
    assert {candidate.parent for candidate in found.candidates[2:]} == {start}


def test_attempts_reach_the_bootstrap() -> None:
    lm = FakeLM(lambda r: "no")
    RandomDemoSearch(attempts=3, num_candidates=0).search(task(lm, doubles(1), sampling=Sampling(temperature=1.0)))
    assert [asked(batch[0], "number") for batch in lm.batches[:4]] == ["1", "1", "1", "101"]


def test_the_search_repeats_itself_and_the_seed_changes_it() -> None:
    def drawn(seed: int) -> list[list[str]]:
        found = RandomDemoSearch().search(task(needs_demos(99), doubles(*range(1, 30)), seed=seed))
        return [demo_sources(candidate) for candidate in found.candidates]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_one_more_candidate_does_not_change_the_others() -> None:
    few, more = (
        RandomDemoSearch(num_candidates=n).search(task(needs_demos(99), doubles(*range(1, 30)))).candidates
        for n in (2, 5)
    )
    assert more[: len(few)] == few
    assert len(more) > len(few)


def test_random_sets_have_all_sizes_up_to_the_most() -> None:
    search = RandomDemoSearch(num_candidates=40, max_demos=3, max_labelled_demos=0)
    found = search.search(task(needs_demos(99), doubles(*range(1, 30))))
    sizes = {len(demo_sources(c)) for c in found.candidates if c.why.startswith("random")}
    assert sizes == {1, 2, 3}


@settings(max_examples=40, deadline=None, database=None)
@given(
    st.integers(0, 8),
    st.integers(0, 4),
    st.integers(1, 4),
    st.integers(0, 4),
    st.integers(0, 5),
    st.sets(st.integers(1, 8)),
)
def test_the_contract_holds_for_any_mix(
    train: int, candidates: int, demos: int, labelled: int, seed: int, hard: set[int]
) -> None:
    lm = FakeLM(lambda r: "no" if int(asked(r, "number")) in hard else doubling(r) if shown(r) != 2 else "")
    search = RandomDemoSearch(candidates, demos, labelled, chunk=2)
    found = search.search(task(lm, doubles(*range(1, train + 1)), seed=seed))
    assert found.candidates[0].why == "incumbent"
    assert not found.candidates[0].pruned
    assert found.score >= found.candidates[0].score
    assert len({candidate.id for candidate in found.candidates}) == len(found.candidates)
    for candidate in found.candidates:
        assert candidate.prompts["double"].instruction == "Double."
        shown_sources = demo_sources(candidate)
        assert len(set(shown_sources)) == len(shown_sources) <= max(demos, labelled)
        assert not set(shown_sources) & {example.id for example in DEV}


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ({"num_candidates": -1}, "num_candidates -1 is below 0"),
        ({"max_demos": 0}, "max_demos 0 is below 1"),
        ({"max_labelled_demos": -2}, "max_labelled_demos -2 is below 0"),
        ({"attempts": 0}, "attempts 0 is below 1"),
        ({"chunk": 0}, "chunk 0 is below 1"),
    ],
)
def test_arguments_out_of_range_are_named(argument: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RandomDemoSearch(**argument)
