"""Signatures: parsing the short form, and saying what is wrong with a bad one."""

from __future__ import annotations

import pytest
from cotune.programs import Signature


@pytest.mark.parametrize(
    "text", ["context,question->answer", "  context ,  question  ->\n answer ", "context, question -> answer,"]
)
def test_spacing_and_a_last_comma_do_not_matter(text: str) -> None:
    signature = Signature.parse(text)
    assert (signature.inputs, signature.outputs) == (("context", "question"), ("answer",))


def test_the_order_of_fields_is_kept() -> None:
    assert Signature.parse("b, a -> d, c").outputs == ("d", "c")


def test_a_stage_may_have_no_inputs_but_must_have_an_output() -> None:
    assert Signature.parse("-> idea").inputs == ()
    with pytest.raises(ValueError, match="at least one output"):
        Signature.parse("question ->")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("question answer", "0 arrows"),
        ("a -> b -> c", "2 arrows"),
        ("question -> the answer", '"the answer" is not a Python name'),
        ("2nd -> answer", '"2nd" is not a Python name'),
        ("question, question -> answer", '"question" occurs more than once'),
        ("answer -> answer", '"answer" occurs more than once'),
    ],
)
def test_a_bad_signature_is_named_in_the_error(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Signature.parse(text)


def test_a_description_of_no_field_is_an_error() -> None:
    with pytest.raises(ValueError, match='"anwser", which is not a field; the fields are question, answer'):
        Signature.parse("question -> answer", descriptions={"anwser": "a number"})


def test_a_signature_without_instruction_gets_a_plain_one() -> None:
    assert Signature.parse("a, b -> c").instruction == "Given a, b, produce c."
    assert Signature.parse("-> c").instruction == "Produce c."
    assert Signature.parse("a -> c", instruction="Do it.").instruction == "Do it."
