"""cotune predict: answers new rows with an exported program, a line of JSON a row."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line is parsed before anything heavy is imported
    from cotune.programs import Example, Program, Rollout

_ROWS_AT_ONCE = 256


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        "cotune predict",
        description="Answers new rows with an exported program. Writes one JSON object a row, in the order of the "
        'rows: {"row": 1, ...the prediction..., "error": null}. A row that fails says why in "error". '
        "Start it in the folder where the run was started, so that your own program can be imported.",
    )
    made.add_argument("--export", required=True, metavar="FOLDER", help="what a run exported, e.g. runs/iris/export")
    made.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="jsonl, json, csv, tsv or parquet, or - for jsonl from standard input; only the program's inputs are read",
    )
    made.add_argument("--output", metavar="FILE", help="where the lines go; standard output without it")
    made.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="INPUT=COLUMN",
        help="the column that holds an input, where its name is another, e.g. --column question=Q",
    )
    made.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the base model")
    return made


def main(options: argparse.Namespace) -> int:
    """Runs the command. Returns 0, or 1 if every row failed.

    Raises:
        ExportError, DataError: the export cannot be loaded, or a row lacks an input.
    """
    rows = _rows(options.data)

    from cotune.tuned import load

    tuned = load(options.export, trust_remote_code=options.trust_remote_code)
    examples = _examples(rows, tuned.module.program, options)
    failures: list[str] = []
    with _opened(options.output) as file:
        for start in range(0, len(examples), _ROWS_AT_ONCE):
            done = tuned.rollouts(examples[start : start + _ROWS_AT_ONCE])
            for number, rollout in enumerate(done, start + 1):
                file.write(_line(number, rollout) + "\n")
            file.flush()
            failures += [rollout.error.kind for rollout in done if rollout.error is not None]
    print(_summary(len(examples), failures), file=sys.stderr)
    return int(len(failures) == len(examples))


def _rows(data: str) -> list[dict[str, Any]]:
    from cotune.datamodules.rows import DataError, jsonl_rows, read_rows

    if data != "-":
        rows = read_rows(data)
    else:
        try:
            rows = jsonl_rows(sys.stdin.buffer.read().decode("utf-8-sig"), _name(data))
        except UnicodeDecodeError as error:
            raise DataError(f"standard input is not UTF-8 (byte {error.start}).") from error
    if not rows:
        raise DataError(f"{_name(data)} holds no rows.")
    return rows


def _examples(rows: Sequence[dict[str, Any]], program: Program, options: argparse.Namespace) -> list[Example]:
    """The rows' inputs. An input that the program can do without is read if any row has it."""
    from cotune.datamodules.rows import examples_from_rows
    from cotune.tuned import program_inputs

    required, optional = program_inputs(program)
    columns = _columns(options.column, [*required, *optional])
    there = {column for row in rows for column in row}
    inputs = {name: columns[name] for name in (*required, *optional) if name in required or columns[name] in there}
    return examples_from_rows(rows, inputs=inputs, labels={}, where=_name(options.data))


def _columns(given: Sequence[str], inputs: Sequence[str]) -> dict[str, str]:
    """Input -> column, its own name where --column gives none."""
    from cotune.datamodules.rows import DataError

    columns = {name: name for name in inputs}
    for word in given:
        name, equals, column = word.partition("=")
        if name not in columns or not equals or not column:
            raise DataError(f"--column {word}: write INPUT=COLUMN; the program's inputs are {', '.join(inputs)}.")
        columns[name] = column
    return columns


def _line(number: int, rollout: Rollout) -> str:
    prediction = {} if rollout.error else dict(rollout.prediction or {})
    # A program's own field of these names keeps its value, under a name that is free.
    fields = {f"prediction.{name}" if name in ("row", "error") else name: value for name, value in prediction.items()}
    error = rollout.error.message if rollout.error else None
    return json.dumps({"row": number, **fields, "error": error}, ensure_ascii=False, default=str)


def _summary(rows: int, failures: Sequence[str]) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(failures).items())
    return f"{rows - len(failures)} of {rows} rows answered" + (f"; {len(failures)} failed ({kinds})" if kinds else "")


@contextmanager
def _opened(output: str | None) -> Iterator[IO[str]]:
    if output is None:
        yield sys.stdout
        return
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with open(output, "w", encoding="utf-8") as file:
        yield file


def _name(data: str) -> str:
    return "standard input" if data == "-" else data
