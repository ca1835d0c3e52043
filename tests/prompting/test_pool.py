"""The pool: who leads where, who is dominated, and what two lineages make together."""

from __future__ import annotations

import random
from collections import Counter

from cotune.programs import Prompt
from cotune.prompting.pool import Member, draw_parent, leads, merges
from cotune.prompting.search import Candidate


def member(*scores: float, parents: tuple[int, ...] = (), a: str = "", b: str = "", **objectives: float) -> Member:
    return Member(Candidate({"a": Prompt(a), "b": Prompt(b)}, scores), objectives, parents)


def test_each_dev_example_has_its_leaders() -> None:
    pool = [member(1, 0, 0), member(0, 1, 1), member(0.5, 0.5, 0.5)]
    assert leads(pool) == {0: 1, 1: 2}


def test_one_that_leads_nowhere_alone_is_dominated() -> None:
    pool = [member(1, 1, 0), member(1, 0, 0), member(0, 1, 1)]
    assert leads(pool) == {0: 2, 2: 2}


def test_of_equals_the_earlier_stays() -> None:
    assert leads([member(1, 0), member(1, 0)]) == {0: 2}


def test_an_objective_is_led_too() -> None:
    pool = [member(1, 1, brief=0.2), member(0, 0, brief=0.9)]
    assert leads(pool) == {0: 2, 1: 1}


def test_parents_are_drawn_in_proportion_to_what_they_lead() -> None:
    pool = [member(1, 0, 0, 0), member(0, 1, 1, 1)]
    drawn = Counter(draw_parent(pool, random.Random(n)) for n in range(400))
    assert 70 < drawn[0] < 130
    assert drawn[0] + drawn[1] == 400


def test_a_merge_takes_each_stage_from_the_one_that_changed_it() -> None:
    pool = [
        member(0, 0, a="old", b="old"),
        member(1, 0, a="new a", b="old", parents=(0,)),
        member(0, 1, a="old", b="new b", parents=(0,)),
    ]
    (merge,) = merges(pool)
    assert [merge.prompts[stage].instruction for stage in "ab"] == ["new a", "new b"]
    assert (merge.pair, merge.sources) == ((1, 2), {"a": 1, "b": 2})


def test_a_stage_that_both_changed_comes_from_the_better() -> None:
    pool = [
        member(0, 0, 0, a="old", b="old"),
        member(1, 0, 0, a="one", b="old", parents=(0,)),
        member(0, 1, 1, a="two", b="new b", parents=(0,)),
    ]
    assert merges(pool) == []  # all of it would come from the second
    pool[1] = member(1, 1, 0, a="one", b="old", parents=(0,))
    pool[2] = member(0, 0, 1, a="two", b="new b", parents=(0,))
    (merge,) = merges(pool)
    assert [merge.prompts[stage].instruction for stage in "ab"] == ["one", "new b"]


def test_parent_and_child_or_strangers_are_not_merged() -> None:
    parent_and_child = [member(1, 0, a="old", b="old"), member(0, 1, a="new", b="new", parents=(0,))]
    assert merges(parent_and_child) == []
    strangers = [member(1, 0, a="x", b="y"), member(0, 1, a="p", b="q")]
    assert merges(strangers) == []
