"""cotune predict: answers new rows with an exported program, a line of JSON a row."""

from __future__ import annotations

import argparse
import json
import queue
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line is parsed before anything heavy is imported
    from cotune.commands.predict_output import Lines
    from cotune.inference.calls import StoredLM
    from cotune.programs import Example, Rollout
    from cotune.tuned import Tuned

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Row:
    """A row that was read: an example, or why it is none. `number` counts from 1, without header and blank lines."""

    number: int
    example: Example | None
    fault: str = ""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        "cotune predict",
        allow_abbrev=False,
        description="Answers new rows with a tuned program. Writes one JSON object per row, in the order of the rows: "
        '{"row": 1, ...the prediction..., "error": null}. A row that fails says why in "error". Start it in the folder '
        "where the run was started, so that your own program can be imported.",
        epilog="Exit codes: 0 when rows were answered, 1 when none was (with --strict: when one was not), 2 for an "
        "error that the message explains. The whole file is checked before the first row is answered. Standard input "
        "is answered line by line; a line that cannot be read is reported and skipped. If it stops, the answers so "
        "far are in OUTPUT.partial, and OUTPUT is as it was; where an endpoint answered, the same command asks only "
        "for the rest.",
    )
    made.add_argument("--export", required=True, metavar="FOLDER", help="a run or what it exported, e.g. runs/iris")
    made.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="jsonl, json, csv, tsv or parquet, or - for jsonl from standard input; only the program's inputs are read",
    )
    made.add_argument("--output", metavar="FILE", help="where to write, at the end (default: standard output)")
    made.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="INPUT=COLUMN",
        help="the column of an input, if it has another name, e.g. --column question=Q",
    )
    made.add_argument("--strict", action="store_true", help="exit with 1 if any row could not be answered")
    made.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the base model")
    return made


def main(options: argparse.Namespace) -> int:
    """Runs the command. Returns the exit code, as the epilog of `parser` says.

    Raises:
        ExportError, DataError: the export cannot be loaded, or a file's row lacks an input.
        OutputError: --output cannot be written, or is the file of the rows.
        StoppedError: the LM cannot be asked any more.
    """
    from cotune.commands.predict_output import Lines, check_output

    options.output = None if options.output == "-" else options.output
    if options.output is not None:
        check_output(options.output, options.data)
    out = Lines(options.output)
    with redirect_stdout(sys.stderr):  # a notice, or what a program prints, is no line of JSON
        return _answer(options, out)


def _answer(options: argparse.Namespace, out: Lines) -> int:
    from cotune.commands.predict_output import answers_kept
    from cotune.datamodules.files import DataError
    from cotune.tuned import load, program_inputs

    file = None if options.data == "-" else _file_rows(options.data)
    tuned = load(options.export, trust_remote_code=options.trust_remote_code)
    required, optional = program_inputs(tuned.module.program)
    columns = _columns(options.column, [*required, *optional])
    if file is None:
        batches = stream_rows(sys.stdin.buffer, required, columns)
    else:
        batches = _cut(_from_file(file, required, columns, options.data))
    done = Counter[str]()
    with answers_kept(tuned, out) as stored, out:
        for batch in batches:
            for row in batch:
                if row.fault:
                    print(f"standard input, row {row.number}: {row.fault}", file=sys.stderr)
            for kind, line in _answers(tuned, batch, stored):
                done[kind] += 1
                out.write(line)
            out.flush()
    if not done:
        raise DataError("standard input holds no rows.")
    print(_summary(done), file=sys.stderr)
    return int(done[""] < (done.total() if options.strict else 1))


def stream_rows(stream: IO[bytes], required: Sequence[str], columns: Mapping[str, str]) -> Iterator[list[Row]]:
    """Batches of what is there: it waits for a first line only, so that whoever writes line by line is answered so."""
    waiting: queue.Queue[bytes | None] = queue.Queue(maxsize=4 * _ROWS_AT_ONCE)

    def read() -> None:
        for line in stream:
            if line.strip():
                waiting.put(line)
        waiting.put(None)

    threading.Thread(target=read, daemon=True).start()
    number, ended = 0, False
    while not ended:
        lines = [waiting.get()]
        while lines[-1] is not None and len(lines) < _ROWS_AT_ONCE and not waiting.empty():
            lines.append(waiting.get())
        ended = lines[-1] is None
        batch = [_from_line(n, line, required, columns) for n, line in enumerate(lines, number + 1) if line is not None]
        number += len(batch)
        if batch:
            yield batch


def _from_line(number: int, line: bytes, required: Sequence[str], columns: Mapping[str, str]) -> Row:
    from cotune.datamodules.files import DataError
    from cotune.datamodules.rows import example_from_json

    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        return Row(number, example_from_json(text, columns=columns, required=required))
    except UnicodeDecodeError as error:
        return Row(number, None, f"it is not UTF-8 (byte {error.start}).")
    except DataError as error:
        hint = " Give one JSON object per line." if str(error).startswith("it is not JSON") else ""
        return Row(number, None, f"{error}{hint}")


def _file_rows(data: str) -> list[dict[str, Any]]:
    from cotune.datamodules.files import DataError, read_rows

    rows = read_rows(data)
    if not rows:
        raise DataError(f"{data} holds no rows.")
    return rows


def _from_file(
    rows: Sequence[dict[str, Any]], required: Sequence[str], columns: Mapping[str, str], where: str
) -> list[Row]:
    """All rows, checked. An input that the program can do without is read if any row has it."""
    from cotune.datamodules.rows import examples_from_rows

    there = {column for row in rows for column in row}
    inputs = {name: column for name, column in columns.items() if name in required or column in there}
    examples = examples_from_rows(rows, inputs=inputs, labels={}, where=where)
    return [Row(number, example) for number, example in enumerate(examples, 1)]


def _cut(rows: Sequence[Row]) -> Iterator[list[Row]]:
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        yield list(rows[start : start + _ROWS_AT_ONCE])


def _answers(tuned: Tuned, batch: Sequence[Row], stored: StoredLM | None) -> Iterator[tuple[str, str]]:
    """(kind of failure or "", line of JSON) for each row, in order; before an error, for each that was answered."""
    from cotune.commands.predict_output import StoppedError, finished
    from cotune.programs.lm import LMUnavailableError

    examples, stopped = [row.example for row in batch if row.example is not None], None
    rollouts: Sequence[Rollout | None]
    try:
        rollouts = tuned.rollouts(examples)
    except LMUnavailableError as error:
        # It speaks of the store of a fit.
        stopped = StoppedError(str(error).partition(" What was answered before is in the store")[0])
        rollouts = finished(tuned, stored, examples, error) if stored else [None] * len(examples)
    done = iter(rollouts)
    for row in batch:
        if row.example is None:
            yield "input", json.dumps({"row": row.number, "error": row.fault}, ensure_ascii=False)
        elif rollout := next(done):
            yield rollout.error.kind if rollout.error else "", answer_line(row.number, rollout)
    if stopped:
        raise stopped


def _columns(given: Sequence[str], inputs: Sequence[str]) -> dict[str, str]:
    """Input -> column, its own name where --column gives none."""
    from cotune.datamodules.files import DataError

    named: dict[str, str] = {}
    for word in given:
        name, equals, column = word.partition("=")
        if name not in inputs or not equals or not column:
            raise DataError(f"--column {word}: write INPUT=COLUMN; the program's inputs are {', '.join(inputs)}.")
        if named.setdefault(name, column) != column:
            raise DataError(f"--column {word}: {name} is to be read from {named[name]} already; give it one column.")
    return {name: named.get(name, name) for name in inputs}


def answer_line(number: int, rollout: Rollout) -> str:
    """A row's answer as a line of JSON, records in it as mappings."""
    from cotune.programs.types import plain

    prediction = {} if rollout.error else dict(rollout.prediction or {})
    # A program's own field of these names keeps its value, under a name that is free.
    fields = {f"prediction.{name}" if name in ("row", "error") else name: value for name, value in prediction.items()}
    error = rollout.error.message if rollout.error else None
    return json.dumps(plain({"row": number, **fields, "error": error}), ensure_ascii=False)


def _summary(done: Counter[str]) -> str:
    failed = {kind: count for kind, count in done.items() if kind}
    kinds = ", ".join(f"{count} {kind}" for kind, count in failed.items())
    return f"{done['']} of {done.total()} rows answered" + (
        f"; {sum(failed.values())} failed ({kinds})" if kinds else ""
    )
