"""Response formats: a layout as a JSON schema for endpoints that hold an LM to one, and the answer read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cotune.programs.layout import Choices, Field, Fixed, Layout, Number, Pattern, Schema, Syntax
from cotune.programs.lm import Filled


def response_format(layout: Layout) -> dict[str, Any] | None:
    """What to ask an endpoint for, so that every field of the layout is in its answer; None where any text will do, or
    where the fields' schemas do not fit into one.

    One field of any text needs no format. Several become the properties of an object, in their order, so that the
    reasoning comes before what follows from it.
    """
    fields = _fields(layout)
    if len(fields) == 1 and fields[0].syntax is None:
        return None
    whole = _whole(layout)
    found = json.loads(whole.json) if whole else _object(fields)
    if found is None:
        return None
    schema = _without_lengths(found)
    return {"type": "json_schema", "json_schema": {"name": "reply", "strict": True, "schema": schema}}


def read_reply(layout: Layout, content: str) -> tuple[str, tuple[Filled, ...]] | None:
    """The completion's text, as the layout writes it, and its fields, from an answer in the response format; None if it
    is not in that format, as where an endpoint took no notice of it.

    >>> layout = (Field("reasoning"), Fixed("\\nanswer:"), Field("answer", lead=" ", syntax=Number(integer=True)))
    >>> read_reply(layout, '{"reasoning": "2 and 2", "answer": 4}')[0]
    '2 and 2\\nanswer: 4'
    """
    try:
        held = json.loads(content)
    except ValueError:
        return None
    if _whole(layout) and isinstance(held, dict):
        held = {_fields(layout)[0].name: held}
    if not isinstance(held, dict) or any(field.name not in held for field in _fields(layout)):
        return None
    parts, fields = [], []
    for part in layout:
        if isinstance(part, Fixed):
            parts.append(part.text)
            continue
        value = held[part.name]
        text = part.lead + (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        parts.append(text)
        fields.append(Filled(part.name, text, 0, 0, "complete"))
    return "".join(parts), tuple(fields)


def _fields(layout: Layout) -> list[Field]:
    return [part for part in layout if isinstance(part, Field)]


def _whole(layout: Layout) -> Schema | None:
    """The schema of a completion that is one JSON object and nothing else."""
    (field,) = fields if len(fields := _fields(layout)) == 1 else (None,)
    syntax = field.syntax if field and len(layout) == 1 else None
    return syntax if isinstance(syntax, Schema) and json.loads(syntax.json).get("type") == "object" else None


def _object(fields: list[Field]) -> dict[str, Any] | None:
    """An object with a property for each field; None where two fields' definitions share a name."""
    properties, definitions = {}, dict[str, Any]()
    for field in fields:
        schema = _schema(field.syntax)
        for name, definition in schema.pop("$defs", {}).items():  # references are to the root
            if definitions.setdefault(name, definition) != definition:
                return None
        properties[field.name] = schema
    found = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {**found, "$defs": definitions} if definitions else found


def _schema(syntax: Syntax | None) -> dict[str, Any]:
    if isinstance(syntax, Choices):
        return {"type": "string", "enum": list(syntax.texts)}
    if isinstance(syntax, Number):
        return {"type": "integer" if syntax.integer else "number"}
    if isinstance(syntax, Pattern):
        return {"type": "string", "pattern": f"^(?:{syntax.regex})$"}
    return dict(json.loads(syntax.json)) if isinstance(syntax, Schema) else {"type": "string"}


def _without_lengths(schema: Any) -> Any:
    """The schema without `minLength` numbers, which strict endpoints do not take."""
    if isinstance(schema, Mapping):
        return {
            name: _without_lengths(value)
            for name, value in schema.items()
            if not (name == "minLength" and isinstance(value, int))
        }
    return [_without_lengths(value) for value in schema] if isinstance(schema, list) else schema
