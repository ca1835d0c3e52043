"""cotune new: a folder with a program, data, a metric and a config that run as they are, to be changed step by step."""

from __future__ import annotations

import argparse
import json
import keyword
import re
import shlex
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cotune.errors import CotuneError

_FEW = 20
"""Most different texts of a label that is taken for a choice among them."""


class NewTaskError(CotuneError):
    """The folder is there already, or the data is not what a task can be made of."""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        "cotune new",
        allow_abbrev=False,
        description="Writes a folder with all that a fit needs: program.py (the program and its metric), "
        "task.yaml, a README with the next commands and made-up rows; with --data the file of your rows stays where "
        "it is, and task.yaml names it. It runs unchanged; adapt it to your task.",
    )
    made.add_argument("folder", metavar="FOLDER", help="new folder, e.g. my-task; the run gets its name")
    made.add_argument("--data", metavar="FILE", help="your own rows (jsonl, csv, …; default: 24 made-up rows)")
    made.add_argument("--labels", metavar="COLUMN,…", help="columns with the right answers (default: the last column)")
    made.add_argument("--inputs", metavar="COLUMN,…", help="columns that the program reads (default: all others)")
    return made


def main(options: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        NewTaskError: the folder is there already or cannot be made, a column is unknown or named twice, or there are
            fewer than eight rows.
        DataError: the data cannot be read.
    """
    folder = Path(options.folder)
    if folder.exists():
        raise NewTaskError(f"{folder} already exists; give a new folder.")
    rows: Sequence[Mapping[str, Any]] = _read(options.data) if options.data else _sketch()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    labels = _columns("--labels", options.labels, columns) or columns[-1:]
    inputs = _columns("--inputs", options.inputs, columns) or [name for name in columns if name not in labels]
    if not inputs or set(inputs) & set(labels):
        raise NewTaskError(f"a column is either an input or a label; the inputs are {inputs}, the labels {labels}.")
    data = str(Path(options.data).resolve()) if options.data else "data.jsonl"
    task = "" if options.data else "Which team should answer this message of a customer?"
    files = _task_files(folder.name, rows, inputs=inputs, labels=labels, data=data, task=task)
    if not options.data:
        files["data.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
    try:
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise NewTaskError(
            f"{folder} cannot be written: {error.strerror}. Give a folder where you can write, e.g. my-task."
        ) from error
    print(f"wrote {', '.join(str(folder / name) for name in files)}")
    if options.data:
        named = "label" if len(labels) == 1 else "labels"
        print(f"inputs: {', '.join(inputs)}; {named}: {', '.join(labels)} (change with --labels and --inputs)")
    print(f"next: cd {shlex.quote(str(folder))} && cotune fit --config task.yaml")
    return 0


def propose_sizes(rows: int) -> dict[str, int]:
    """How many of so many rows each set gets: a quarter for test, a fifth each for dev and val, the rest for train.

    More than some hundreds add cost to every step and little to what it can tell.

    >>> propose_sizes(24), propose_sizes(10_000)
    ({'train': 10, 'dev': 4, 'val': 4, 'test': 6}, {'train': 1000, 'dev': 100, 'val': 200, 'test': 500})

    Raises:
        NewTaskError: fewer than 8 rows.
    """
    if rows < 8:
        raise NewTaskError(
            f"{rows} rows are too few for four sets; give at least 8, and 50 or more to measure anything."
        )
    dev, val, test = min(rows // 5, 100), min(rows // 5, 200), min(rows // 4, 500)
    return {"train": min(rows - dev - val - test, 1000), "dev": dev, "val": val, "test": test}


def _task_files(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    inputs: Sequence[str],
    labels: Sequence[str],
    data: str,
    task: str = "",
) -> dict[str, str]:
    """File name -> text, of program, config and README.

    Args:
        name: of the task.
        rows: of the data; their values decide the types of the labels and the sizes of the sets.
        inputs, labels: columns.
        data: the path in the config.
        task: the instruction; one made of the fields without it.
    """
    fields = _identifiers([*inputs, *labels])
    kinds = {column: _kind([row[column] for row in rows if column in row]) for column in labels}
    outputs = ", ".join(fields[c] + (f": {kinds[c]}" if kinds[c] else "") for c in labels)
    reads = [fields[c] for c in inputs]
    sizes = propose_sizes(len(rows))
    run_name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "task"
    values = {
        "cls": _class_name(name),
        "name": run_name,
        "yaml_name": _yaml(run_name),
        "signature": _literal(f"{', '.join(reads)} -> {outputs}"),
        "task": task or f"Given {', '.join(reads)}, give {', '.join(fields[c] for c in labels)}.",
        "parameters": ", ".join(reads),
        "given": ", ".join(f"{field}={field}" for field in reads),
        "data": _quoted(data),
        "inputs": _mapping(inputs, fields),
        "labels": _mapping(labels, fields),
        "stratify": _yaml(fields[labels[0]]) if kinds[labels[0]].startswith("Literal") else "null",
        "sizes": ", ".join(f"{part}: {size}" for part, size in sizes.items()),
        "rows": len(rows),
        "tokens": 16 if all(kinds.values()) else 64,
        "batch": 4 if sizes["train"] < 40 else 8,
        "warmup": 2 if sizes["train"] < 40 else 10,
        "question": " ".join(
            f"--{fields[c]} {json.dumps(str(rows[0].get(c, '')), ensure_ascii=False)}" for c in inputs
        ),
    }
    return {
        "program.py": _filled(_PROGRAM, values),
        "task.yaml": _filled(_CONFIG, values),
        "README.md": _filled(_README, values),
    }


def _read(path: str) -> list[dict[str, Any]]:
    from cotune.datamodules.files import read_rows  # which takes a while to import

    return read_rows(path)


def _columns(option: str, given: str | None, known: Sequence[str]) -> list[str]:
    names = [name.strip() for name in (given or "").split(",") if name.strip()]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise NewTaskError(f'{option} names "{twice[0]}" twice; name each column once.')
    unknown = [name for name in names if name not in known]
    if unknown:
        raise NewTaskError(f'there is no column "{unknown[0]}"; there are {", ".join(known)}.')
    return names


def _identifiers(columns: Sequence[str]) -> dict[str, str]:
    """Column -> a Python name of its own, which an argument beside `self` can have.

    >>> _identifiers(["Text A", "text_a", "self"])
    {'Text A': 'text_a', 'text_a': 'text_a_2', 'self': 'self_'}
    """
    found: dict[str, str] = {}
    for column in columns:
        first = name = _identifier(column)
        number = 1
        while name in found.values():
            number += 1
            name = f"{first}_{number}"
        found[column] = name
    return found


def _identifier(text: str) -> str:
    """A Python name near a text.

    >>> _identifier("Question text"), _identifier("2nd"), _identifier("class")
    ('question_text', 'x_2nd', 'class_')
    """
    name = re.sub(r"\W+", "_", unicodedata.normalize("NFKC", text)).strip("_").lower() or "x"
    name = name if name.isidentifier() else f"x_{name}"
    return f"{name}_" if keyword.iskeyword(name) or name == "self" else name


def _class_name(task: str) -> str:
    """
    >>> _class_name("my-task"), _class_name("none")
    ('MyTask', 'NoneTask')
    """
    name = "".join(part.capitalize() for part in _identifier(task).split("_")) or "Task"
    return f"{name}Task" if keyword.iskeyword(name) else name


def _literal(text: str) -> str:
    """A text as Python writes it, in double quotes where it holds none.

    >>> print(_literal("a -> b: Literal['c']"), _literal('say "x"'))
    "a -> b: Literal['c']" 'say "x"'
    """
    plain = f'"{text}"'
    return plain if '"' not in text and "\\" not in text and text.isprintable() else repr(text)


def _yaml(name: str) -> str:
    """A name as YAML writes it: in quotes where it would be another value.

    >>> _yaml("text"), _yaml("no"), _yaml("2024")
    ('text', '"no"', '"2024"')
    """
    return name if yaml.safe_load(name) == name else _quoted(name)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _kind(values: Sequence[Any]) -> str:
    """A label's type as a signature writes it; "" for text.

    >>> _kind(["a", "b"] * 4), _kind([1, 2]), _kind([0.5, 1]), _kind([["x"], []]), _kind(["one", "other"])
    ("Literal['a', 'b']", 'int', 'float', 'list[str]', '')
    """
    kinds = {type(value) for value in values}
    if kinds == {str}:
        choices = sorted(set(values))
        few = 1 < len(choices) <= min(_FEW, len(values) // 2) and all(c.strip() and "\n" not in c for c in choices)
        return f"Literal[{', '.join(map(repr, choices))}]" if few else ""
    if kinds == {list}:
        return "list[str]"
    return {
        frozenset({bool}): "bool",
        frozenset({int}): "int",
        frozenset({float}): "float",
        frozenset({dict}): "dict",
    }.get(frozenset(kinds), "float" if kinds == {int, float} else "")


def _mapping(columns: Sequence[str], fields: Mapping[str, str]) -> str:
    """Columns as YAML: a list, or field: column where a column is no Python name."""
    if all(fields[column] == column for column in columns):
        return f"[{', '.join(map(_yaml, columns))}]"
    return f"{{{', '.join(f'{_yaml(fields[column])}: {_quoted(column)}' for column in columns)}}}"


def _filled(template: str, values: Mapping[str, Any]) -> str:
    return re.sub(r"<(\w+)>", lambda found: str(values[found[1]]), template)


_PROGRAM = '''"""The program that is tuned, and the metric of its answers."""

from cotune import Program, Signature, Stage


class <cls>(Program):
    """One stage. For a second one assign another Stage here, and yield a call of it in `run`."""

    answer = Stage(
        Signature.parse(
            <signature>,
            instruction="<task>",  # say here what the task is
        )
    )

    def run(self, <parameters>):
        result = yield self.answer(<given>)  # `yield` asks the LM; result["name"] is an output
        return result


def metric(example, prediction):
    """From 0 to 1: the share of the labels that the prediction has right. cotune.exact_match is less strict."""
    right = [str(prediction[name]) == str(label) for name, label in example.labels.items()]
    return sum(right) / len(right)
'''

_CONFIG = """\
# <rows> rows; the embedded LM on 2 CPU cores. What is not set here is as cotune fit --help says.
name: <yaml_name>
model:
  program: program.<cls>
  sampling: {max_new_tokens: <tokens>} # most tokens of one answer
  learning_rate: {warmup: <warmup>} # optimiser steps
data:
  class_path: Table
  init_args:
    path: <data>
    inputs: <inputs>
    labels: <labels>
    stratify: <stratify> # a label whose values each set has in equal shares
    sizes: {<sizes>} # train teaches, dev chooses prompts, val steps, test is for the end
    metric: program.metric
    batch_size: <batch>
    bootstrapping: {gold_answers: true} # where no attempt is right, train on the label; not for stages that reason
alternate:
  schedule: p -> w # search prompts, then train weights
  epochs: 6
"""

_README = """\
# <name>

`program.py` has the program and its metric, `task.yaml` the settings. Start in this folder:

```bash
cotune fit --config task.yaml
cotune ask --export runs/<name> <question>
cotune report runs/<name>
```

Another LM: `--model.lm.model HUB_ID_OR_FOLDER`. Other settings want another `--name`.
"""

_TICKETS = {
    "billing": "I was charged twice this month|My invoice shows the wrong amount|Please refund my last payment|"
    "The card on my account has expired|Where do I find my receipt?|Why did the price of my plan go up?|"
    "My discount was not applied to the bill|Can I pay by bank transfer?",
    "shipping": "My parcel has not arrived|The tracking number does not work|The box was damaged on delivery|"
    "Can you deliver to another address?|When will my order be shipped?|I received the wrong parcel|"
    "Half of my order is missing from the box|Do you ship to Norway?",
    "technical": "The app crashes when I open it|I cannot log in|The page stays blank after the update|"
    "The export button does nothing|I get error 500 when I save|Notifications have stopped working|"
    "The search returns no results|The installer fails on Windows",
}


def _sketch() -> list[dict[str, str]]:
    return [{"message": text, "team": team} for team, texts in _TICKETS.items() for text in texts.split("|")]
