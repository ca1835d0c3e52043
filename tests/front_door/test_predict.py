"""Claims about `cotune predict`: a line a row, in order, failures among them."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from commands import Said, cotune
from cotune.datamodules.tasks.iris import iris_examples

from cotune.commands.predict import stream_rows
from cotune.tuned import Tuned

ROWS = [dict(example.inputs) for example in iris_examples()[::30]]
TOO_LONG = dict.fromkeys(ROWS[0], "1" * 1000)


@pytest.fixture
def predict(finished: Any, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: str) -> Said:
        return cotune(["predict", "--export", str(finished.export), *words], capsys)

    return run


def jsonl(*rows: Mapping[str, Any], path: str = "rows.jsonl") -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_every_row_gets_a_line_in_order(predict: Any, finished: Any) -> None:
    said = predict("--data", jsonl(*ROWS))
    assert said.code == 0, said.err
    answers = [
        r.prediction and r.prediction["answer"] for r in finished.module.rollouts(iris_examples()[::30], metric=None)
    ]
    assert [line["row"] for line in lines(said.out)] == [1, 2, 3, 4, 5]
    assert [line.get("answer") for line in lines(said.out)] == answers


def test_a_row_that_fails_says_why_and_the_others_are_answered(predict: Any, finished: Any) -> None:
    # What a random model says to a flower is luck; these two it answers.
    one, other = [r.example.inputs for r in finished.module.rollouts(iris_examples(), metric=None) if not r.error][:2]
    said = predict("--data", jsonl(one, TOO_LONG, other))
    first, second, third = lines(said.out)
    assert second == {"row": 2, "error": 'stage "predict": the prompt is longer than the model\'s context window'}
    assert first["error"] is None
    assert third["error"] is None
    assert said.code == 0
    assert "2 of 3 rows answered; 1 failed (1 format)" in said.err


def test_what_a_program_prints_is_not_among_the_lines(predict: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts = Tuned.rollouts
    monkeypatch.setattr(Tuned, "rollouts", lambda *args: print("asking") or rollouts(*args))
    said = predict("--data", jsonl(*ROWS))
    assert len(lines(said.out)) == len(ROWS)
    assert "asking" in said.err


def test_when_all_rows_fail_so_does_the_command(predict: Any) -> None:
    assert predict("--data", jsonl(TOO_LONG)).code == 1


def test_csv_and_standard_input_give_the_same_lines(predict: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    header = ",".join(ROWS[0])
    Path("rows.csv").write_text("\n".join([header, *(",".join(row.values()) for row in ROWS)]))
    from_csv = predict("--data", "rows.csv")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(jsonl(*ROWS)).read_bytes())))
    assert predict("--data", "-").out == from_csv.out != ""


def given(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_a_bad_line_of_a_stream_is_numbered_and_the_others_are_answered(
    predict: Any, monkeypatch: pytest.MonkeyPatch, finished: Any
) -> None:
    good = next(dict(r.example.inputs) for r in finished.module.rollouts(iris_examples(), metric=None) if not r.error)
    line = json.dumps(good).encode()
    given(monkeypatch, b"\n".join([line, b"{", b"", b'{"petal_length": "1"}', b"\xff", line, b"[1]"]))
    said = predict("--data", "-")
    assert said.code == 0
    errors = {line["row"]: line["error"] for line in lines(said.out)}
    assert list(errors) == [1, 2, 3, 4, 5, 6]
    assert errors[1] is errors[5] is None
    assert errors[2].startswith("it is not JSON")
    assert "field 'petal_width' is missing" in errors[3]
    assert errors[4] == "it is not UTF-8 (byte 0)."
    assert errors[6].startswith("it is of type list")
    assert "standard input, row 2: it is not JSON" in said.err
    assert errors[2].endswith("Give one JSON object per line.")
    assert "2 of 6 rows answered; 4 failed (4 input)" in said.err


def test_strict_makes_one_failure_the_exit_code(predict: Any, monkeypatch: pytest.MonkeyPatch, finished: Any) -> None:
    good = next(dict(r.example.inputs) for r in finished.module.rollouts(iris_examples(), metric=None) if not r.error)
    assert predict("--data", jsonl(good, TOO_LONG), "--strict").code == 1
    assert predict("--data", jsonl(good), "--strict").code == 0
    given(monkeypatch, b"{")
    assert predict("--data", "-").code == 1


def test_an_empty_stream_says_so(predict: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, b"\n\n")
    said = predict("--data", "-")
    assert (said.code, said.out) == (2, "")
    assert "standard input holds no rows" in said.err


def test_a_stream_is_answered_before_it_ends() -> None:
    import os

    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stream, os.fdopen(writing, "wb", buffering=0) as source:
        batches = stream_rows(stream, ["question"], {"question": "question"})
        source.write(b'{"question": "one"}\n')
        (first,) = next(batches)  # the writer is still there, and waits
        source.write(b'{"question": "two"}\n')
        (second,) = next(batches)
        source.close()
        assert list(batches) == []
    assert [(row.number, row.example and row.example.inputs) for row in (first, second)] == [
        (1, {"question": "one"}),
        (2, {"question": "two"}),
    ]


def test_a_runs_folder_stands_for_its_export(finished: Any, capsys: pytest.CaptureFixture[str], predict: Any) -> None:
    said = cotune(["predict", "--export", str(finished.folder), "--data", jsonl(*ROWS)], capsys)
    assert said.out == predict("--data", jsonl(*ROWS)).out != ""


def test_lines_go_to_a_file(predict: Any) -> None:
    said = predict("--data", jsonl(*ROWS), "--output", "made/out.jsonl")
    assert said.out == ""
    assert len(lines(Path("made/out.jsonl").read_text())) == len(ROWS)


def test_a_column_of_another_name_is_named(predict: Any) -> None:
    renamed = [{("length" if name == "petal_length" else name): value for name, value in row.items()} for row in ROWS]
    assert predict("--data", jsonl(*renamed), "--column", "petal_length=length").code == 0
    said = predict("--data", jsonl(*renamed), "--column", "petal=length")
    assert said.code == 2
    assert "the program's inputs are petal_length, petal_width" in said.err
    said = predict("--data", jsonl(*renamed), "--column", "petal_length=length", "--column", "petal_length=sepal_width")
    assert (said.code, said.out) == (2, "")
    assert "petal_length is to be read from length already; give it one column" in said.err


def test_a_row_without_an_input_is_named(predict: Any) -> None:
    said = predict("--data", jsonl(ROWS[0], {**ROWS[1], "petal_width": None}))
    assert (said.code, said.out) == (2, "")
    assert "rows.jsonl, row 2: field 'petal_width' is empty (null)" in said.err
    without = {name: value for name, value in ROWS[1].items() if name != "petal_width"}
    said = predict("--data", jsonl(ROWS[0], without))
    assert "rows.jsonl, row 2: field 'petal_width' is missing" in said.err


@pytest.mark.parametrize(
    ("rows", "message"), [("", "holds no rows"), ("{", "row 1: it is not JSON"), (None, "there is no file")]
)
def test_data_that_is_none_says_so(predict: Any, rows: str | None, message: str) -> None:
    if rows is not None:
        Path("rows.jsonl").write_text(rows)
    said = predict("--data", "rows.jsonl")
    assert said.code == 2
    assert message in said.err
    assert "Traceback" not in said.err


def test_without_an_export_the_options_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    said = cotune(["predict", "--data", "rows.jsonl"], capsys)
    assert said.code == 2
    assert "--export" in said.err


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("made", '"made" is a folder; give a file, e.g. "made/answers.jsonl"'),
        ("new/", '"new/" is a folder; give a file, e.g. "new/answers.jsonl"'),
        ("rows.jsonl/x", "cannot be written: Not a directory"),
        ("rows.jsonl/x/y", "cannot be written: Not a directory"),
        ("/proc/nope/x", "cannot be written: "),
        ("rows.jsonl", "is the file of --data, whose rows it would replace"),
        ("linked.jsonl", "is the file of --data"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_anything_is_loaded(
    predict: Any, output: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cotune.tuned.load", lambda *_, **__: pytest.fail("it was loaded"))
    Path("made").mkdir()
    data = jsonl(*ROWS)
    os.link(data, "linked.jsonl")
    before = Path(data).read_text()
    said = predict("--data", data, "--output", output)
    assert said.code == 2
    assert message in said.err
    assert "Traceback" not in said.err
    assert Path(data).read_text() == before
    assert not list(Path().rglob("*.partial"))


def test_an_output_takes_its_place_when_it_is_whole(
    predict: Any, finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cotune.commands.predict._ROWS_AT_ONCE", 2)
    Path("out.jsonl").write_text("earlier")
    rollouts, calls = Tuned.rollouts, 0

    def breaks(self: Tuned, examples: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return rollouts(self, examples)

    monkeypatch.setattr(Tuned, "rollouts", breaks)
    said = predict("--data", jsonl(*ROWS), "--output", "out.jsonl")
    assert said.code == 130
    assert "answers so far, 2 rows, are in out.jsonl.partial; out.jsonl is as it was." in said.err
    assert Path("out.jsonl").read_text() == "earlier"
    assert len(lines(Path("out.jsonl.partial").read_text())) == 2
    predict("--data", jsonl(*ROWS), "--output", "out.jsonl")
    assert [line["row"] for line in lines(Path("out.jsonl").read_text())] == [1, 2, 3, 4, 5]
    assert not Path("out.jsonl.partial").exists()


def test_a_device_is_written_to_as_it_is(predict: Any) -> None:
    assert predict("--data", jsonl(*ROWS), "--output", os.devnull).code in (0, 1)
    assert not Path(os.devnull + ".partial").exists()
