"""Prompts and examples: plain dicts there and back, and ids that depend on content alone."""

from __future__ import annotations

import json

from cotune.programs import Demo, Example, Prompt, prompts_from_dict, prompts_id, prompts_to_dict

PROMPTS = {
    "hop": Prompt("Search.", (Demo({"question": "Où?"}, {"query": "où {x} \n"}, "e1"),)),
    "answer": Prompt("Answer."),
}


def test_prompts_survive_json() -> None:
    assert prompts_from_dict(json.loads(json.dumps(prompts_to_dict(PROMPTS)))) == PROMPTS


def test_the_plain_form_holds_plain_types_only() -> None:
    def plain(value: object) -> bool:
        if type(value) is dict:
            return all(type(k) is str and plain(v) for k, v in value.items())
        return all(plain(v) for v in value) if type(value) is list else type(value) is str

    assert plain(prompts_to_dict(PROMPTS))


def test_a_demo_without_source_reads_back() -> None:
    assert Demo.from_dict({"inputs": {}, "outputs": {"a": "1"}}) == Demo({}, {"a": "1"})


def test_ids_name_content_and_not_order_of_stages_or_fields() -> None:
    assert prompts_id(PROMPTS) == prompts_id(dict(reversed(PROMPTS.items())))
    assert prompts_id(PROMPTS) == prompts_id(prompts_from_dict(prompts_to_dict(PROMPTS)))


def test_ids_are_the_same_on_every_machine() -> None:
    assert prompts_id({"answer": Prompt("Answer.")}) == "da0bb0e87a14"


def test_any_change_changes_the_id() -> None:
    demo = Demo({"q": "1"}, {"a": "2"}, "x")
    variants = [
        Prompt("Answer."),
        Prompt("Answer!"),
        Prompt("Answer.", (demo,)),
        Prompt("Answer.", (demo, demo)),
        Prompt("Answer.", (Demo({"q": "1"}, {"a": "3"}, "x"),)),
        Prompt("Answer.", (Demo({"q": "1"}, {"a": "2"}, "y"),)),
    ]
    assert len({prompts_id({"answer": prompt}) for prompt in variants}) == len(variants)


def test_an_example_without_id_is_named_by_its_content() -> None:
    example = Example.of({"b": 1, "a": "é"}, {"answer": "2"})
    assert example.id == Example.of({"a": "é", "b": 1}, {"answer": "2"}).id
    assert example.id != Example.of({"a": "e", "b": 1}, {"answer": "2"}).id
    assert Example.of({}, {}, id="row-7").id == "row-7"
