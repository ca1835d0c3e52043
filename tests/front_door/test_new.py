"""Claims about `cotune new`: what it writes runs as it is, with its own data or with the user's."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from commands import Said, cotune, tiny

from cotune.commands.new import propose_sizes


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Said]]:
    yield lambda *words: cotune(words, capsys)
    sys.modules.pop("program", None)


def test_what_it_writes_is_tuned_by_the_command_that_it_prints(
    run: Callable[..., Said], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = run("new", "my-task")
    assert said.code == 0, said.err
    assert said.out.endswith("next: cd my-task && cotune fit --config task.yaml\n")
    assert "my-task already exists" in run("new", "my-task").err
    monkeypatch.chdir("my-task")
    small = [
        "--alternate.schedule",
        "p",
        "--alternate.search.then.num_candidates",
        "1",
        "--data.bootstrapping.attempts",
        "1",
    ]
    done = run("fit", "--config", "task.yaml", *tiny(tiny_model), "--data.metric", "program.metric", *small)
    assert done.code == 0, done.err
    (asked,) = [line for line in Path("README.md").read_text().splitlines() if line.startswith("cotune ask")]
    assert asked.startswith("cotune ask --export runs/my-task --message ")
    assert Path("runs/my-task/export/prompts.json").is_file()


def test_rows_of_ones_own_get_their_fields_their_types_and_their_sizes(run: Callable[..., Said]) -> None:
    with Path("mine.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["Question text", "class", "note"])
        rows.writerows([f"what is {n}?", "even" if n % 2 == 0 else "odd", f"n{n}"] for n in range(40))
    assert (
        'there is no column "clas"; there are Question text, class, note.'
        in run(*("new", "sorted", "--data", "mine.csv", "--labels", "clas")).err
    )
    said = run("new", "sorted", "--data", "mine.csv", "--inputs", "Question text", "--labels", "class,note")
    assert said.code == 0, said.err
    assert "question_text -> class_: Literal['even', 'odd'], note\"" in Path("sorted/program.py").read_text()
    data = yaml.safe_load(Path("sorted/task.yaml").read_text())["data"]["init_args"]
    assert data["path"] == str(Path("mine.csv").resolve())
    assert data["inputs"] == {"question_text": "Question text"}
    assert data["labels"] == {"class_": "class", "note": "note"}
    assert (data["stratify"], data["sizes"]) == ("class_", {"train": 14, "dev": 8, "val": 8, "test": 10})
    compile(Path("sorted/program.py").read_text(), "program.py", "exec")


def test_columns_and_labels_of_any_name_give_a_task_that_runs(
    run: Callable[..., Said], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = ["no", "null", "self", "Text A", "text_a", "yes"]
    with Path("odd.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        rows.writerows([f"{c} {n}" for c in columns[:-1]] + ['say "x"' if n % 2 else "b\\c"] for n in range(24))
    assert run("new", "none", "--data", "odd.csv").code == 0
    data = yaml.safe_load(Path("none/task.yaml").read_text())["data"]["init_args"]
    inputs = {"no": "no", "null": "null", "self_": "self", "text_a": "Text A", "text_a_2": "text_a"}
    assert (data["inputs"], data["labels"], data["stratify"]) == (inputs, ["yes"], "yes")
    monkeypatch.chdir("none")
    small = ["--data.bootstrapping.attempts=1", "--alternate.schedule=p", "--alternate.search.then.num_candidates=1"]
    done = run("fit", "--config", "task.yaml", *tiny(tiny_model, metric=False), *small)
    assert done.code == 0, done.err
    assert (stage := json.loads(Path("runs/none/export/program.json").read_text())["stages"]["answer"])
    assert stage == {"inputs": list(inputs), "outputs": ["yes"]}


def test_too_few_rows_for_four_sets_are_refused(run: Callable[..., Said]) -> None:
    Path("few.jsonl").write_text('{"q": "a", "a": "b"}\n' * 7)
    assert "7 rows are too few" in run("new", "few", "--data", "few.jsonl").err
    assert not Path("few").exists()
    for rows in (8, 9, 99, 100, 3000):
        assert min(propose_sizes(rows).values()) >= 1
        assert sum(propose_sizes(rows).values()) <= rows


def rows(path: str, columns: str = "a,b,label") -> str:
    Path(path).write_text(f"{columns}\n" + "".join(f"{n},x{n},{n % 3}y\n" for n in range(24)))
    return path


def test_what_it_took_for_inputs_and_label_is_said(run: Callable[..., Said]) -> None:
    said = run("new", "one", "--data", rows("mine.csv"))
    assert "inputs: a, b; label: label (change with --labels and --inputs)\n" in said.out
    said = run("new", "two", "--data", "mine.csv", "--labels", "b,label")
    assert "inputs: a; labels: b, label (change with --labels and --inputs)\n" in said.out
    assert "inputs:" not in run("new", "three").out


@pytest.mark.parametrize("option", ["--labels", "--inputs"])
def test_a_column_named_twice_is_refused(run: Callable[..., Said], option: str) -> None:
    said = run("new", "one", "--data", rows("mine.csv"), option, "b,b")
    assert said.code == 2
    assert f'{option} names "b" twice' in said.err
    assert not Path("one").exists()


def test_the_command_that_it_prints_is_one_for_a_shell(run: Callable[..., Said]) -> None:
    assert run("new", "my task").out.endswith("next: cd 'my task' && cotune fit --config task.yaml\n")


def test_a_folder_that_cannot_be_made_is_refused(run: Callable[..., Said]) -> None:
    said = run("new", f"{rows('mine.csv')}/x")
    assert said.code == 2
    assert "mine.csv/x cannot be written: Not a directory. Give a folder where you can write" in said.err
