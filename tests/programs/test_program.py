"""Programs and stages: names are identities, values become text."""

from __future__ import annotations

import copy
import pickle

import pytest
from cotune.programs import Call, Demo, Example, Predict, PredictionError, Program, Prompt, Signature, Stage
from cotune.programs.program import StageError, as_text
from fakes import Branch, FakeLM, Loop

PLAIN = Signature.parse("number -> answer")


def test_a_stage_takes_the_name_of_its_attribute_in_the_class_body_and_in_init() -> None:
    assert list(Branch().stages) == ["halve", "double"]
    assert list(Predict("question -> answer").stages) == ["predict"]


def test_two_instances_do_not_share_the_stages_of_init() -> None:
    first, second = Predict("a -> b"), Predict("c -> d")
    assert first.stages["predict"].signature.inputs == ("a",)
    assert second.stages["predict"].signature.inputs == ("c",)


def test_a_subclass_keeps_and_may_replace_the_stages_of_its_base() -> None:
    class More(Loop):
        check = Stage(PLAIN)

    class Other(Loop):
        double = Stage(Signature.parse("number -> answer", instruction="Twice."))

    assert list(More().stages) == ["double", "check"]
    assert Other().initial_prompts() == {"double": Prompt("Twice.")}


def test_one_stage_under_two_names_is_an_error() -> None:
    stage = Stage(PLAIN, "first")
    with pytest.raises((TypeError, RuntimeError)) as raised:
        type("Twice", (), {"first": stage, "second": stage})
    # Python below 3.12 wraps what __set_name__ raises.
    assert 'already named "first"' in str(raised.value.__cause__ or raised.value)

    program = Predict("a -> b")
    program.again = program.predict
    with pytest.raises(TypeError, match='"predict" has a second name, "again"'):
        _ = program.stages


def test_a_program_without_stages_says_so() -> None:
    class Empty(Program):
        def run(self):  # type: ignore[no-untyped-def]
            return {}

    with pytest.raises(TypeError, match="Empty has no stages"):
        _ = Empty().stages


def test_a_call_with_a_missing_or_unknown_field_names_it() -> None:
    with pytest.raises(TypeError, match='"double" misses "number"; its inputs are number'):
        Loop().double()
    with pytest.raises(TypeError, match='does not take "digit"'):
        Loop().double(number=1, digit=2)


def test_a_call_holds_text_in_the_order_of_the_signature() -> None:
    program = Predict("b, a -> c")
    assert program.predict(a=1, b=["x"]) == Call("predict", {"b": "[1] x", "a": "1"})
    assert list(program.predict(a=1, b=2).inputs) == ["b", "a"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is {x}", "as it is {x}"),
        (True, "true"),
        (0.1, "0.1"),
        (("a", 2), "[1] a\n[2] 2"),
        ([], "(none)"),
        ({"é": [1]}, '{"é": [1]}'),
        ("", ""),
    ],
)
def test_values_become_text(value: object, text: str) -> None:
    assert as_text(value) == text


@pytest.mark.parametrize("value", [None, [None], {1, 2}, object()])
def test_what_has_no_text_raises(value: object) -> None:
    with pytest.raises(TypeError):
        as_text(value)


@pytest.mark.parametrize(
    "held", [[Stage("a -> b")], {"first": Stage("a -> b")}, (Stage("a -> b"),)], ids=["list", "dict", "tuple"]
)
def test_stages_that_stand_where_they_have_no_name_are_refused(held: object) -> None:
    class Hops(Loop):
        hops = held

    with pytest.raises(StageError, match=rf"Hops\.hops: stages in a {type(held).__name__} have no name"):
        _ = Hops().stages


def test_a_program_runs_in_one_line_as_it_comes_and_with_prompts() -> None:
    lm = FakeLM(lambda request: f"answer: {len(request.messages)}")
    ask = Predict("question -> answer: int", instruction="Count.")
    assert ask(question="How many?", lm=lm) == {"answer": 2}
    assert lm.requests[0].messages[0]["content"].startswith("Count.")
    demo = Demo({"question": "None?"}, {"answer": "0"}, source="x")
    assert ask(question="And now?", lm=lm, prompts={"predict": Prompt("Count.", (demo,))}).answer == 4
    with pytest.raises(PredictionError, match='stage "predict"'):
        ask(question="How many?", lm=FakeLM(lambda request: "answer: many"))
    with pytest.raises(PredictionError, match='misses "question"'):
        ask(query="How many?", lm=lm)


# Newcomers' slips


class Slip(Program):
    route = Stage("ticket -> team")
    rate = Stage("ticket -> urgency")

    def __init__(self, slip: str) -> None:
        self.slip = slip

    def run(self, ticket):  # type: ignore[no-untyped-def]
        routed = self.route(ticket=ticket)
        if self.slip == "no yield":
            return routed
        if self.slip == "an item":
            return {"team": routed["team"]}
        if self.slip == "an attribute":
            return {"team": routed.team}
        if self.slip == "all of it":
            return {**routed}
        if self.slip == "in a text":
            return {"team": f"the {routed}"}
        if self.slip == "the stage":
            routed = yield self.route
        if self.slip == "no names":
            routed = yield self.route(ticket)
        rated = yield self.rate(ticket=routed if self.slip == "an input" else ticket)
        return rated if self.slip == "works" else {"team": routed} if self.slip == "a value" else routed


NO_YIELD = ("an item", "an attribute", "all of it", "in a text", "an input", "a value", "the prediction")


@pytest.mark.parametrize("slip", [*NO_YIELD, "the stage", "no names"])
def test_a_call_that_is_written_otherwise_says_how_it_is_written(slip: str) -> None:
    lm = FakeLM(lambda request: "urgency: high")
    with pytest.raises(PredictionError) as raised:
        Slip(slip)(ticket="It is broken.", lm=lm)
    assert ("outputs = yield self.route(...)" if slip in NO_YIELD else "yield self.route(ticket=...)") in str(
        raised.value
    )
    assert Slip("works")(ticket="It is broken.", lm=lm).urgency == "high"


def test_outputs_and_predictions_have_attributes_and_name_the_ones_there_are() -> None:
    class Both(Program):
        say = Stage("text -> answer")

        def run(self, text):  # type: ignore[no-untyped-def]
            said = yield self.say(text=text)
            return {"city": said.answer, "right": said["answer"]}

    there = Both()(text="?", lm=FakeLM(lambda request: "answer: Oslo"))
    assert (there.city, there["right"]) == ("Oslo", "Oslo")
    for slip in (lambda: there.citty, lambda: there["citty"]):
        with pytest.raises((AttributeError, KeyError), match='there is no value "citty"; there are city, right'):
            slip()
    with pytest.raises(TypeError, match="pass the inputs of run\\(\\) by name"):
        Both()("?", lm=FakeLM(lambda request: ""))  # type: ignore[arg-type]


def test_an_example_taken_for_a_row_says_how_it_is_made_and_read() -> None:
    with pytest.raises(TypeError, match=r'Write Example.of\(\{"question": ...\}, \{"answer": ...\}\)'):
        Example(question="1+1?", answer="2")
    example = Example.of({"question": "1+1?"}, {"answer": "2"})
    with pytest.raises(AttributeError, match=r'no attribute "answer"; write example.labels\["answer"\]'):
        _ = example.answer  # type: ignore[attr-defined]
    assert copy.deepcopy(example) == pickle.loads(pickle.dumps(example)) == example
