"""Types of fields: what Python value a field's text stands for, and what the LM may write there."""

from __future__ import annotations

import ast
import dataclasses
import datetime
import enum
import importlib
import json
import math
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any, Literal

from cotune.errors import CotuneError
from cotune.programs.layout import Choices, Number, Pattern, Schema, Syntax


class Line(str):
    """Text of one line: the type of an answer that ends where its line does."""

    __slots__ = ()


class Reasoning(str):
    """Text that leads to the outputs after it, written freely. A first output named "reasoning" is of this type."""

    __slots__ = ()


class FieldTypeError(CotuneError, ValueError):
    """A field has a type that cotune does not know, or a text is no value of a field's type."""


_TEXTS = (str, Line, Reasoning)
_NAMES: dict[str, Any] = {
    "line": Line,
    "date": datetime.date,
    **{kind.__name__: kind for kind in (*_TEXTS, int, float, bool, list, dict, tuple)},
}
_KNOWN = (
    "str, line, int, float, bool, date, Literal['a', 'b'], list[...], dict[str, ...] and the dotted path of an Enum, a "
    "dataclass or a pydantic model"
)
_YES_NO = {"yes": True, "true": True, "no": False, "false": False}
_YEAR = "([1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_FOURTH = "(0[48]|[2468][048]|[13579][26])"
_DAYS = (
    "(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])",
    "(0[469]|11)-(0[1-9]|[12][0-9]|30)",
    "02-(0[1-9]|1[0-9]|2[0-8])",
)
_DATE = f"({_YEAR}-({'|'.join(_DAYS)})|([0-9]{{2}}{_FOURTH}|{_FOURTH}00)-02-29)"
"""The days of the calendar, and nothing else: a day that there is not would be no value."""


def parse_type(text: str | Sequence[Any] | type) -> Any:
    """The type that a text names, as signatures and YAML write it; a list of values stands for a `Literal` of them.

    Nothing is evaluated: names are looked up, and a dotted path is imported.

    >>> parse_type("Literal['yes', 'no']"), parse_type("list[int]"), parse_type(["a", "b"])
    (typing.Literal['yes', 'no'], list[int], typing.Literal['a', 'b'])

    Raises:
        FieldTypeError: the text names no type that a field may have.
    """
    if isinstance(text, (list, tuple)):
        if any(isinstance(one, bool) for one in text):
            raise FieldTypeError(
                f"the choices {[*text]} are no texts or numbers; quote 'yes' and 'no', which YAML reads as a bool."
            )
        found: Any = Literal[tuple(text)]
    elif isinstance(text, str):
        try:
            found = _type_of(ast.parse(text.strip(), mode="eval").body, text)
        except SyntaxError:
            raise FieldTypeError(f'field type "{text}" is no type; there are {_KNOWN}.') from None
    else:
        found = text
    check_type(found)
    return found


def check_type(kind: Any) -> None:
    """Refuses what no field can have.

    Raises:
        FieldTypeError: cotune and pydantic know no such type, or a choice is empty or there twice.
    """
    if (choices := choices_of(kind)) is not None:
        if not choices:
            raise FieldTypeError(f"field type {type_name(kind)} has no choice; give at least one.")
        for text in choices:
            if not text.strip() or text != text.strip() or "\n" in text:
                raise FieldTypeError(
                    f"choice {text!r} of a field is empty, has white space at an end or has more than one line; write "
                    "one line without them."
                )
    elif kind not in _TEXTS and kind not in (int, float, bool, datetime.date):
        _adapter(kind)


def choices_of(kind: Any) -> dict[str, Any] | None:
    """What each choice of a Literal or Enum is written as -> its value; None for other types.

    >>> choices_of(Literal["yes", "no"]), choices_of(Literal[1, 2])
    ({'yes': 'yes', 'no': 'no'}, {'1': 1, '2': 2})

    Raises:
        FieldTypeError: two choices are written alike.
    """
    if typing.get_origin(kind) is Literal:
        pairs = [(str(value), value) for value in typing.get_args(kind)]
    elif _is_class(kind) and issubclass(kind, enum.Enum):
        pairs = [(plain(value), value) for value in kind]
    else:
        return None
    found = dict(pairs)
    if len(found) < len(pairs):
        raise FieldTypeError(f"two choices of {type_name(kind)} have the same text; give each its own.")
    return found


def _is_class(kind: Any) -> bool:
    """Whether it is a class; list[int] is none, which Python 3.10 takes for one."""
    return typing.get_origin(kind) is None and isinstance(kind, type)


def is_choice(kind: Any) -> bool:
    """Whether a value of this type is one of a closed set, a yes or no included.

    >>> is_choice(Literal["yes", "no"]), is_choice(bool), is_choice(str)
    (True, True, False)
    """
    return isinstance(syntax_of(kind), Choices)


def syntax_of(kind: Any) -> Syntax | None:
    """What may be written in a field of this type; None for any text."""
    if (choices := choices_of(kind)) is not None:
        return Choices(tuple(choices))
    if kind is bool:
        return Choices(("yes", "no"))
    if kind in (int, float):
        return Number(integer=kind is int)
    if kind is datetime.date:
        return Pattern(_DATE)
    if kind in _TEXTS:
        return None
    return _schema(kind)


def read_value(kind: Any, text: str) -> Any:
    """The value of a field's text; surrounding white space does not count.

    Readers are lenient where the meaning is clear: letter case of a choice, thousands' commas and a currency sign of a
    number, a full stop at the end; $7 is 7, and 50% is 50. Of a `Line`, only the first line counts.

    >>> read_value(float, " $1,200.50 "), read_value(bool, "Yes."), read_value(Literal["a", "b"], "B")
    (1200.5, True, 'b')

    Raises:
        FieldTypeError: the text is no value of this type.
    """
    text = text.strip()
    choices = choices_of(kind)
    if choices is not None:
        return _choice(choices, text)
    if kind is bool:
        return _choice(_YES_NO, text)
    if kind in (int, float):
        return _number(kind, text)
    if kind is datetime.date:
        try:
            return datetime.date.fromisoformat(text)
        except ValueError:
            raise FieldTypeError(f'"{_short(text)}" is no date; one is written 2024-07-26.') from None
    if kind in _TEXTS:
        return text.split("\n")[0].rstrip() if kind is Line else text
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise FieldTypeError(f'"{_short(text)}" is no {type_name(kind)}: {where}: {first["msg"]}.') from None


def write_value(kind: Any, value: Any) -> str:
    """How a value stands in a field of this type: `read_value` reads it back.

    >>> write_value(float, 7.0), write_value(bool, True), write_value(list[int], [1, 2])
    ('7', 'yes', '[1,2]')

    Raises:
        FieldTypeError: the value is none of this type.
    """
    if kind in _TEXTS:
        if not isinstance(value, str):
            raise FieldTypeError(f"{value!r} is no text; a field without a type holds text.")
        return str(value)
    if isinstance(value, str) and not isinstance(value, enum.Enum):
        value = read_value(kind, value)  # data files hold texts
    if (choices := choices_of(kind)) is not None:
        given = int(value) if isinstance(value, float) and value.is_integer() else value
        for text, choice in choices.items():
            if text == str(plain(given)) or (choice == given and isinstance(choice, bool) == isinstance(given, bool)):
                return text
        raise FieldTypeError(f"{value!r} is none of {_listed(choices)}.")
    if kind is bool and isinstance(value, bool):
        return "yes" if value else "no"
    if kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return _number_text(value if kind is float else _whole(value))
    if kind is datetime.date and isinstance(value, datetime.date):
        return value.isoformat()[:10]
    if kind in (bool, int, float, datetime.date):
        raise FieldTypeError(f"{value!r} is no {type_name(kind)}.")
    from pydantic import ValidationError

    try:
        return str(_adapter(kind).dump_json(_adapter(kind).validate_python(value)).decode())
    except ValidationError as error:
        raise FieldTypeError(f"{value!r} is no {type_name(kind)}: {error.errors()[0]['msg']}.") from None


def as_text(value: Any) -> str:
    """How a value is shown to the LM: text as it is, a list as numbered lines, anything else as JSON.

    >>> print(as_text(["Paris is in France.", "Rome is in Italy."]))
    [1] Paris is in France.
    [2] Rome is in Italy.
    >>> as_text(5.1), as_text([])
    ('5.1', '(none)')

    Raises:
        TypeError: the value is None or has no JSON form.
    """
    if isinstance(value, str) and not isinstance(value, enum.Enum):
        return str(value)
    if value is None:
        raise TypeError("None cannot be shown to an LM; leave the field out or pass text.")
    if isinstance(value, (list, tuple)):
        return "\n".join(f"[{i}] {as_text(item)}" for i, item in enumerate(value, 1)) or "(none)"
    if isinstance(value, (enum.Enum, datetime.date)) or dataclasses.is_dataclass(value) or hasattr(value, "model_dump"):
        value = plain(value)
        if isinstance(value, str):
            return value
    return json.dumps(value, ensure_ascii=False)


def plain(value: Any) -> Any:
    """The value in types that JSON has: what files and logs hold. A choice of an Enum is its text.

    >>> plain({"on": datetime.date(2024, 7, 26), "names": ("a", "b")})
    {'on': '2024-07-26', 'names': ['a', 'b']}
    """
    from pydantic_core import to_jsonable_python

    if isinstance(value, enum.Enum):
        return value.value if isinstance(value.value, str) else value.name
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return to_jsonable_python(value, fallback=str)


def _number_text(value: float) -> str:
    """A number as people write it: no exponent, no fraction that is zero.

    >>> _number_text(7.0), _number_text(-0.5), _number_text(1e21), _number_text(1e-7)
    ('7', '-0.5', '1000000000000000000000', '0.0000001')

    Raises:
        FieldTypeError: it is infinite, larger than a float can be or not a number.
    """
    if not abs(value) <= sys.float_info.max:
        raise FieldTypeError(f"{value} cannot be written as a number in digits.")
    if value == int(value):
        return str(int(value))
    return format(Decimal(repr(value)), "f")


def type_name(kind: Any) -> str:
    """The type as a signature writes it: `parse_type` reads it back.

    >>> type_name(Literal["a b", "c"]), type_name(float), type_name(list[int])
    ("Literal['a b', 'c']", 'float', 'list[int]')
    """
    if typing.get_origin(kind) is Literal:
        return f"Literal[{', '.join(map(repr, typing.get_args(kind)))}]"
    for name, known in _NAMES.items():
        if known is kind:
            return name
    if arguments := typing.get_args(kind):
        return f"{typing.get_origin(kind).__name__}[{', '.join(map(type_name, arguments))}]"
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)


def _type_of(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.Attribute):
        return _imported(ast.unparse(node))
    if isinstance(node, ast.Subscript):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        name = ast.unparse(node.value)
        if name in ("Literal", "typing.Literal"):
            try:
                return Literal[tuple(ast.literal_eval(item) for item in inner)]
            except ValueError:
                raise FieldTypeError(f'field type "{text}": a Literal holds texts in quotes or numbers.') from None
        if name in ("list", "dict", "tuple"):
            return types.GenericAlias(_NAMES[name], tuple(_type_of(item, text) for item in inner))
    raise FieldTypeError(f'field type "{text}" is not known; there are {_KNOWN}.')


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise FieldTypeError(f'field type "{path}" cannot be imported ({error}); write it as module.Class.') from None


@lru_cache(maxsize=256)
def _adapter(kind: Any) -> Any:
    """pydantic's reader, writer and schema of a structured type."""
    from pydantic import PydanticSchemaGenerationError, TypeAdapter, errors

    known = kind in (list, dict, tuple) or dataclasses.is_dataclass(kind) or hasattr(kind, "model_json_schema")
    if _is_class(kind) and not known:
        raise FieldTypeError(f"field type {type_name(kind)} is not known; there are {_KNOWN}.")
    try:
        made = TypeAdapter(kind)
        made.json_schema()
    except (PydanticSchemaGenerationError, errors.PydanticUserError) as error:
        raise FieldTypeError(
            f"field type {type_name(kind)} has no JSON form ({str(error).splitlines()[0]}); there are {_KNOWN}."
        ) from None
    return made


@lru_cache(maxsize=256)
def _schema(kind: Any) -> Schema:
    return Schema(json.dumps(_adapter(kind).json_schema()))


def _choice(choices: Mapping[str, Any], text: str) -> Any:
    if text in choices:
        return choices[text]
    bare = text.rstrip(".").strip().casefold()
    found = [value for choice, value in choices.items() if choice.casefold() == bare]
    if len(found) == 1:
        return found[0]
    raise FieldTypeError(f'"{_short(text)}" is none of {_listed(choices)}.')


# JSON writes small ones with an exponent. Commas part thousands, or lakhs: 3,14 is no number, and above all not 314.
_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{2,3})*,\d{3}|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,2})?")


def _number(kind: Any, text: str) -> Any:
    bare = text.replace("\N{MINUS SIGN}", "-").removesuffix(".").strip().lstrip("$€£¥ ").removesuffix("%").strip()
    if not _NUMBER.fullmatch(bare):
        raise FieldTypeError(f'"{_short(text)}" is no number.')
    number = Decimal(bare.replace(",", ""))
    if math.isinf(float(number)):
        raise FieldTypeError(f'"{_short(text)}" is too large a number; it has to be below 1.8e308.')
    if kind is float:
        return float(number)
    if number != number.to_integral_value():
        raise FieldTypeError(f"{_short(str(number))} is no whole number.")
    return int(number)


def _whole(value: float) -> int:
    if value % 1:
        raise FieldTypeError(f"{value} is no whole number.")
    return int(value)


def _listed(choices: Mapping[str, Any], limit: int = 12) -> str:
    texts = list(choices)
    return ", ".join(texts[:limit]) + (f" and {len(texts) - limit} more" if len(texts) > limit else "")


def _short(text: str, limit: int = 60) -> str:
    shown = text.replace("\n", "\\n")
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
