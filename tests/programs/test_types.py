"""Types of fields: named in text, written into prompts, read from completions."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from datetime import date
from enum import Enum
from typing import Any, Literal

import pytest
import yaml
from claims import claimed
from cotune.programs import Choices, FieldTypeError, Line, Number, Out, Pattern, Predict, Reasoning, Schema, Signature
from cotune.programs.types import as_text, parse_type, plain, read_value, syntax_of, type_name, write_value
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser


class Mood(Enum):
    GOOD = "good"
    BAD = "bad"


@dataclass
class Place:
    name: str
    floor: int = 0


KINDS = [
    str,
    Line,
    int,
    float,
    bool,
    date,
    Literal["a b", "c"],
    Literal[1, 2],
    Mood,
    list[int],
    dict[str, float],
    Place,
]


@pytest.mark.parametrize("kind", KINDS, ids=type_name)
def test_a_types_name_reads_back(kind: Any) -> None:
    assert parse_type(type_name(kind)) == kind


def test_a_class_is_named_by_its_dotted_path() -> None:
    sys.modules["moods"] = sys.modules[__name__]
    assert Signature.parse("text -> mood: moods.Mood").type_of("mood") is Mood
    assert Signature.parse("text -> place: moods.Place").value("place", '{"name": "hall"}') == Place("hall")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flot", 'field type "flot" is not known; there are str, line, int'),
        ("print('x')", "is not known"),
        ("[", "is no type"),
        ("nowhere.Mood", "cannot be imported"),
        ("Literal['a', 'a ']", "has white space at an end"),
        ("Literal[x]", "a Literal holds texts in quotes or numbers"),
        ("list[flot]", "is not known"),
    ],
)
def test_a_type_that_is_none_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(FieldTypeError) as raised:
        Signature.parse(f"question -> answer: {text}")
    assert message in str(raised.value)
    assert '"answer"' in str(raised.value)


def test_choices_that_are_written_alike_are_refused() -> None:
    with pytest.raises(FieldTypeError, match=r"two choices .* have the same text"):
        Signature(("q",), ("a",), types={"a": Literal[1, "1"]})


@pytest.mark.parametrize(
    ("kind", "syntax"),
    [
        (str, None),
        (Line, None),
        (Reasoning, None),
        (int, Number(integer=True)),
        (float, Number()),
        (bool, Choices(("yes", "no"))),
        (Mood, Choices(("good", "bad"))),
        (Literal[1, 2], Choices(("1", "2"))),
    ],
)
def test_a_type_says_what_may_be_written(kind: Any, syntax: Any) -> None:
    assert syntax_of(kind) == syntax


def test_structured_types_are_held_to_a_json_schema() -> None:
    found = syntax_of(Place)
    assert isinstance(found, Schema)
    assert '"floor"' in found.json


def test_structured_types_are_written_in_the_order_of_their_fields() -> None:
    @dataclass
    class Judged:
        why: str
        answer: int  # after its reason, whatever the alphabet says

    found = syntax_of(Judged)
    assert isinstance(found, Schema)
    assert list(json.loads(found.json)["properties"]) == ["why", "answer"]


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (int, "1,200", 1200),
        (int, "7.0", 7),
        (float, "$3.50.", 3.5),
        (float, "−2", -2.0),
        (float, "12.3 %", 12.3),
        (int, "50%", 50),
        (int, "12345678901234567891.0", 12345678901234567891),
        (float, "6.1e-05", 6.1e-05),
        (bool, "True", True),
        (bool, "no.", False),
        (Mood, "GOOD", Mood.GOOD),
        (Literal[1, 2], "2", 2),
        (date, " 2024-02-29 ", date(2024, 2, 29)),
        (list[str], '["a"]', ["a"]),
        (Line, " two words ", "two words"),
        (Line, "\nParis \r\nIt is the capital.", "Paris"),
    ],
)
def test_a_text_is_read_as_its_type(kind: Any, text: str, value: Any) -> None:
    assert read_value(kind, text) == value
    assert type(read_value(kind, text)) is type(value)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (int, "3.5", "3.5 is no whole number"),
        (int, "seven", '"seven" is no number'),
        (float, "1.2.3", "is no number"),
        (int, "1" * 5000, '…" is too large a number'),
        (int, "9" * 400 + ".5", '…" is too large a number'),
        (float, "9" * 400, '…" is too large a number'),
        (bool, "maybe", '"maybe" is none of yes, true, no, false'),
        (Mood, "fine", '"fine" is none of good, bad'),
        (date, "tomorrow", "one is written 2024-07-26"),
        (list[int], '["x"]', "is no list"),
        (Place, '{"floor": 1}', "name: Field required"),
    ],
)
def test_a_text_that_is_no_value_is_said_with_the_text(kind: Any, text: str, message: str) -> None:
    with pytest.raises(FieldTypeError) as raised:
        read_value(kind, text)
    assert message in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_an_empty_field_is_no_value_of_any_type() -> None:
    with pytest.raises(FieldTypeError, match='"answer" is empty'):
        Signature.parse("question -> answer").value("answer", " \n")


@claimed(200)
@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**30), 10**30))
def test_numbers_are_written_in_digits_and_read_back(value: float) -> None:
    text = write_value(float, value)
    assert "e" not in text
    assert read_value(float, text) == float(value)


def test_what_has_no_place_in_a_field_is_refused() -> None:
    infinite = [(kind, value) for kind in (int, float) for value in (float("inf"), float("nan"), 10**400)]
    unlike = [(Literal[1, 2], True), (Literal["1"], 2), (Literal["1"], 1.5), (Mood, "fine")]
    for kind, value in [*infinite, *unlike, (int, 2.5), (bool, 1), (str, 3), (Place, 7)]:
        with pytest.raises(FieldTypeError):
            write_value(kind, value)


def test_values_are_shown_and_kept_as_their_text() -> None:
    assert as_text(Mood.GOOD) == "good"
    assert as_text(date(2024, 7, 26)) == "2024-07-26"
    assert as_text([Mood.BAD, 2]) == "[1] bad\n[2] 2"
    assert plain({"place": Place("hall", 1), "mood": Mood.BAD}) == {
        "place": {"name": "hall", "floor": 1},
        "mood": "bad",
    }


def test_a_list_of_values_in_yaml_stands_for_choices() -> None:
    program = Predict("query -> intent", types={"intent": ["refund", "new card"]})
    assert str(program.predict.signature) == "query -> intent: Literal['refund', 'new card']"


def test_the_choices_in_yaml_may_be_numbers_and_a_yes_without_quotes_is_explained() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Predict, "predict")
    read = parser.parse_object(yaml.safe_load("predict: {signature: text -> stars, types: {stars: [1, 2.5, '3']}}"))
    program = parser.instantiate_classes(read).predict
    assert str(program.predict.signature) == "text -> stars: Literal[1, 2.5, '3']"
    read = parser.parse_object(yaml.safe_load("predict: {signature: text -> ok, types: {ok: [yes, no]}}"))
    with pytest.raises(FieldTypeError, match=r'"ok": the choices \[True, False\] are no texts.* quote \'yes\''):
        parser.instantiate_classes(read)


@pytest.mark.parametrize(
    ("kind", "label", "text"),
    [
        (Literal["1", "2"], 1, "1"),
        (Literal["1", "2"], 2.0, "2"),
        (Literal[1, 2], 2.0, "2"),
        (Literal[1.0, 2.0], 1, "1.0"),
        (Literal[1, 2], "2", "2"),
        (Mood, Mood.BAD, "bad"),
    ],
)
def test_a_label_is_the_choice_of_its_text_or_value(kind: Any, label: Any, text: str) -> None:
    assert write_value(kind, label) == text


def test_a_class_body_is_a_signature() -> None:
    class Sort:
        """Which team
        answers?"""

        ticket: str
        team: Literal["billing", "shipping"] = Out("the team")  # type: ignore[assignment]

    Sort.__annotations__ = {"ticket": str, "team": Literal["billing", "shipping"]}
    found = Signature.of(Sort)
    assert str(found) == "ticket -> team: Literal['billing', 'shipping']"
    assert found.instruction == "Which team\nanswers?"
    assert found.descriptions == {"team": "the team"}


def test_a_field_assigned_anything_else_is_refused() -> None:
    class Sort:
        team: str = "billing"

    with pytest.raises(ValueError, match="field \"team\" of Sort is assigned 'billing'"):
        Signature.of(Sort)


def test_reasoning_is_a_first_output_of_that_name_or_type() -> None:
    assert Signature.parse("q -> reasoning, answer").reasoning == "reasoning"
    assert Signature.parse("q -> thoughts: Reasoning, answer").reasoning == "thoughts"
    assert Signature.parse("q -> reasoning: line, answer").reasoning == ""
    assert Signature.parse("q -> reasoning").reasoning == ""


def test_a_date_may_be_any_day_that_there_is_and_no_other() -> None:
    held = syntax_of(date)
    assert isinstance(held, Pattern)
    pattern = re.compile(held.regex)
    for year in (1, 4, 99, 100, 400, 1900, 1999, 2000, 2024, 9999):
        for month in range(14):
            for number in range(33):
                text = f"{year:04}-{month:02}-{number:02}"
                try:
                    day = date.fromisoformat(text)
                except ValueError:
                    assert not pattern.fullmatch(text)
                else:
                    assert pattern.fullmatch(day.isoformat())
    assert not pattern.fullmatch("0000-01-01")
