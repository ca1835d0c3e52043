"""Signatures: what a stage takes and gives, as named and typed fields, and the instruction that says how."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from cotune.errors import BadValueError
from cotune.programs.layout import Choices, Number, Pattern
from cotune.programs.types import (
    FieldTypeError,
    Reasoning,
    as_text,
    check_type,
    parse_type,
    read_value,
    syntax_of,
    type_name,
    write_value,
)

_SHORT_FORM = (
    'A signature is written "inputs -> outputs" with names separated by commas and a type after a colon where a field '
    "is not text, e.g. \"context, question -> answer\" or \"query -> intent: Literal['refund', 'other']\"."
)


@dataclass(frozen=True)
class Signature:
    """The contract of one stage: input fields, output fields and an instruction.

    Attributes:
        inputs: names of the fields that the stage reads, in the order they are shown to the LM.
        outputs: names of the fields that the LM must produce, in order.
        instruction: the task in words. A prompt search may replace it; this is where it starts.
        descriptions: a sentence for any field whose name does not say enough.
        types: the Python type of any field that is not text: int, float, bool, date, Literal, Enum, list, dict, a
            dataclass or a pydantic model, `Line` for text of one line. A list of values stands for a Literal.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    instruction: str = ""
    descriptions: Mapping[str, str] = field(default_factory=dict)
    types: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = (*self.inputs, *self.outputs)
        for name in names:
            if not name.isidentifier():
                raise BadValueError(f'signature field "{name}" is not a Python name. {_SHORT_FORM}')
            if names.count(name) > 1:
                raise BadValueError(f'signature field "{name}" occurs more than once; every field needs its own name.')
        if not self.outputs:
            raise BadValueError(f"a signature needs at least one output field. {_SHORT_FORM}")
        for what, given in (("description", self.descriptions), ("type", self.types)):
            unknown = sorted(set(given) - set(names))
            if unknown:
                raise BadValueError(
                    f'{what} of "{unknown[0]}", which is not a field; the fields are {", ".join(names)}.'
                )
        object.__setattr__(self, "types", {name: _checked(name, kind) for name, kind in self.types.items()})

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        instruction: str = "",
        descriptions: Mapping[str, str] | None = None,
        types: Mapping[str, Any] | None = None,
    ) -> Signature:
        """Reads a signature from its short form; `types` adds to the types that stand in it.

        >>> Signature.parse("context, question -> answer: float").outputs
        ('answer',)

        Raises:
            ValueError: the text has not exactly one arrow, a name is not an identifier or stands twice, or a type is
                not known.
        """
        sides = _parts(text, "->")
        if len(sides) != 2:
            raise BadValueError(f'signature "{text}" has {len(sides) - 1} arrows. {_SHORT_FORM}')
        inputs, outputs = (_fields(side) for side in sides)
        found = {name: kind for name, kind in (*inputs, *outputs) if kind}
        names = tuple(name for name, _ in inputs), tuple(name for name, _ in outputs)
        return cls(
            *names, instruction or _default_instruction(*names), dict(descriptions or {}), {**found, **(types or {})}
        )

    @classmethod
    def of(cls, described: type) -> Signature:
        """The signature that a class body describes: its docstring is the instruction, its annotations the types.

        A field that is assigned `Out()` is an output, every other one an input; the text in `In(...)` and `Out(...)`
        describes it.

        >>> class Sort:
        ...     "Can the ticket wait?"
        ...     ticket: str
        ...     urgent: bool = Out("whether it cannot wait")
        >>> Signature.of(Sort).outputs, Signature.of(Sort).instruction
        (('urgent',), 'Can the ticket wait?')
        """
        hints = typing.get_type_hints(described)
        marks = {name: getattr(described, name, In()) for name in hints}
        outputs = tuple(name for name, mark in marks.items() if isinstance(mark, Out))
        inputs = tuple(name for name in hints if name not in outputs)
        wrong = [name for name, mark in marks.items() if not isinstance(mark, (In, Out))]
        if wrong:
            raise BadValueError(
                f'field "{wrong[0]}" of {described.__name__} is assigned {marks[wrong[0]]!r}; assign '
                'In("what it is"), Out("what it is") or nothing.'
            )
        return cls(
            inputs,
            outputs,
            inspect.cleandoc(described.__doc__ or "") or _default_instruction(inputs, outputs),
            {name: mark.description for name, mark in marks.items() if mark.description},
            {name: kind for name, kind in hints.items() if kind is not str},
        )

    @property
    def reasoning(self) -> str:
        """The first output's name if it is reasoning: of that type, or of that name and without another; else ""."""
        first = self.outputs[0]
        kind = self.types.get(first, Reasoning if first == "reasoning" else str)
        return first if kind is Reasoning and len(self.outputs) > 1 else ""

    def type_of(self, name: str) -> Any:
        return self.types.get(name, str)

    def value(self, name: str, text: str) -> Any:
        """The typed value of a field's text.

        Raises:
            FieldTypeError: the text is no value of the field's type, or empty.
        """
        if not text.strip():
            raise FieldTypeError(f'"{name}" is empty.')
        try:
            return read_value(self.type_of(name), text)
        except FieldTypeError as error:
            raise FieldTypeError(f'"{name}": {error}') from None

    def text(self, name: str, value: Any) -> str:
        """How a value of a typed field is written; see `write_value`."""
        try:
            return write_value(self.type_of(name), value)
        except FieldTypeError as error:
            raise FieldTypeError(f'"{name}": {error}') from None

    def shown(self, name: str, value: Any) -> str:
        """How an input is shown to the LM: a number, choice or date of a typed field as its type writes it, anything
        else, and what is a text already, by `as_text`.

        Raises:
            TypeError: the value is None or has no JSON form.
        """
        if not isinstance(value, str) and isinstance(syntax_of(self.type_of(name)), (Choices, Number, Pattern)):
            with suppress(FieldTypeError):
                return self.text(name, value)
        return as_text(value)

    def __str__(self) -> str:
        return " -> ".join(", ".join(map(self._shown, names)) for names in (self.inputs, self.outputs))

    def _shown(self, name: str) -> str:
        return f"{name}: {type_name(self.types[name])}" if name in self.types else name


@dataclass(frozen=True)
class In:
    """Marks an input field of a class body; see `Signature.of`."""

    description: str = ""


@dataclass(frozen=True)
class Out:
    """Marks an output field of a class body; see `Signature.of`."""

    description: str = ""


def _checked(name: str, kind: Any) -> Any:
    try:
        found = parse_type(kind)
        check_type(found)
    except FieldTypeError as error:
        raise FieldTypeError(f'signature field "{name}": {error}') from None
    return found


def _fields(side: str) -> list[tuple[str, str]]:
    """(name, type as text or "") of each field of one side."""
    found = []
    for part in _parts(side, ","):
        name, _, kind = part.partition(":")
        if part.strip():
            found.append((name.strip(), kind.strip()))
    return found


def _parts(text: str, mark: str) -> list[str]:
    """The text split at a mark wherever it stands outside quotes and brackets.

    >>> _parts("a: Literal['x, y', 'z'], b", ",")
    ["a: Literal['x, y', 'z']", ' b']
    """
    parts, start, depth, quote, place = [], 0, 0, "", 0
    while place < len(text):
        char = text[place]
        if quote:
            place += char == "\\"
            quote = "" if char == quote else quote
        elif char in "'\"" and depth:
            quote = char
        elif char in "[(":
            depth += 1
        elif char in "])":
            depth -= 1
        elif not depth and text.startswith(mark, place):
            parts.append(text[start:place])
            start = place + len(mark)
            place = start - 1
        place += 1
    return [*parts, text[start:]]


def _default_instruction(inputs: Sequence[str], outputs: Sequence[str]) -> str:
    return f"Given {', '.join(inputs)}, produce {', '.join(outputs)}." if inputs else f"Produce {', '.join(outputs)}."
