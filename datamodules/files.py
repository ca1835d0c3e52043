"""Files: rows of the user's files and of Hub data sets, or an error that names the file and the line."""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cotune.errors import CotuneError
from cotune.programs.faults import quoted
from cotune.storage.durable import lines_of


class DataError(CotuneError, ValueError):
    """The data is not what it should be. The message names the place, what is allowed, and the fix."""


def read_rows(
    path_or_hub_id: str, *, split: str | None = None, config: str | None = None, columns: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """The rows of a file (.jsonl, .json, .csv, .tsv, each also .gz, or .parquet) or of a Hub data set (owner/name).

    Cells of csv and tsv stay text. Class indices of Hub and parquet data become the classes' names, in lists too.

    Args:
        split, config: which part of a Hub data set; a file has none.
        columns: the only columns that are needed; Hub and parquet data then leave the others out, which for a set with
            its passages inside is most of the memory.

    Raises:
        DataError: there is no such file, it is not of its format, or the Hub does not give it.
    """
    path = Path(path_or_hub_id).expanduser()
    reader = _reader(path)
    if not path.exists() and reader is None and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path_or_hub_id):
        return _hub_rows(path_or_hub_id, config, split, columns)
    if not path.is_file():
        raise DataError(_no_file(path))
    if reader is None:
        raise DataError(f'"{path}" has an unknown format; allowed are {", ".join(_FORMATS)} and, except parquet, .gz.')
    if split is not None or config is not None:
        raise DataError(f'"{path}" is a file; leave out split and config, which are for Hub data sets.')
    return _parquet_rows(path, columns) if reader == ".parquet" else _TEXT_READERS[reader](_text(path), str(path))


def read_split(
    path_or_hub_id: str, split: str, *, file: str, config: str | None = None, columns: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """One split of data that is either a Hub data set or a local folder with a file for each split.

    Args:
        file: the split's file name in a local folder; it may stand there with ".gz" behind it.

    Raises:
        DataError: as `read_rows`, and for a path that is a file.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_file():
        raise DataError(f'"{path}" is a file; give the folder that holds {file}, e.g. "{path.parent}".')
    if path.is_dir():
        return read_rows(str(find_file(path, file)), columns=columns)
    return read_rows(path_or_hub_id, split=split, config=config, columns=columns)


def find_file(folder: Path, file: str) -> Path:
    """`folder/file` or `folder/file.gz`, whichever exists, the first if both.

    Raises:
        DataError: neither exists.
    """
    for path in (folder / file, folder / f"{file}.gz"):
        if path.is_file():
            return path
    raise DataError(f'"{folder}" holds no {file} or {file}.gz; it holds {_listing(folder)}.')


def refuse_bad_rows(faults: Sequence[str], total: int, where: str) -> None:
    """Raises a DataError with the first fault, if there is one, and how many of the rows are bad."""
    if faults:
        bad = f"{len(faults)} of {total} rows {'is' if len(faults) == 1 else 'are'} bad"
        raise DataError(f"{where}, {faults[0]} ({bad}.)")


_FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def _reader(path: Path) -> str | None:
    """The format that a path's ending names, None if there is none that we read."""
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    ending = next((f for f in _FORMATS if plain.endswith(f)), None)
    return None if ending == ".parquet" and plain != name else ending


def _text(path: Path) -> str:
    """A file's text, unzipped if its name ends in .gz, without a byte order mark."""
    try:
        data = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f'"{path}" is not UTF-8 (byte {error.start}); save it again with that encoding.') from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f'"{path}" cannot be read: {error}.') from error


def _jsonl_rows(text: str, where: str) -> list[dict[str, Any]]:
    lines = lines_of(text)
    rows, faults = [], []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json_object(line))
        except DataError as fault:
            faults.append(f"row {number}: {fault}")
    refuse_bad_rows(faults, len(lines), where)
    return rows


def json_object(line: str) -> dict[str, Any]:
    """The object that a line of jsonl holds. Raises DataError where it holds something else."""
    value = _json(line)
    if not isinstance(value, dict):
        raise DataError(f'it is of type {type(value).__name__}; a line of jsonl is an object, {{"field": value, …}}.')
    return value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for an integer of thousands of digits
        raise DataError(f"it is not JSON: {error}.") from error


def _json_rows(text: str, where: str) -> list[dict[str, Any]]:
    try:
        rows = _json(text)
    except DataError as fault:
        raise DataError(f"{where}: {fault} A file with one object per line is named .jsonl.") from fault
    if not isinstance(rows, list):
        raise DataError(f"{where} holds one value of type {type(rows).__name__}; a .json file is a list of objects.")
    faults = [
        f"row {n}: it is of type {type(row).__name__}; a row is an object."
        for n, row in enumerate(rows, 1)
        if not isinstance(row, dict)
    ]
    refuse_bad_rows(faults, len(rows), where)
    return rows


def _csv_rows(text: str, where: str, delimiter: str = ",") -> list[dict[str, Any]]:
    # Strict: an unclosed quote would otherwise swallow the rest of the file into one cell, and nobody would know.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header, *lines = [line for line in reader if line] or [[]]
    except csv.Error as error:
        raise DataError(
            f"{where}, line {reader.line_num}: {error}. Quotes inside a quoted cell are doubled; cells beyond 128 KiB "
            "do not fit csv, use jsonl."
        ) from error
    if not header:
        raise DataError(f"{where} is empty; its first line names the columns.")
    _refuse_twins(header, where)
    faults = [
        f"row {n}: it has {len(line)} cells, the header {len(header)}; quote cells that hold the delimiter."
        for n, line in enumerate(lines, 1)
        if len(line) != len(header)
    ]
    refuse_bad_rows(faults, len(lines), where)
    return [dict(zip(header, line, strict=True)) for line in lines]


def _tsv_rows(text: str, where: str) -> list[dict[str, Any]]:
    return _csv_rows(text, where, delimiter="\t")


_TEXT_READERS = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".tsv": _tsv_rows}


def _refuse_twins(header: Sequence[str], where: str) -> None:
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise DataError(
            f'{where} has two columns named "{quoted(twice[0], by=str, limit=60)}"; give each its own name.'
        )


def _no_file(path: Path) -> str:
    """What to say of a path that is no file: what is near it."""
    if path.is_dir():
        return f'"{path}" is a folder; give one file of it. It holds {_listing(path)}.'
    if not path.parent.is_dir():
        return f'there is no file "{path}": its folder "{path.parent}" does not exist either.'
    names = sorted(p.name for p in path.parent.iterdir())
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"that folder holds {_listing(path.parent)}."
    return f'there is no file "{path}"; {hint}'


def _listing(folder: Path, limit: int = 10) -> str:
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "") or "nothing"


# Hub and parquet


def _parquet_rows(path: Path, columns: Sequence[str] | None) -> list[dict[str, Any]]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        _refuse_twins(file.schema_arrow.names, str(path))
        table = file.read(columns=_needed(file.schema_arrow.names, columns, str(path)))
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f'"{path}" cannot be read as parquet: {error}.') from error
    # Not Dataset.from_parquet, which copies the file into the user's cache for the sake of one reading.
    features = {field.name: _feature(field, table.schema.metadata, str(path)) for field in table.schema}
    return [_as_written(row, features) for row in table.to_pylist()]


def _feature(field: Any, metadata: Any, where: str) -> Any:
    """What a column of parquet holds, in the words of `datasets`; its notes in the file name the classes."""
    import datasets
    import pyarrow as pa

    try:
        return datasets.Features.from_arrow_schema(pa.schema([field], metadata))[field.name]
    except (ValueError, KeyError, TypeError):
        pass  # the notes are of another version, or damaged: the type alone says enough
    try:
        return datasets.Features.from_arrow_schema(pa.schema([field]))[field.name]
    except ValueError as error:
        raise DataError(
            f'{where}: column "{field.name}" is of the Arrow type {field.type}, which cannot be read; allowed are '
            "text, numbers, booleans, dates, lists and structs. Save it as one of these, or leave the column out of "
            "inputs and labels."
        ) from error


def _needed(there: Sequence[str], columns: Sequence[str] | None, where: str) -> list[str]:
    """The columns to read, in the order of the data."""
    missing = [name for name in columns or () if name not in there]
    if missing:
        raise DataError(f'{where} has no column "{missing[0]}"; it has {", ".join(there)}.')
    return [name for name in there if columns is None or name in columns]


def _hub_rows(
    hub_id: str, config: str | None, split: str | None, columns: Sequence[str] | None
) -> list[dict[str, Any]]:
    data = _hub_data(hub_id, config, split)
    if isinstance(data, dict):  # no split was named: a DatasetDict
        if len(data) > 1:
            raise DataError(f'Hub data set "{hub_id}" has the splits {", ".join(data)}; name one, e.g. split="train".')
        (data,) = data.values()
    data = data.select_columns(_needed(data.column_names, columns, f'Hub data set "{hub_id}"'))
    return [_as_written(row, data.features) for row in data.to_list()]


def _as_written(value: Any, feature: Any) -> Any:
    """A value as a program answers it: a class's name and not its place in a list, 3.1 and not 3.0999999046325684."""
    import datasets
    import numpy as np

    if value is None:
        return None
    if isinstance(feature, dict):
        return {name: _as_written(value[name], inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return [_as_written(item, feature.feature) for item in value]
    if isinstance(feature, datasets.ClassLabel):
        if value >= len(feature.names):
            named = ", ".join(feature.names[:5])
            raise DataError(f"a class index is {value}, but its column has {len(feature.names)} classes ({named} …).")
        # -1 is the Hub's convention for "no label": left to the caller as an empty field.
        return None if value < 0 else feature.int2str(value)
    if hasattr(feature, "shape") and isinstance(value, list):  # Array2D to Array5D
        return [_as_written(item, feature) for item in value]
    if getattr(feature, "dtype", "") in ("float32", "float16"):
        return float(np.format_float_positional(np.dtype(feature.dtype).type(value)))
    return value


def _hub_data(hub_id: str, config: str | None, split: str | None) -> Any:
    import datasets

    try:
        return _load_from_hub(hub_id, config, split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f'there is no file or folder "{hub_id}" here, and no data set of that name on the Hub that you may read '
            f"({error}) Check the name; for a private or gated one run `hf auth login`."
        ) from error
    except OSError as error:  # ConnectionError, and what the HTTP client makes of a broken transfer
        raise DataError(
            f'"{hub_id}" is no file or folder here, and the Hub cannot be reached to look for it there ({error}). '
            "Without the Hub, give a local file or folder as path, e.g. --data.path data/train.jsonl."
        ) from error
    except ValueError as error:
        asked = f"config={config!r}, split={split!r}"
        raise DataError(f'Hub data set "{hub_id}" cannot be loaded with {asked}: {error}') from error


def _load_from_hub(hub_id: str, config: str | None, split: str | None) -> Any:
    """Never runs code from the Hub: a data set that is a script is read from the Hub's own conversion of it."""
    import datasets

    try:
        return datasets.load_dataset(hub_id, config, split=split)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        return datasets.load_dataset(hub_id, config, split=split, revision="refs/convert/parquet")
