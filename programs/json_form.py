"""The form of one JSON object, held to a schema where the LM decodes in this process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from cotune.programs.form import Form, ParseError, encodable, short
from cotune.programs.layout import Field, Layout, Pattern, Schema, object_schema
from cotune.programs.lm import Completion
from cotune.programs.prompt import Prompt
from cotune.programs.signature import Signature
from cotune.programs.types import FieldTypeError, Line, choices_of, read_value, syntax_of


class Json(Form):
    """One JSON object that holds the outputs. Decoding in this process is held to its schema: that needs llguidance."""

    def ask(self, signature: Signature, prompt: Prompt) -> str:
        names = ", ".join(f'"{name}"' for name in signature.outputs)
        return "\n".join(
            [prompt.instruction, *self.about(signature), f"Reply with a JSON object with the keys {names}."]
        )

    def layout(self, signature: Signature) -> Layout:
        schema = object_schema({name: _json_schema(signature, name) for name in signature.outputs})
        return (Field("json", syntax=Schema(json.dumps(schema))),)

    def write(self, signature: Signature, outputs: Mapping[str, str]) -> str:
        given = {name: outputs[name].strip() for name in signature.outputs if name in outputs}
        return json.dumps(
            {name: _json_value(signature, name, text) for name, text in given.items()}, ensure_ascii=False
        )

    def read(self, signature: Signature, completion: Completion) -> dict[str, str]:
        return self.parse(signature, completion.text)  # JSON says itself where its values end

    def unwritable(self, signature: Signature, outputs: Mapping[str, str]) -> str:
        for name, text in outputs.items():
            if not text.strip():
                return f'"{name}" is empty'
            if signature.type_of(name) is Line and "\n" in text.strip():
                return f'"{name}" has more than one line: {short(text)}'
        return ""  # a JSON text holds any other

    def parse(self, signature: Signature, text: str) -> dict[str, str]:
        start = text.find("{")
        try:
            held, _ = json.JSONDecoder(strict=False).raw_decode(text[max(start, 0) :])
        except (ValueError, RecursionError) as error:
            raise ParseError(f"the completion holds no JSON object ({error}): {short(text)}") from None
        if not isinstance(held, dict):
            raise ParseError(f"the completion holds no JSON object: {short(text)}")
        found = {name: _text(signature.type_of(name), held[name]) for name in signature.outputs if name in held}
        for name in signature.outputs:
            if not found.get(name):
                raise ParseError(f'the completion has no "{name}": {short(text)}')
        return encodable(found)


def _json_schema(signature: Signature, name: str) -> Any:
    kind = signature.type_of(name)
    syntax = syntax_of(kind)
    choices = choices_of(kind)
    if choices is not None:
        return {"enum": list(choices)}
    if kind in (bool, int, float):
        return {"type": {bool: "boolean", int: "integer", float: "number"}[kind]}
    if isinstance(syntax, Pattern):
        return {"type": "string", "pattern": f"^(?:{syntax.regex})$"}
    return json.loads(syntax.json) if isinstance(syntax, Schema) else {"type": "string", "minLength": 1}


def _text(kind: Any, value: Any) -> str:
    """The text of a field that holds this value; "" where there is none."""
    is_json = isinstance(syntax_of(kind), Schema)
    written = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str):
        with suppress(FieldTypeError):  # some LMs write JSON as a string
            if is_json:
                read_value(kind, written)
                return written
        return value.strip()
    return "" if value is None and not is_json else written


def _json_value(signature: Signature, name: str, text: str) -> object:
    kind = signature.type_of(name)
    if kind in (bool, int, float):
        return signature.value(name, text)
    return json.loads(text) if isinstance(syntax_of(kind), Schema) else text
