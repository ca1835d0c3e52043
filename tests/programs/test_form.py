"""Forms: what the LM is shown, what its completions are made of, and what is read from them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import date
from enum import Enum
from itertools import pairwise
from typing import Any, ClassVar, Literal

import pytest
from claims import claimed
from cotune.errors import BadValueError
from cotune.programs import (
    Choices,
    Completion,
    Demo,
    Example,
    Field,
    Filled,
    Fixed,
    Form,
    Json,
    Line,
    Lines,
    Markers,
    Number,
    ParseError,
    Predict,
    Prompt,
    ReasonThenFill,
    Runner,
    Sampling,
    Schema,
    Signature,
    Tags,
    exact_match,
)
from cotune.programs.demos import canonical
from hypothesis import given
from hypothesis import strategies as st


class Mood(Enum):
    GOOD = "good"
    BAD = "bad"


@dataclass
class Place:
    name: str
    floor: int


ONE = Signature.parse("question -> answer", instruction="Answer.")
TWO = Signature.parse("context, question -> reasoning, answer", instruction="Answer.")
THREE = Signature.parse("question -> plan, notes, answer")
FORMS: list[Form] = [ReasonThenFill(), Lines(), Tags(), Markers(), Json()]
MARKED: list[Form] = [ReasonThenFill(), Lines()]
TYPED = {
    Literal["yes", "no", "not sure"]: st.sampled_from(["yes", "no", "not sure"]),
    Mood: st.sampled_from(Mood),
    bool: st.booleans(),
    int: st.integers(-(10**12), 10**12),
    float: st.floats(-1e12, 1e12, allow_nan=False).map(lambda value: round(value, 6)),
    date: st.dates(),
    list[int]: st.lists(st.integers(-99, 99)),
    Place: st.builds(Place, st.text(st.characters(codec="utf-8"), max_size=8), st.integers(-9, 9)),
}


def names(form: Form) -> str:
    return type(form).__name__


each_form = pytest.mark.parametrize("form", FORMS, ids=names)
each_marked = pytest.mark.parametrize("form", MARKED, ids=names)


# -- what the LM is shown


def test_a_call_is_a_system_turn_demos_and_the_users_turn() -> None:
    demo = Demo({"question": "1+1"}, {"answer": "2"})
    assert ReasonThenFill().render(ONE, Prompt("Add.", (demo,)), {"question": "2+2"}) == [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "question: 1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "question: 2+2"},
    ]


@each_form
def test_the_prompts_instruction_replaces_the_signatures(form: Form) -> None:
    system = form.render(ONE, Prompt("Guess."), {"question": "?"})[0]["content"]
    assert system.startswith("Guess.")
    assert "Answer." not in system


def test_lines_lists_several_outputs_with_their_descriptions() -> None:
    signature = Signature.parse(
        "context, question -> reasoning, answer", descriptions={"context": "passages", "answer": "one word"}
    )
    system = Lines().render(signature, Prompt("Read."), {"context": "c", "question": "q"})[0]["content"]
    assert system == "Read.\ncontext: passages\nReply with these lines:\nreasoning: the reasoning\nanswer: one word"


def test_the_default_form_never_asks_a_reasoning_stage_for_a_format() -> None:
    turns = ReasonThenFill().render(TWO, Prompt("Read."), {"context": "c", "question": "q"})
    assert [turn["content"] for turn in turns] == ["Read.", "context: c\nquestion: q"]


@each_form
def test_choices_are_named_to_the_lm(form: Form) -> None:
    signature = Signature.parse("query -> intent: Literal['refund', 'new card']")
    assert "refund, new card" in form.render(signature, Prompt("Sort."), {"query": "?"})[0]["content"]


@each_form
def test_a_description_stands_beside_the_choices_and_not_in_their_place(form: Form) -> None:
    about = {"team": "who answers", "urgent": "whether it cannot wait", "size": "S if small, or else l"}
    signature = Signature.parse(
        "ticket -> team: Literal['desk', 'field'], urgent: bool, size: Literal['s', 'l']", descriptions=about
    )
    asked = form.render(signature, Prompt("Route."), {"ticket": "?"})[0]["content"]
    assert "team: who answers (one of desk, field)\n" in asked
    assert "urgent: whether it cannot wait (yes or no)" in asked
    assert "size: S if small, or else l" in asked.replace("\n", "$").split("(one of s")[0]  # it names them already
    assert "one of s, l" not in asked


@each_form
def test_a_request_for_repair_names_all_choices_of_a_described_field(form: Form) -> None:
    kinds = [f"intent {letter}" for letter in "abcdefghijklmn"]
    signature = Signature.parse("query -> intent", types={"intent": kinds}, descriptions={"intent": "what is wanted"})
    asked = form.repair(signature, '"refund" is none of intent a and 13 more.')
    assert all(kind in asked for kind in kinds)
    assert "13 more. Write" in asked


def test_reasoning_that_a_labelled_demo_lacks_is_left_out_and_never_said_to_be_missing() -> None:
    demo = Demo({"context": "c", "question": "q"}, {"answer": "42"})
    turns = ReasonThenFill().render(TWO, Prompt("Read.", (demo,)), {"context": "c", "question": "q"})
    assert turns[2]["content"] == "answer: 42"


@each_form
def test_data_is_never_a_template(form: Form) -> None:
    nasty = "{question} %s {0} {{x}} \\1 $answer"
    turns = form.render(ONE, Prompt(nasty, (Demo({"question": nasty}, {"answer": nasty}),)), {"question": nasty})
    assert turns[0]["content"].startswith(nasty)
    assert nasty in turns[1]["content"]
    assert form.parse(ONE, turns[2]["content"]) == {"answer": nasty}


# -- what a completion is made of


@each_form
@pytest.mark.parametrize("signature", [ONE, TWO, THREE], ids=str)
def test_layouts_have_fields_and_fixed_texts_by_turns(form: Form, signature: Signature) -> None:
    layout = form.layout(signature)
    assert all(type(part) is not type(after) for part, after in pairwise(layout))
    assert all(part.text and part.text == part.text.rstrip() for part in layout if isinstance(part, Fixed))
    fields = [part.name for part in layout if isinstance(part, Field)]
    assert fields == (["json"] if isinstance(form, Json) else list(signature.outputs))


def test_reasoning_comes_first_and_free_and_the_rest_is_put_behind_it() -> None:
    signature = Signature.parse("question -> reasoning, answer: float, sure: bool")
    first, mark, answer, other, sure = ReasonThenFill().layout(signature)
    assert isinstance(first, Field)
    assert first.syntax is None
    assert "\nanswer:" in first.stops
    assert (mark, other) == (Fixed("\n\nanswer:"), Fixed("\nsure:"))
    assert (answer.lead, answer.syntax) == (" ", Number())  # type: ignore[union-attr]
    assert sure.syntax == Choices(("yes", "no"))  # type: ignore[union-attr]


def test_generation_may_stop_where_a_new_example_would_begin() -> None:
    last = ReasonThenFill().layout(TWO)[-1]
    assert last.stops == ("\ncontext:", "\nquestion:")  # type: ignore[union-attr]


def test_a_field_of_one_line_ends_where_its_line_does() -> None:
    (field,) = ReasonThenFill().layout(Signature.parse("question -> answer: line"))
    assert field.stops[0] == "\n"  # type: ignore[union-attr]
    assert Signature.parse("question -> answer: line").type_of("answer") is Line


class Arrows(Form):
    """A form of a user's own, which says nothing of types."""

    def layout(self, signature: Signature) -> Any:
        return [part for name in signature.outputs for part in (Fixed(f"\n{name} =>"), Field(name, lead=" "))]


def test_a_form_of_ones_own_holds_its_fields_to_their_types() -> None:
    signature = Signature.parse("ticket -> team: Literal['desk', 'field'], cost: float, why: line, note")
    fields = [part for part in Arrows().typed_layout(signature) if isinstance(part, Field)]
    assert [part.syntax for part in fields] == [Choices(("desk", "field")), Number(), None, None]
    assert [part.stops for part in fields] == [(), (), ("\n",), ()]
    runner = Runner(Predict("ticket -> answer: int"), Recorder(), Arrows(), exact_match, Sampling())
    runner.run([Example.of({"ticket": "?"}, {"answer": "7"})], runner.program.initial_prompts())
    assert Recorder.layouts == [(Fixed("\nanswer =>"), Field("answer", lead=" ", syntax=Number(integer=True)))]


class Recorder:
    """Keeps the layouts that it is asked for."""

    layouts: ClassVar[list[Any]] = []

    def complete(self, requests: Any, sampling: Sampling) -> list[Completion]:
        self.layouts[:] = [request.layout for request in requests]
        return [Completion("answer => 7") for _ in requests]


def test_a_syntax_that_a_form_names_itself_stays() -> None:
    class Short(Arrows):
        def layout(self, signature: Signature) -> Any:
            return (Field(signature.outputs[0], syntax=Choices(("1", "2"))),)

    (field,) = Short().typed_layout(Signature.parse("question -> answer: int"))
    assert field.syntax == Choices(("1", "2"))  # type: ignore[union-attr]


@pytest.mark.parametrize("names", [["text"], ["answer", "answer"], []], ids=str)
def test_a_layout_whose_fields_are_not_the_outputs_is_refused(names: list[str]) -> None:
    class Wrong(Arrows):
        def layout(self, signature: Signature) -> Any:
            return tuple(Field(name) for name in names)

    with pytest.raises(
        BadValueError, match=r"layout of Wrong has the fields .*, but the outputs are answer; give each"
    ):
        Wrong().unwritable(ONE, {"answer": "5"})


def test_a_layout_may_have_more_fields_and_a_form_with_a_parse_of_its_own_other_ones() -> None:
    class Scratch(Arrows):
        def layout(self, signature: Signature) -> Any:
            return (Field("thoughts", stops=("\nanswer =>",)), *super().layout(signature))

    class Tokens(Arrows):
        def layout(self, signature: Signature) -> Any:
            return (Field("whole"),)

        def parse(self, signature: Signature, text: str) -> dict[str, str]:
            return {"answer": text.split()[-1]}

    for form, said in ((Scratch(), "so\nanswer => 5"), (Tokens(), "it is 5")):
        assert form.read(ONE, Completion(said))["answer"] == "5"
        assert form.typed_layout(ONE)


@pytest.mark.parametrize(
    ("text", "fix"),
    [("", "leave it out"), ("Answer: ", "lead=' '"), ("Answer:\n", r"lead='\\n'"), ("\n", r"lead='\\n'")],
)
def test_a_fixed_text_that_ends_with_white_space_is_refused_with_the_fix(text: str, fix: str) -> None:
    with pytest.raises(BadValueError, match=fix):
        Fixed(text)


# -- what is read


@pytest.mark.parametrize("between", ["", " ", "\n", "\n\n", " \n "])
def test_white_space_around_marks_does_not_matter(between: str) -> None:
    said = f"<reasoning>{between}a b{between}</reasoning>{between}<answer>{between}7</answer>"
    assert Tags().parse(TWO, said) == {"reasoning": "a b", "answer": "7"}
    marked = "[[ ## reasoning ## ]]|a b|[[## answer ##]]|7|[[##completed##]]".replace("|", between)
    assert Markers().parse(TWO, marked) == {"reasoning": "a b", "answer": "7"}


@each_form
def test_half_a_surrogate_pair_is_no_text(form: Form) -> None:
    said = json.dumps({"reasoning": "so \ud83d", "answer": "5"})
    if not isinstance(form, Json):
        said = form.write(TWO, json.loads(said))
    with pytest.raises(ParseError, match='"reasoning" has half a surrogate pair at character 3'):
        form.read(TWO, Completion(said))


def test_half_a_surrogate_pair_is_not_sent_back_with_the_request_for_repair() -> None:
    class Half:
        """Answers with half a surrogate pair, and keeps the last turns that it is shown."""

        shown: ClassVar[list[str]] = []

        def complete(self, requests: Any, sampling: Sampling) -> list[Completion]:
            self.shown += [message["content"] for request in requests for message in request.messages]
            return [Completion("so \ud83d") for _ in requests]

    runner = Runner(Predict("question -> answer"), Half(), Lines(), exact_match, Sampling(), max_error_rate=1.0)
    (one,) = runner.run([Example.of({"question": "?"}, {"answer": "7"})], runner.program.initial_prompts())
    assert one.error is not None
    assert "half a surrogate pair" in one.error.message
    assert "so ?" in Half.shown
    assert "".join(Half.shown).encode()


@each_form
def test_of_a_line_the_first_is_read_and_no_more_can_be_written(form: Form) -> None:
    signature = Signature.parse("question -> answer: line")
    answer = {"answer": "Paris\nIt is the capital of France."}
    assert form.unwritable(signature, answer)
    read = form.parse(signature, form.write(signature, answer))
    assert signature.value("answer", read["answer"]) == "Paris"
    assert canonical(signature, read) == {"answer": "Paris"}


def test_fields_that_an_engine_filled_in_are_read_by_position_whatever_they_hold() -> None:
    said = "the answer: 3\nanswer: 4"
    filled = (Filled("reasoning", said, 0, 9, "eos"), Filled("answer", " 5", 11, 12, "eos"))
    completion = Completion(f"{said}\nanswer: 5", fields=filled)
    assert ReasonThenFill().read(TWO, completion) == {"reasoning": said, "answer": "5"}


@pytest.mark.parametrize("said", ["Answer: 5", "**answer**: 5", "5"])
def test_a_name_that_the_lm_writes_before_a_field_that_comes_first_is_no_part_of_it(said: str) -> None:
    assert ReasonThenFill().read(ONE, Completion(said, fields=(Filled("answer", said, 0, 2, "eos"),))) == {
        "answer": "5"
    }


values = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40).map(str.strip).filter(bool)
pieces = st.lists(st.sampled_from(["answer:", "\n", "**", "<answer>", "[[ ## answer ## ]]", '"', "a", " "]), max_size=8)


@each_form
@claimed(200)
@given(values | pieces.map("".join).map(str.strip).filter(bool), values)
def test_what_is_written_is_read_back_or_refused_by_name(form: Form, first: str, last: str) -> None:
    outputs = {"reasoning": first, "answer": last}
    why = form.unwritable(TWO, outputs)
    if why:
        assert any(name in why for name in outputs)
    else:
        assert form.parse(TWO, form.write(TWO, outputs)) == outputs


@each_form
@claimed(100)
@given(st.data())
def test_typed_values_are_read_back_from_every_form(form: Form, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(list(TYPED)))
    value = data.draw(TYPED[kind])
    signature = Signature(("question",), ("first", "last"), types={"first": kind, "last": kind})
    texts = {name: signature.text(name, value) for name in signature.outputs}
    read = form.parse(signature, form.write(signature, texts))
    assert {name: signature.value(name, text) for name, text in read.items()} == {"first": value, "last": value}


@each_form
@claimed(200)
@given(st.text(st.characters(codec="utf-8"), max_size=60) | pieces.map("".join))
def test_any_text_is_read_or_refused_in_one_line(form: Form, text: str) -> None:
    found: dict[str, str] = {}
    refused = ""
    try:
        found = form.parse(TWO, text)
    except ParseError as error:
        refused = str(error)
    assert (set(found) == {"reasoning", "answer"} and all(found.values())) or len(refused.splitlines()) == 1


@each_marked
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
def test_markers_are_read_in_any_dress(form: Form, text: str) -> None:
    assert form.parse(TWO, text) == {"reasoning": "it is so", "answer": "42"}


@each_marked
@pytest.mark.parametrize(("text", "answer"), [("42", "42"), ("answer: 42", "42"), ("Well.\nAnswer: 42", "42")])
def test_one_output_is_read_with_or_without_its_marker(form: Form, text: str, answer: str) -> None:
    assert form.parse(ONE, text) == {"answer": answer}


@each_marked
@pytest.mark.parametrize("marker", ["final_answer", "Final Answer", "FINAL ANSWER", "**Final answer**"])
def test_a_name_of_several_words_is_read_in_words(form: Form, marker: str) -> None:
    signature = Signature.parse("question -> reasoning, final_answer")
    assert form.parse(signature, f"reasoning: so\n{marker}: 4") == {"reasoning": "so", "final_answer": "4"}
    one = Signature.parse("question -> final_answer")
    assert form.parse(one, f"{marker}: 4") == {"final_answer": "4"}


@each_marked
def test_values_may_have_many_lines(form: Form) -> None:
    text = "reasoning: first\n\n- second: yes\nquestion: none\nanswer: a\nb"
    assert form.parse(TWO, text) == {"reasoning": "first\n\n- second: yes\nquestion: none", "answer": "a\nb"}


@each_marked
def test_a_marker_inside_a_line_is_text(form: Form) -> None:
    text = "reasoning: I think the answer: 7 is wrong\nanswer: 8"
    assert form.parse(TWO, text) == {"reasoning": "I think the answer: 7 is wrong", "answer": "8"}


@each_marked
def test_a_field_whose_name_ends_another_is_not_its_marker(form: Form) -> None:
    signature = Signature.parse("question -> final_answer, answer")
    with pytest.raises(ParseError, match='no "answer"'):
        form.parse(signature, "final_answer: 7")


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
        (THREE, "plan: p\nanswer: a", "notes"),
    ],
)
@each_marked
def test_a_missing_or_empty_field_is_a_parse_error_that_names_it(
    form: Form, signature: Signature, text: str, missing: str
) -> None:
    with pytest.raises(ParseError, match=f'no "{missing}"'):
        form.parse(signature, text)


@each_form
def test_a_long_completion_is_shortened_in_the_error(form: Form) -> None:
    with pytest.raises(ParseError) as raised:
        form.parse(TWO, "reasoning: " + "x" * 1000)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"reasoning": "so", "answer": 42}', {"reasoning": "so", "answer": "42"}),
        ('Here it is: {"answer": "a\\nb", "reasoning": "so"} Done.', {"reasoning": "so", "answer": "a\nb"}),
    ],
)
def test_json_is_read_wherever_it_stands(text: str, found: dict[str, Any]) -> None:
    assert Json().parse(TWO, text) == found


def test_json_holds_dates_to_their_pattern() -> None:
    (field,) = Json().layout(Signature.parse("mail -> day: date"))
    assert isinstance(field, Field)
    assert isinstance(field.syntax, Schema)
    pattern = json.loads(field.syntax.json)["properties"]["day"]["pattern"]
    assert re.search(pattern, "2024-02-29")
    assert not re.search(pattern, "2023-02-29")
    assert not re.search(pattern, "on 2024-02-29")


@pytest.mark.parametrize(
    ("kind", "said", "value"),
    [
        (int | None, "null", None),
        (int | None, "5", 5),
        (str | None, '"5"', "5"),
        (str | None, '""', ""),
        (list[str], '["a"]', ["a"]),
        (list[str], '"[\\"a\\"]"', ["a"]),  # JSON within JSON, as some LMs write it
    ],
)
def test_json_reads_all_that_its_schema_allows(kind: Any, said: str, value: Any) -> None:
    signature = Signature(("q",), ("a", "b"), types={"a": kind})
    read = Json().parse(signature, f'{{"a": {said}, "b": "x"}}')
    assert signature.value("a", read["a"]) == value


@pytest.mark.parametrize("said", ["null", '""'])
def test_json_without_a_value_for_a_text_is_refused(said: str) -> None:
    with pytest.raises(ParseError, match='no "answer"'):
        Json().parse(ONE, f'{{"answer": {said}}}')


def test_json_that_is_nested_too_deeply_is_refused() -> None:
    with pytest.raises(ParseError, match="no JSON object"):
        Json().parse(ONE, '{"answer": ' + "[" * 100_000)


def test_json_holds_numbers_as_numbers() -> None:
    signature = Signature.parse("question -> answer: float, tags: list[str]")
    written = Json().write(signature, {"answer": "7", "tags": '["a"]'})
    assert json.loads(written) == {"answer": 7.0, "tags": ["a"]}
