"""Claims about response formats: what an endpoint is held to, and what is made of its answer."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from cotune.inference.openai import OpenAILM
from cotune.inference.response_format import read_reply, response_format
from cotune.programs import (
    Call,
    Example,
    Field,
    Fixed,
    Form,
    Json,
    Lines,
    Markers,
    Predict,
    Program,
    ReasonThenFill,
    Rollout,
    Runner,
    Sampling,
    Schema,
    Signature,
    Stage,
    Tags,
    exact_match,
)
from endpoint_server import Body, EndpointServer, Reply, serving


@pytest.fixture
def server() -> Iterator[EndpointServer]:
    with serving(lambda body: "") as running:
        yield running


TYPED = Signature.parse("question -> reasoning, answer: int, sure: bool, kind: Literal['a', 'b'], when: date")


def schema_of(signature: Signature, form: Form) -> dict[str, Any]:
    asked = response_format(form.layout(signature))
    assert asked is not None
    assert asked["json_schema"]["strict"] is True
    return dict(asked["json_schema"]["schema"])


def test_every_field_is_a_property_in_its_order_and_of_its_type() -> None:
    schema = schema_of(TYPED, ReasonThenFill())
    assert list(schema["properties"]) == schema["required"] == ["reasoning", "answer", "sure", "kind", "when"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["answer"] == {"type": "integer"}
    assert schema["properties"]["sure"] == {"type": "string", "enum": ["yes", "no"]}
    assert schema["properties"]["kind"] == {"type": "string", "enum": ["a", "b"]}
    days = [bool(re.match(schema["properties"]["when"]["pattern"], day)) for day in ("2024-02-29", "2024-99-99")]
    assert days == [True, False]


def test_definitions_move_to_the_root_and_of_two_of_a_name_each_is_still_referred_to() -> None:
    nested = json.dumps({"type": "array", "items": {"$ref": "#/$defs/P"}, "$defs": {"P": {"type": "string"}}})
    other = nested.replace('"string"', '"number"')
    one = (Fixed("a:"), Field("a", syntax=Schema(nested)), Fixed("b:"), Field("b"))
    asked = response_format(one)
    assert asked is not None
    assert asked["json_schema"]["schema"]["$defs"] == {"P": {"type": "string"}}
    assert "$defs" not in asked["json_schema"]["schema"]["properties"]["a"]
    both = response_format((*one[:3], Field("b", syntax=Schema(other))))
    assert both is not None
    found = both["json_schema"]["schema"]
    assert found["properties"]["b"]["items"] == {"$ref": "#/$defs/b.P"}
    assert found["$defs"] == {"P": {"type": "string"}, "b.P": {"type": "number"}}


@dataclass
class Goods:
    name: str
    size: int | None = None


@dataclass
class Order:
    goods: list[Goods]
    first: Goods


@dataclass
class Urgent:
    order: Order
    urgent: bool = False


def asked_of(kind: type) -> dict[str, Any]:
    asked = response_format(Json().layout(Signature(("mail",), ("found",), "Read.", {}, {"found": kind})))
    assert asked is not None
    return dict(asked["json_schema"])


def test_objects_are_closed_at_every_depth_where_that_keeps_their_meaning() -> None:
    asked = asked_of(Order)
    goods = asked["schema"]["$defs"]["Goods"]
    assert asked["strict"] is True
    assert goods["required"] == ["name", "size"], "null says the same as nothing"
    assert {"type": "null"} in goods["properties"]["size"]["anyOf"]
    assert not any("default" in one for one in goods["properties"].values())
    assert goods["additionalProperties"] is False


@pytest.mark.parametrize("kind", [Urgent, dict[str, int], list[tuple[int, str]], list[Any]], ids=str)
def test_a_schema_that_cannot_be_strict_is_sent_as_it_is(kind: type) -> None:
    asked = asked_of(kind)
    assert asked["strict"] is False
    assert '"required": ["order", "urgent"]' not in json.dumps(asked)


def test_text_alone_needs_no_format() -> None:
    assert response_format(Lines().layout(Signature.parse("question -> answer"))) is None


@pytest.mark.parametrize("form", [Lines(), ReasonThenFill(), Tags(), Markers()], ids=lambda form: type(form).__name__)
def test_the_text_of_a_reply_is_as_the_form_writes_it(form: Form) -> None:
    values = {"reasoning": "2 and 2", "answer": 4, "sure": "yes", "kind": "b", "when": "2026-01-31"}
    read = read_reply(form.layout(TYPED), json.dumps(values))
    assert read is not None
    text, fields = read
    assert form.parse(TYPED, text) == {name: str(value) for name, value in values.items()}
    assert {field.name: field.text.strip() for field in fields} == form.parse(TYPED, text)


def test_what_is_not_in_the_format_is_left_to_the_form() -> None:
    layout = ReasonThenFill().layout(TYPED)
    for content in ("answer: 4", '{"reasoning": "cut he', '{"answer": 4}', "4", "[1]"):
        assert read_reply(layout, content) is None
    assert read_reply(Json().layout(TYPED), "[1]") is None


# In a program


class Sum(Program):
    """Reasons, then gives a number."""

    add = Stage(Signature.parse("question -> reasoning, answer: int", instruction="Add."))

    def run(self, question: str) -> Generator[Call, Mapping[str, Any], Mapping[str, Any]]:
        return (yield self.add(question=question))


ASKED = [Example.of({"question": f"{n} + {n}"}, {"answer": 2 * n}, id=str(n)) for n in range(3)]


def total(body: Body) -> int:
    question = next(m["content"] for m in body["messages"] if m["role"] == "user")
    return 2 * int(question.removeprefix("question: ").split()[0])


def run(server: EndpointServer, form: Form, program: Program | None = None, **options: Any) -> list[Rollout]:
    lm = OpenAILM("m", server.url, **options)
    try:
        program = program or Sum()
        return Runner(program, lm, form, exact_match, Sampling()).run(ASKED, program.initial_prompts())
    finally:
        lm.close()


@pytest.mark.parametrize("form", [ReasonThenFill(), Lines(), Json()], ids=lambda form: type(form).__name__)
def test_an_endpoint_with_response_formats_is_always_read(form: Form, server: EndpointServer) -> None:
    def answer(body: Body) -> str:
        assert "stop" not in body
        assert list(body["response_format"]["json_schema"]["schema"]["properties"]) == ["reasoning", "answer"]
        return json.dumps({"reasoning": "so:\nanswer: 99", "answer": total(body)})

    server.answer = answer
    done = run(server, form)
    assert [rollout.score for rollout in done] == [1, 1, 1]
    assert done[1].prediction == {"reasoning": "so:\nanswer: 99", "answer": 2}
    assert len(server.bodies) == 3


@pytest.mark.parametrize("error", ["response_format is not supported", "invalid grammar: $.x"])
def test_an_endpoint_without_them_is_found_out_and_read_as_text(
    error: str, server: EndpointServer, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(body: Body) -> str | Reply:
        if "response_format" in body:
            return Reply(status=400, error={"message": error})
        return f"Adding.\nanswer: {total(body)}"

    server.answer = answer
    assert [rollout.score for rollout in run(server, ReasonThenFill(), concurrency=1)] == [1, 1, 1]
    assert len(server.bodies) == 4
    assert capsys.readouterr().out.count("does not take response_format; it is left out") == 1


def test_a_schema_that_is_refused_is_refused_for_its_stage_alone(server: EndpointServer) -> None:
    def answer(body: Body) -> str | Reply:
        if "sure" in json.dumps(body.get("response_format", {})):
            return Reply(
                status=400, error={"message": "Invalid schema for response_format", "param": "response_format"}
            )
        return json.dumps({"reasoning": "so", "answer": 2}) if "response_format" in body else "so\n\nsure: yes"

    server.answer = answer
    lm = OpenAILM("m", server.url)
    for _ in range(2):
        for signature in ("question -> reasoning, sure: bool", "question -> reasoning, answer: int"):
            program = Predict(signature)
            Runner(program, lm, ReasonThenFill(), exact_match, Sampling()).run(ASKED[:1], program.initial_prompts())
    lm.close()
    assert ["response_format" in body for body in server.bodies] == [True, False, True, False, True]


def test_what_cannot_be_read_is_asked_for_once_more_in_the_form(server: EndpointServer) -> None:
    def answer(body: Body) -> str:
        if len(body["messages"]) == 2:
            return f"I think that it is {total(body)}" if total(body) else ""
        return f"Adding.\nanswer: {total(body)}" if total(body) < 4 else "it is four"

    server.answer = answer
    done = run(server, ReasonThenFill(), response_format="off")
    assert [rollout.score for rollout in done] == [0, 1, 0]
    assert [rollout.error and rollout.error.kind for rollout in done] == ["format", None, "format"]
    step = done[1].steps[0]
    assert step.completion.repaired
    assert [message["role"] for message in step.messages] == ["system", "user"]  # the program's own request
    repairs = sorted((body["messages"] for body in server.bodies if len(body["messages"]) == 4), key=str)
    assert [messages[2]["content"] for messages in repairs] == ["I think that it is 2", "I think that it is 4"]
    asked = repairs[0][3]["content"]
    assert asked.startswith('That cannot be read: the completion has no "answer"')
    assert asked.endswith("in this form and with nothing else:\n\n(the reasoning)\n\nanswer: (the answer)")


def test_an_empty_completion_is_asked_for_again_without_an_empty_turn(server: EndpointServer) -> None:
    server.answer = lambda body: "x\nanswer: 0" if "cannot be read" in body["messages"][-1]["content"] else ""
    done = run(server, ReasonThenFill(), response_format="off")
    assert done[0].score == 1
    assert all(len(body["messages"]) == 2 for body in server.bodies)


def test_a_value_of_the_wrong_type_is_asked_for_again(server: EndpointServer) -> None:
    server.answer = lambda body: f"x\nanswer: {total(body) if len(body['messages']) > 2 else 'many'}"
    assert [rollout.score for rollout in run(server, ReasonThenFill(), response_format="off")] == [1, 1, 1]


def test_a_refused_request_is_a_failed_rollout_that_is_not_asked_again(server: EndpointServer) -> None:
    def answer(body: Body) -> str | Reply:
        if total(body) == 2:
            return Reply(status=400, error={"message": "content policy"})
        return f"x\nanswer: {total(body)}"

    server.answer = answer
    done = run(server, ReasonThenFill(), response_format="off", concurrency=1)
    assert [rollout.score for rollout in done] == [1, 0, 1]
    assert done[1].error is not None
    assert "the endpoint refused the request" in done[1].error.message
    assert len(server.bodies) == 3


def test_a_typed_single_output_is_held_to_its_choices(server: EndpointServer) -> None:
    server.answer = lambda body: '{"answer": "no"}' if "response_format" in body else "perhaps"
    program = Predict("question -> answer: Literal['yes', 'no']")
    done = run(server, Lines(), program)
    assert [rollout.prediction for rollout in done] == [{"answer": "no"}] * 3
    assert done[0].steps[0].completion.text == "no"
