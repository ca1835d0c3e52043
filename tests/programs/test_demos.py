"""Demos from labels, draws from a pool, and demos hidden from their own example."""

from __future__ import annotations

import random

import pytest
from cotune.programs import (
    Demo,
    DescribeThenDecide,
    Example,
    Predict,
    Prompt,
    draw_demos,
    hide_own_demos,
    labelled_demos,
)
from hypothesis import given, settings
from hypothesis import strategies as st


def demo(source: str, answer: str = "") -> Demo:
    return Demo({"q": source}, {"a": answer or source}, source)


def test_only_stages_whose_inputs_are_all_given_have_labelled_demos() -> None:
    program = DescribeThenDecide("length -> answer", "Describe.", "Decide.")
    # describe has its input but no label, decide its label but not the description.
    assert labelled_demos(program, [Example.of({"length": 1}, {"answer": "x"})]) == {}
    described = [Example.of({"length": 1, "description": "short"}, {"answer": "x"}, id="e")]
    assert labelled_demos(program, described) == {
        "decide": [Demo({"length": "1", "description": "short"}, {"answer": "x"}, "e")]
    }


def test_missing_outputs_are_left_out_and_foreign_labels_ignored() -> None:
    program = Predict("question -> why, answer")
    (made,) = labelled_demos(program, [Example.of({"question": ["a", "b"]}, {"answer": 4, "source": "web"})])["predict"]
    assert (made.inputs, made.outputs) == ({"question": "[1] a\n[2] b"}, {"answer": "4"})


def test_a_value_of_none_is_not_there() -> None:
    rows = [
        Example.of({"question": None}, {"answer": "1"}),
        Example.of({"question": "1"}, {"answer": None}),
        Example.of({"question": "1"}, {}),
        Example.of({"question": ""}, {"answer": "0"}, id="kept"),
    ]
    assert [d.source for d in labelled_demos(Predict("question -> answer"), rows)["predict"]] == ["kept"]


def test_demos_keep_the_order_of_the_examples() -> None:
    rows = [Example.of({"q": n}, {"a": n}, id=str(n)) for n in (3, 1, 2)]
    assert [d.source for d in labelled_demos(Predict("q -> a"), rows)["predict"]] == ["3", "1", "2"]


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(st.sampled_from("abcdef")), st.integers(-1, 8), st.integers(0, 99), st.sets(st.sampled_from("abc")))
def test_a_draw_is_of_distinct_sources_and_never_of_an_excluded_one(
    sources: list[str], k: int, seed: int, excluded: set[str]
) -> None:
    pool = [demo(source, str(place)) for place, source in enumerate(sources)]
    drawn = draw_demos(pool, k, random.Random(seed), excluded)
    found = [d.source for d in drawn]
    assert len(set(found)) == len(found) == min(max(k, 0), len(set(sources) - excluded))
    assert not excluded & set(found)
    assert all(d in pool for d in drawn)
    assert drawn == draw_demos(pool, k, random.Random(seed), excluded)


def test_every_demo_can_be_drawn_also_the_second_of_a_source() -> None:
    pool = [demo("a", "first call"), demo("a", "second call"), demo("b")]
    drawn = [draw_demos(pool, 1, random.Random(seed))[0] for seed in range(50)]
    assert {d.outputs["a"] for d in drawn} == {"first call", "second call", "b"}


def test_demos_without_a_source_are_distinct() -> None:
    pool = [Demo({"q": n}, {"a": n}) for n in "12"]
    assert len(draw_demos(pool, 2, random.Random(0), exclude_sources={""})) == 2


@pytest.mark.parametrize(("example", "left"), [("x", ["y", ""]), ("z", ["x", "y", ""])])
def test_an_example_does_not_see_its_own_demos(example: str, left: list[str]) -> None:
    prompts = {"stage": Prompt("Do.", (demo("x"), demo("y"), Demo({}, {"a": "1"}))), "bare": Prompt("Be.")}
    hidden = hide_own_demos(prompts, example)
    assert [d.source for d in hidden["stage"].demos] == left
    assert hidden["stage"].instruction == "Do."
    assert hidden["bare"] == prompts["bare"]


def test_labels_stand_in_demos_as_their_types_write_them() -> None:
    program = Predict("question -> answer: float, right: bool")
    (demo,) = labelled_demos(program, [Example.of({"question": "?"}, {"answer": "7.0", "right": True})])["predict"]
    assert demo.outputs == {"answer": "7", "right": "yes"}


def test_of_several_right_answers_a_demo_shows_the_first() -> None:
    (demo,) = labelled_demos(Predict("question -> answer"), [Example.of({"question": "?"}, {"answer": ["a", "b"]})])[
        "predict"
    ]
    assert demo.outputs == {"answer": "a"}
