"""ChatTemplate: what the LM is shown, and what is read from what it writes."""

from __future__ import annotations

import pytest
from cotune.programs import ChatTemplate, Demo, ParseError, Prompt, Signature
from hypothesis import given, settings
from hypothesis import strategies as st

ONE = Signature.parse("question -> answer", instruction="Answer.")
TWO = Signature.parse("context, question -> reasoning, answer", instruction="Answer.")
THREE = Signature.parse("question -> plan, reasoning, answer")
TEMPLATE = ChatTemplate()


def test_a_call_is_a_system_turn_demos_and_the_users_turn() -> None:
    demo = Demo({"question": "1+1"}, {"answer": "2"})
    assert TEMPLATE.render(ONE, Prompt("Add.", (demo,)), {"question": "2+2"}) == [
        {"role": "system", "content": "Add.\nReply with the answer only."},
        {"role": "user", "content": "question: 1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "question: 2+2"},
    ]


def test_the_prompts_instruction_replaces_the_signatures() -> None:
    assert "Answer." not in TEMPLATE.render(ONE, Prompt("Guess."), {"question": "?"})[0]["content"]


def test_several_outputs_are_listed_with_their_descriptions() -> None:
    signature = Signature.parse(
        "context, question -> reasoning, answer", descriptions={"context": "passages", "answer": "one word"}
    )
    system = TEMPLATE.render(signature, Prompt("Read."), {"context": "c", "question": "q"})[0]["content"]
    assert system == "Read.\ncontext: passages\nReply with these lines:\nreasoning: the reasoning\nanswer: one word"


def test_a_labelled_demo_shows_the_missing_output_as_not_given() -> None:
    demo = Demo({"context": "c", "question": "q"}, {"answer": "42"})
    turns = TEMPLATE.render(TWO, Prompt("Read.", (demo,)), {"context": "c", "question": "q"})
    assert turns[2]["content"] == "reasoning: (not given)\nanswer: 42"


def test_data_is_never_a_template() -> None:
    nasty = "{question} %s {0} {{x}} \\1 $answer"
    turns = TEMPLATE.render(ONE, Prompt(nasty, (Demo({"question": nasty}, {"answer": nasty}),)), {"question": nasty})
    assert turns[0]["content"].startswith(nasty)
    assert [turn["content"] for turn in turns[1:]] == [f"question: {nasty}", nasty, f"question: {nasty}"]


@pytest.mark.parametrize("signature", [ONE, TWO, THREE])
def test_parse_reads_what_complete_writes(signature: Signature) -> None:
    outputs = {name: f"the {name},\nin two lines" for name in signature.outputs}
    assert TEMPLATE.parse(signature, TEMPLATE.complete(signature, outputs)) == outputs


plain_text = st.text(st.characters(codec="utf-8", exclude_characters=":"), min_size=1).map(str.strip).filter(bool)


@settings(max_examples=100, deadline=None, database=None)
@given(plain_text, plain_text)
def test_parse_reads_any_text_without_markers_back(reasoning: str, answer: str) -> None:
    outputs = {"reasoning": reasoning.lstrip("* \t"), "answer": answer.lstrip("* \t")}
    if all(outputs.values()):
        assert TEMPLATE.parse(TWO, TEMPLATE.complete(TWO, outputs)) == outputs


@pytest.mark.parametrize(
    "text",
    [
        "reasoning: it is so\nanswer: 42",
        "  Reasoning: it is so\n\nANSWER:42  \n",
        "**reasoning:** it is so\n**Answer**: 42",
        "# reasoning: it is so\n## answer: 42",
        "it is so\nanswer: 42",
        "Sure!\nreasoning: it is so\nanswer: 42",
    ],
)
def test_markers_are_read_in_any_dress(text: str) -> None:
    assert TEMPLATE.parse(TWO, text) == {"reasoning": "it is so", "answer": "42"}


@pytest.mark.parametrize(("text", "answer"), [("42", "42"), ("answer: 42", "42"), ("Well.\nAnswer: 42", "42")])
def test_one_output_is_read_with_or_without_its_marker(text: str, answer: str) -> None:
    assert TEMPLATE.parse(ONE, text) == {"answer": answer}


def test_values_may_have_many_lines() -> None:
    text = "reasoning: first\n\n- second: yes\nquestion: none\nanswer: a\nb"
    assert TEMPLATE.parse(TWO, text) == {"reasoning": "first\n\n- second: yes\nquestion: none", "answer": "a\nb"}


def test_a_marker_inside_a_line_is_text() -> None:
    text = "reasoning: I think the answer: 7 is wrong\nanswer: 8"
    assert TEMPLATE.parse(TWO, text) == {"reasoning": "I think the answer: 7 is wrong", "answer": "8"}


def test_a_field_whose_name_ends_another_is_not_its_marker() -> None:
    signature = Signature.parse("question -> final_answer, answer")
    with pytest.raises(ParseError, match='no "answer"'):
        TEMPLATE.parse(signature, "final_answer: 7")


def test_the_first_of_two_equal_markers_counts() -> None:
    assert TEMPLATE.parse(TWO, "reasoning: r\nanswer: 1\nanswer: 2")["answer"] == "1\nanswer: 2"


@pytest.mark.parametrize(
    ("signature", "text", "missing"),
    [
        (ONE, "", "answer"),
        (ONE, " \n ", "answer"),
        (ONE, "answer:", "answer"),
        (TWO, "reasoning: it goes on and on", "answer"),  # cut before its end
        (TWO, "reasoning: r\nanswer:", "answer"),
        (TWO, "answer: 42", "reasoning"),
        (TWO, "answer: 42\nreasoning: r", "answer"),  # the wrong way round
        (THREE, "plan: p\nanswer: a", "reasoning"),
    ],
)
def test_a_missing_or_empty_field_is_a_parse_error_that_names_it(signature: Signature, text: str, missing: str) -> None:
    with pytest.raises(ParseError, match=f'no "{missing}"'):
        TEMPLATE.parse(signature, text)


def test_a_long_completion_is_shortened_in_the_error() -> None:
    with pytest.raises(ParseError) as raised:
        TEMPLATE.parse(TWO, "reasoning: " + "x" * 1000)
    assert len(str(raised.value)) < 150


def test_generation_may_stop_where_a_new_example_would_begin() -> None:
    assert TEMPLATE.stops(TWO) == ("\ncontext:", "\nquestion:")
