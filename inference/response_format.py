"""Response formats: a layout as a JSON schema for endpoints that hold an LM to one, and the answer read back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from cotune.programs.layout import Choices, Field, Fixed, Layout, Number, Pattern, Schema, Syntax, object_schema
from cotune.programs.lm import Filled

_KEPT = (
    *("type", "enum", "const", "$ref", "title", "description", "required", "additionalProperties"),
    *("pattern", "format", "multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("minItems", "maxItems"),
)
"""What strict mode takes as it stands."""
_FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid")


def response_format(layout: Layout) -> dict[str, Any] | None:
    """What to ask an endpoint for, so that every field of the layout is in its answer; None where any text will do.

    One field of any text needs no format. Several become the properties of an object, in their order, so that the
    reasoning comes before what follows from it. Where strict mode has no schema of the same meaning, it is not asked
    for.
    """
    fields = _fields(layout)
    if len(fields) == 1 and fields[0].syntax is None:
        return None
    whole = _whole(layout)
    schema = _without_lengths(json.loads(whole.json) if whole else _object(fields))
    strict = _strict(schema)
    asked = {"name": "reply", "strict": strict is not None, "schema": schema if strict is None else strict}
    return {"type": "json_schema", "json_schema": asked}


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


def _object(fields: list[Field]) -> dict[str, Any]:
    """An object with a property for each field."""
    return object_schema({field.name: _schema(field.syntax) for field in fields})


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


def _strict(schema: Any) -> dict[str, Any] | None:
    """The schema as strict mode takes it: its objects are closed, and all their properties are required. None where
    that would mean something else, or strict mode does not know what it says."""
    if isinstance(schema, Mapping) and all(isinstance(one, str) for one in schema.get("enum", (0,))):
        schema = {"type": "string", **schema}
    if not isinstance(schema, Mapping) or not {"type", "anyOf", "$ref"} & set(schema):
        return None
    found: dict[str, Any] = {}
    for name, value in schema.items():
        if name in ("properties", "$defs"):
            found[name] = {key: _strict(inner) for key, inner in value.items()}
        elif name == "anyOf":
            found[name] = [_strict(inner) for inner in value]
        elif name == "items":
            found[name] = _strict(value)
        elif name in _KEPT:
            found[name] = value
        elif name != "default":  # a default says what is read where nothing is written, see `_closes`
            return None
    inner = [*found.get("properties", {}).values(), *found.get("$defs", {}).values(), *found.get("anyOf", ())]
    if None in inner or not _is_plain(found):
        return None
    if "object" in found.get("type", ()):
        if not _closes(schema):
            return None
        found |= {"required": list(found["properties"]), "additionalProperties": False}
    if "$ref" in found and len(found) > 1:  # nothing may stand beside a reference
        return {"anyOf": [{"$ref": found.pop("$ref")}], **found}
    return found


def _is_plain(schema: Mapping[str, Any]) -> bool:
    """Whether its array, format and pattern are of the kinds that strict mode knows."""
    listed = "array" not in schema.get("type", ()) or schema.get("items") is not None
    return (
        listed and schema.get("format", "date") in _FORMATS and not re.search(r"\(\?<?[=!]", schema.get("pattern", ""))
    )


def _closes(schema: Mapping[str, Any]) -> bool:
    """Whether the object means the same with all its properties required and no others: one that may be missing has to
    be null by default and to take null."""
    required, properties = schema.get("required", ()), schema.get("properties")
    if properties is None or schema.get("additionalProperties", False) is not False:
        return False
    return all(
        name in required or (one.get("default", "") is None and {"type": "null"} in one.get("anyOf", ()))
        for name, one in properties.items()
    )
