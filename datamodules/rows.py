"""Rows: rows of files and data sets become examples, or an error that names the row and the field."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from datetime import date
from decimal import Decimal
from typing import Any

from cotune.datamodules.files import DataError, json_object, refuse_bad_rows
from cotune.programs import Example
from cotune.programs.faults import quoted

Row = Mapping[str, Any]
Fields = Sequence[str] | Mapping[str, str]
"""Which columns become fields of the program: their names, or program field -> column."""

_ALLOWED = "allowed are text, a number, true or false, a date, or a list or mapping of these"


def examples_from_rows(
    rows: Sequence[Row], *, inputs: Fields, labels: Fields, id_field: str | None = None, where: str = "data.csv"
) -> list[Example]:
    """One example a row, in order.

    An input may be empty text; a label may not, since nothing could match it. It may be an empty list where the column
    holds lists in all rows, and not only empty ones. Row numbers in errors count from 1, without header and blank
    lines.

    Args:
        inputs: columns that the program reads. Their program names are the keyword arguments of `Program.run`.
        labels: columns that the metric compares the prediction with.
        id_field: column of unique ids; without it, ids are made from the contents.
        where: what errors call the data.

    Raises:
        DataError: a row lacks a field or holds a value that is not allowed. Says the first such row, and how many.

    >>> examples_from_rows([{"Q": "1+1?", "answer": "2"}], inputs={"question": "Q"}, labels=["answer"])[0].inputs
    {'question': '1+1?'}
    """
    columns_in, columns_out = columns_of(inputs, "inputs"), columns_of(labels, "labels")
    _check_columns(columns_in, columns_out)
    if not rows:
        raise DataError(f"{where} is empty: it holds no row.")
    examples, faults = [], []
    of_lists = _of_lists(rows, columns_out.values())
    for number, row in enumerate(rows, 1):
        try:
            examples.append(_example(row, columns_in, columns_out, id_field, of_lists))
        except DataError as fault:
            faults.append(f"row {number}: {fault}")
    refuse_bad_rows(faults, len(rows), where)
    return examples


def example_from_json(line: str, *, columns: Mapping[str, str], required: Sequence[str]) -> Example:
    """The example of one line of jsonl, without labels.

    Args:
        columns: input -> column; an input that is not required is read where the line has it.

    Raises:
        DataError: the line is no JSON object, or lacks a required field.
    """
    row = json_object(line)
    inputs = {name: column for name, column in columns.items() if name in required or column in row}
    return _example(row, inputs, {}, None)


# One row


def _example(
    row: Any,
    inputs: Mapping[str, str],
    labels: Mapping[str, str],
    id_field: str | None,
    of_lists: Collection[str] = (),
) -> Example:
    if not isinstance(row, Mapping):
        raise DataError(f"it is of type {type(row).__name__}; a row maps columns to values.")
    given = {field: _value(row, column) for field, column in inputs.items()}
    wanted = {field: _label(row, column, column in of_lists) for field, column in labels.items()}
    return Example.of(given, wanted, id="" if id_field is None else _id(row, id_field))


def _value(row: Row, column: str) -> Any:
    """The row's value of a column, if a program can be given it."""
    if column not in row:
        has = ", ".join(quoted(name, limit=60) for name in list(row)[:20] if isinstance(name, str))
        raise DataError(f"field {column!r} is missing; the row has {has or 'none'}.")
    try:
        return _checked(row[column])
    except DataError as fault:
        raise DataError(f"field {column!r} {fault}") from None


def _checked(value: Any) -> Any:
    """A value in the types that JSON has, numbers as numbers.

    Raises:
        DataError: it has no such form. Says what it is, without the name of its field.
    """
    if value is None or (isinstance(value, (float, Decimal)) and not math.isfinite(value)):
        message = "empty (null)" if value is None else str(value)
        raise DataError(f"is {message}; {_ALLOWED}. Fill it in, or remove the row.")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise DataError("is a whole number beyond 64 bits; write it as text.")
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    elif isinstance(value, date):
        return value.isoformat()
    elif isinstance(value, list):
        return [_checked(item) for item in value]
    elif isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {_checked(key): item if item is None else _checked(item) for key, item in value.items()}
    elif not isinstance(value, (int, float)):
        raise DataError(f"is of type {type(value).__name__}; {_ALLOWED}.")
    return value


def _of_lists(rows: Sequence[Row], columns: Collection[str]) -> set[str]:
    """The columns that hold lists in all rows that have a value there, and not only empty ones."""
    found = set()
    for column in columns:
        values = [row[column] for row in rows if isinstance(row, Mapping) and row.get(column) is not None]
        if all(isinstance(value, list) for value in values) and any(values):
            found.add(column)
    return found


def _label(row: Row, column: str, of_lists: bool) -> Any:
    value = _value(row, column)
    several = value if isinstance(value, list) else [value]
    if (not several and not of_lists) or any(isinstance(one, str) and not one.strip() for one in several):
        raise DataError(f"field {column!r} is empty; a label is what the metric compares with, so it needs a value.")
    return value


def _id(row: Row, column: str) -> str:
    value = _value(row, column)
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        kind = "empty text" if value == "" else f"of type {type(value).__name__}"
        raise DataError(f"field {column!r} is {kind}; an id is text (not empty) or a whole number.")
    return str(value)


def _check_text(value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"has half a surrogate pair ({value[error.start]!a}) at character {error.start}: "
            "no text in UTF-8 holds one. Export the data again from its source."
        ) from None


# Which columns


def columns_of(fields: Fields, argument: str) -> dict[str, str]:
    """Program field -> column. `argument` is what an error calls the fields."""
    if isinstance(fields, str):
        raise DataError(f'{argument} is the text "{fields}"; give a list, ["{fields}"].')
    if isinstance(fields, Mapping):
        return dict(fields)
    twice = [name for name in fields if list(fields).count(name) > 1]
    if twice:
        raise DataError(f'{argument} names "{twice[0]}" twice.')
    return {name: name for name in fields}


def _check_columns(inputs: Mapping[str, str], labels: Mapping[str, str]) -> None:
    if not inputs:
        raise DataError("inputs is empty; name at least one column that the program reads.")
    for field, column in inputs.items():
        if not field.isidentifier():
            raise DataError(
                f'the input "{field}" cannot be an argument of Program.run; '
                f'rename it with a mapping, e.g. {{"question": "{column}"}}.'
            )
        if column in labels.values():
            raise DataError(f'column "{column}" is an input and a label: the program would see its answer. Remove one.')
