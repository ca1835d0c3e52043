"""Layouts: what a completion is made of, fixed texts and fields by turns. Plain data, which every engine can read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Union

from cotune.errors import BadValueError


@dataclass(frozen=True)
class Choices:
    """A field that holds one of these texts. They differ from each other and none is empty.

    Attributes:
        texts: what may stand there.
        offsets: for each, nats that are added to its log-probability before one is chosen; none adds nothing.
    """

    texts: tuple[str, ...]
    offsets: tuple[float, ...] = ()


@dataclass(frozen=True)
class Number:
    """A field that holds a number in decimal digits: an optional minus sign, digits (thousands' commas may stand among
    them) and, unless `integer`, an optional fraction."""

    integer: bool = False


@dataclass(frozen=True)
class Pattern:
    """A field whose whole text matches a regular expression (Rust's syntax, as `llguidance` reads it; `\\d` is 0-9)."""

    regex: str


@dataclass(frozen=True)
class Schema:
    """A field that holds JSON of this JSON schema, which is text so that it can be hashed; keys come in its order."""

    json: str


def _referring(schema: Any, names: Mapping[str, str]) -> Any:
    """The schema with its references under other names."""
    if isinstance(schema, Mapping):
        return {k: names.get(v, v) if k == "$ref" else _referring(v, names) for k, v in schema.items()}
    return [_referring(one, names) for one in schema] if isinstance(schema, list) else schema


def object_schema(properties: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON schema of an object with all these properties and no others.

    Their definitions move to its root, where references look for them; one of another's name gets its property's before
    its own.

    >>> found = object_schema({"a": {"$ref": "#/$defs/P", "$defs": {"P": {"type": "string"}}}})
    >>> found["properties"], found["$defs"]
    ({'a': {'$ref': '#/$defs/P'}}, {'P': {'type': 'string'}})
    """
    found: dict[str, Any] = {"type": "object", "properties": {}, "required": [*properties]}
    definitions: dict[str, Any] = {}
    for name, schema in properties.items():
        own: dict[str, Any] = schema.get("$defs", {})
        taken = [key for key in own if definitions.get(key, own[key]) != own[key]]
        names = {f"#/$defs/{key}": f"#/$defs/{name}.{key}" for key in taken}
        definitions |= {f"{name}.{key}" if key in taken else key: _referring(one, names) for key, one in own.items()}
        rest = {key: value for key, value in schema.items() if key != "$defs"}
        found["properties"][name] = _referring(rest, names)
    found["additionalProperties"] = False
    return {**found, "$defs": definitions} if definitions else found


Syntax = Union[Choices, Number, Pattern, Schema]  # noqa: UP007 (an alias that isinstance and docs can show on 3.10)
"""What may stand in a field. Engines that decode in this process let the LM write nothing else."""


@dataclass(frozen=True)
class Fixed:
    """Text that every completion of the form has in this place. It is not empty and ends with no white space.

    An engine that can puts it there itself; one that cannot has to find it in what the LM wrote.
    """

    text: str

    def __post_init__(self) -> None:
        if not self.text:
            raise BadValueError("a fixed text of a layout is empty; leave it out.")
        if space := self.text[len(self.text.rstrip()) :]:
            raise BadValueError(
                f"the fixed text {self.text!r} of a layout ends with white space; put that into the lead of the field "
                f"that follows: Field(name, lead={space!r})."
            )


@dataclass(frozen=True)
class Field:
    """A place for the LM to write in.

    Attributes:
        name: the output field that it holds.
        lead: what stands between the fixed text before it and its value: a space or a line break, or nothing. With a
            `syntax` the LM writes it, because it must; it is no part of the value. A field that comes first has none.
        stops: texts that end the field; what follows from there on is no part of it. The end of the turn ends it too.
        max_tokens: the field's own limit in tokens; None for what is left of `Sampling.max_new_tokens`.
        syntax: what may stand here; None for any text.
        may_be_empty: the LM may end its turn, or write one of the stops, before anything else. Without it an engine
            that can lets it do neither until something is written.
    """

    name: str
    lead: str = ""
    stops: tuple[str, ...] = ()
    max_tokens: int | None = None
    syntax: Syntax | None = None
    may_be_empty: bool = False


Layout = tuple[Union[Fixed, Field], ...]  # noqa: UP007
"""Fixed texts and fields by turns: no two fixed texts and no two fields stand side by side; it has a field at least."""

FREE: Layout = (Field("text", may_be_empty=True),)
"""One field of any text: a completion without a form."""
