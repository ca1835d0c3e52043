"""Prompts and examples: plain dicts there and back, and ids that depend on content alone."""

from __future__ import annotations

import datetime
import hashlib
import json
import uuid
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
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


@pytest.mark.parametrize(
    "value",
    [
        datetime.date(2024, 7, 26),
        Decimal("1.50"),
        uuid.UUID(int=7),
        Path("rows") / "a.csv",
        MappingProxyType({"a": 1}),
        b"bytes",
        {1, 2.5},
        {"one"},
        set(),
        range(3),
    ],
)
def test_the_id_of_a_value_that_json_has_not_is_that_of_its_text(value: Any) -> None:
    text = json.dumps([{"q": value}, {"a": 1}], sort_keys=True, default=str)
    assert Example.of({"q": value}, {"a": 1}).id == hashlib.sha256(text.encode()).hexdigest()[:12]


def test_the_id_does_not_depend_on_the_order_of_a_set_or_on_an_address() -> None:
    names = [f"tag {n}" for n in range(20)]
    grown = {*names, *map(str, range(5000))}
    grown.difference_update(map(str, range(5000)))
    assert grown == set(names)
    assert list(grown) != list(set(names))
    ids = {
        Example.of({"tags": tags, "deep": [{"tags": {(1, "x"), frozenset(tags)}}]}, {}).id for tags in (grown, {*names})
    }
    assert len(ids) == 1
    assert Example.of({"tags": set(names[1:])}, {}).id != Example.of({"tags": grown}, {}).id
    kept = [object() for _ in range(2)]
    assert len({Example.of({"tool": one}, {}).id for one in kept}) == 1
    assert Example.of({"file": Path("at 0x1.txt")}, {}).id != Example.of({"file": Path("at 0x2.txt")}, {}).id
