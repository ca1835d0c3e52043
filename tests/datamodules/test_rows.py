"""Rows: what can be read becomes examples; what cannot is named by file, row and field."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from cotune.datamodules.files import DataError, find_file, read_rows, read_split
from cotune.datamodules.rows import examples_from_rows
from cotune.datamodules.table import table_examples
from cotune.programs import Predict
from cotune.programs.demos import labelled_demos
from fakes import FakeLM, asked, runner
from hypothesis import given, settings
from hypothesis import strategies as st

GOOD = {"question": "1+1?", "answer": "2"}


def read(rows: list[Any], **options: Any) -> list[Any]:
    return examples_from_rows(rows, **{"inputs": ["question"], "labels": ["answer"], "where": "qa.csv", **options})


def write(path: Path, text: str, *, encoding: str = "utf-8") -> str:
    data = text.encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


# Rows to examples


def test_columns_become_inputs_and_labels() -> None:
    (example,) = read([{**GOOD, "unused": object()}])
    assert (example.inputs, example.labels) == ({"question": "1+1?"}, {"answer": "2"})


def test_a_mapping_renames_columns_to_what_the_program_calls_them() -> None:
    (example,) = read([{"Question text": "q", "Gold": "g"}], inputs={"question": "Question text"}, labels={"a": "Gold"})
    assert (example.inputs, example.labels) == ({"question": "q"}, {"a": "g"})


def test_without_id_field_the_id_comes_from_the_contents() -> None:
    first, second = read([GOOD])[0].id, read([{"x": 1, **GOOD}])[0].id
    assert first == second
    assert read([{**GOOD, "answer": "3"}])[0].id != first


@pytest.mark.parametrize(("given_id", "id_"), [("a-1", "a-1"), (7, "7"), (0, "0")])
def test_an_id_is_text_or_a_whole_number(given_id: object, id_: str) -> None:
    assert read([{**GOOD, "key": given_id}], id_field="key")[0].id == id_


@pytest.mark.parametrize("value", ["text", "", 3, 2.5, True, ["a", "b"], [], ["q", 1], {"text": "q", "more": None}])
def test_an_input_may_be_what_json_has(value: object) -> None:
    assert read([{**GOOD, "question": value}])[0].inputs["question"] == value


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"question": "q"}, "field 'answer' is missing; the row has 'question'"),
        ({"question": None, "answer": "a"}, r"field 'question' is empty \(null\)"),
        ({"question": float("nan"), "answer": "a"}, "field 'question' is nan"),
        ({"question": "q", "answer": float("inf")}, "field 'answer' is inf"),
        ({"question": "q", "answer": None}, r"field 'answer' is empty \(null\)"),
        ({"question": "q", "answer": " \n"}, "field 'answer' is empty"),
        ({"question": "q", "answer": []}, "field 'answer' is empty"),
        ({"question": b"q", "answer": "a"}, "field 'question' is of type bytes"),
        ({"question": ["q", None], "answer": "a"}, r"field 'question' is empty \(null\)"),
        ({"question": "q", "answer": ["a", " "]}, "field 'answer' is empty"),
        ({"question": "half \ud83d", "answer": "a"}, "field 'question' has half a surrogate pair"),
        ({"question": ["ok", "\udc00"], "answer": "a"}, "field 'question' has half a surrogate pair"),
        ({"question": 2**63, "answer": "a"}, "field 'question' is a whole number beyond 64 bits"),
        ({"question": {"deep": 10**5000}, "answer": "a"}, "field 'question' is a whole number beyond 64 bits"),
        (["q", "a"], "it is of type list; a row maps columns to values"),
    ],
)
def test_a_bad_row_is_named_with_its_field_and_counted(bad: Any, said: str) -> None:
    with pytest.raises(DataError, match=rf"^qa\.csv, row 2: {said}.*\(2 of 4 rows are bad\.\)$"):
        read([GOOD, bad, GOOD, bad])


def test_a_label_may_be_an_empty_list_where_the_column_holds_lists(tmp_path: Path) -> None:
    rows = [{"question": q, "answer": people} for q, people in (("Anna met Bo.", ["Anna", "Bo"]), ("Nobody came.", []))]
    _, nobody = examples = read(rows)
    assert nobody.labels == {"answer": []}
    said = {"Anna met Bo.": '["Anna","Bo"]', "Nobody came.": "[]"}
    lm, program = (
        FakeLM(lambda request: f"answer: {said[asked(request, 'question')]}"),
        Predict("question -> answer: list[str]"),
    )
    assert [run.score for run in runner(lm, program).run(examples, program.initial_prompts())] == [1, 1]
    assert [demo.outputs["answer"] for demo in labelled_demos(program, examples)["predict"]] == [*said.values()]
    for others in (["2"], [["a"], "2"], [[]], [["a"], None], [["a"], [""]]):
        with pytest.raises(DataError, match="is empty"):
            read([{"question": "q", "answer": answer} for answer in [*others, []]])


@pytest.mark.parametrize("value", ["", None, True, 1.5, ["a"], "\ud800"])
def test_a_bad_id_is_named(value: object) -> None:
    with pytest.raises(DataError, match=r"row 1: field 'key' .*\(1 of 1 rows is bad\.\)"):
        read([{**GOOD, "key": value}], id_field="key")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"inputs": "question"}, r'inputs is the text "question"; give a list, \["question"\]'),
        ({"inputs": []}, "inputs is empty"),
        ({"inputs": ["question", "question"]}, 'inputs names "question" twice'),
        ({"inputs": ["Question text"]}, r'cannot be an argument of Program.run; .*\{"question": "Question text"\}'),
        ({"inputs": ["question", "answer"]}, 'column "answer" is an input and a label'),
    ],
)
def test_columns_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read([GOOD], **options)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.binary()
    | st.text(st.characters(codec=None, categories=None)),  # lone surrogates too
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
NAME = st.sampled_from(["question", "answer", "id", "other"])
ROW = st.dictionaries(NAME | st.none() | st.text(max_size=3), ANYTHING, max_size=5) | ANYTHING


@given(st.lists(ROW | st.just(GOOD), max_size=4), st.none() | NAME)
@settings(max_examples=300, deadline=None)
def test_whatever_the_rows_there_are_examples_or_a_data_error(rows: list[Any], id_field: str | None) -> None:
    try:
        examples = read(rows, id_field=id_field)
    except DataError as error:
        str(error).encode()  # can be printed and logged
        return
    assert len(examples) == len(rows)
    for example in examples:
        json.dumps([example.id, example.inputs, example.labels], allow_nan=False).encode()
        example.id.encode()


# Files to rows

QA = [{"q": 'é, "x"\u2028?', "a": "1"}, {"q": "two\nlines", "a": "02"}]
TEXTS: dict[str, Callable[[], str]] = {
    "jsonl": lambda: "\n".join(json.dumps(row, ensure_ascii=False) for row in QA) + "\n\n",
    "json": lambda: json.dumps(QA),
    "csv": lambda: 'q,a\r\n"é, ""x""\u2028?",1\r\n\r\n"two\nlines",02\r\n',
    "tsv": lambda: 'q\ta\n"é, ""x""\u2028?"\t1\n"two\nlines"\t02\n',
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("ending", TEXTS)
def test_a_text_file_is_read_with_or_without_gz_and_byte_order_mark(
    tmp_path: Path, ending: str, zipped: str, encoding: str
) -> None:
    assert read_rows(write(tmp_path / f"qa.{ending}{zipped}", TEXTS[ending](), encoding=encoding)) == QA


def test_numbers_in_csv_stay_text(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path / "n.csv", "n\n007\n1e3\n")) == [{"n": "007"}, {"n": "1e3"}]


def test_numbers_of_parquet_are_what_was_written(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    columns = {"single": pa.array([3.1, None], pa.float32()), "half": pa.array([np.float16(0.1)] * 2, pa.float16())}
    columns |= {"exact": pa.array([Decimal("3.50"), Decimal("7.00")]), "day": pa.array([date(2024, 7, 26)] * 2)}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    rows = read_rows(str(tmp_path / "a.parquet"))
    assert [rows[0]["single"], rows[1]["single"], rows[0]["half"]] == [3.1, None, 0.1]
    example = examples_from_rows(rows, inputs=["day"], labels=["exact"])
    assert [(e.inputs["day"], e.labels["exact"]) for e in example] == [("2024-07-26", 3.5), ("2024-07-26", 7)]


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", ""), ("a.json", "[]"), ("a.csv", "q,a\n")])
def test_a_file_without_rows_is_said_to_be_empty(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=rf"{name} is empty: it holds no row"):
        table_examples(str(tmp_path / name), inputs=["q"], labels=["a"])


def test_parquet_is_read_and_class_indices_become_names(tmp_path: Path) -> None:
    features = datasets.Features({"q": datasets.Value("string"), "a": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"q": ["x", "y", "z"], "a": [1, 0, -1]}, features=features)
    data.to_parquet(tmp_path / "qa.parquet")
    rows = read_rows(str(tmp_path / "qa.parquet"))
    assert rows == [{"q": "x", "a": "yes"}, {"q": "y", "a": "no"}, {"q": "z", "a": None}]
    assert read_rows(str(tmp_path / "qa.parquet"), columns=["q"]) == [{"q": "x"}, {"q": "y"}, {"q": "z"}]
    with pytest.raises(DataError, match=r'no column "b"; it has q, a\.'):
        read_rows(str(tmp_path / "qa.parquet"), columns=["q", "b"])


def test_class_names_and_short_numbers_are_found_within_lists_and_structs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, number = datasets.ClassLabel(names=["a", "b", "c"]), datasets.Value("float32")
    features = datasets.Features({"tags": datasets.List(kind), "more": {"kind": kind, "sizes": datasets.List(number)}})
    features["box"] = datasets.Array2D((1, 2), "float32")
    rows = [
        {"tags": [0, 2, -1], "more": {"kind": 1, "sizes": [3.1, None]}, "box": [[3.1, 0.5]]},
        {"tags": None, "more": {"kind": None, "sizes": []}, "box": None},
    ]
    data = datasets.Dataset.from_list(rows, features=features)
    data.to_parquet(tmp_path / "a.parquet")
    hub(monkeypatch, data)
    named = [
        {"tags": ["a", "c", None], "more": {"kind": "b", "sizes": [3.1, None]}, "box": [[3.1, 0.5]]},
        {"tags": None, "more": {"kind": None, "sizes": []}, "box": None},
    ]
    assert read_rows(str(tmp_path / "a.parquet")) == read_rows("me/qa") == named


def test_what_a_column_of_parquet_may_not_be_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table([["x"], ["1"], ["2"]], names=["q", "a", "a"]), file)
    with pytest.raises(DataError, match=r'a\.parquet has two columns named "a"; give each its own name'):
        read_rows(str(file))
    pairs = pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64()))
    parquet.write_table(pa.table({"q": ["x"], "pairs": pairs}), file)
    with pytest.raises(DataError, match=r'a\.parquet: column "pairs" is of the Arrow type map<.*leave the column out'):
        read_rows(str(file))
    assert read_rows(str(file), columns=["q"]) == [{"q": "x"}]


def test_notes_of_parquet_that_cannot_be_read_leave_its_values(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    notes = {"info": {"features": {"q": {"dtype": "string", "_type": "Value"}, "a": {"_type": "Later"}}}}
    table = pa.table({"q": ["x"], "a": [1]}).replace_schema_metadata({"huggingface": json.dumps(notes)})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read_rows(str(tmp_path / "a.parquet")) == [{"q": "x", "a": 1}]
    notes["info"]["features"]["a"] = {"names": ["no"], "_type": "ClassLabel"}
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(notes)}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a class index is 1, but its column has 1 classes \(no"):
        read_rows(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "q,a\n1,2\n3\n4,5,6\n", r"a\.csv, row 2: it has 1 cells, the header 2; .*\(2 of 3 rows are bad\.\)"),
        ("a.csv", "q,a\n1,2,3\n", "row 1: it has 3 cells, the header 2"),
        ("a.csv", "", r"a\.csv is empty; its first line names the columns"),
        ("a.csv", "q,q\n1,2\n", 'two columns named "q"'),
        ("a.csv", 'q,a\n"open,2\n3,4\n', r"a\.csv, line 3: unexpected end of data"),
        ("a.jsonl", '{"q": 1}\n{"q": \n[1]\n', r"row 2: it is not JSON: .*\(2 of 3 rows are bad\.\)"),
        ("a.jsonl", "[1]\n", "row 1: it is of type list; a line of jsonl is an object"),
        ("a.jsonl", '{"q": ' + "9" * 5000 + "}\n", "row 1: it is not JSON"),
        ("a.jsonl", "[" * 100_000, "row 1: it is not JSON"),
        ("a.json", '{"data": []}', "holds one value of type dict; a .json file is a list of objects"),
        ("a.json", "[{}, 3]", "row 2: it is of type int"),
        ("a.json", '{"q": 1}\n{"q": 2}', "A file with one object per line is named .jsonl"),
        ("a.txt", "q", r"has an unknown format; allowed are .jsonl, .json, .csv, .tsv, .parquet"),
        ("a.parquet", "q", "cannot be read as parquet"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_rows(write(tmp_path / name, text))


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'a\.csv" is not UTF-8 \(byte 2\)'):
        read_rows(write(tmp_path / "a.csv", "q\né\n", encoding="latin-1"))


@pytest.mark.parametrize(
    "data", [b"not gzip", gzip.compress(b"q\n1\n" * 99, mtime=0)[:-9]], ids=["not gzip", "cut short"]
)
def test_a_broken_gz_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.csv.gz").write_bytes(data)
    with pytest.raises(DataError, match=r'a\.csv\.gz" cannot be read'):
        read_rows(str(tmp_path / "a.csv.gz"))


def test_a_missing_file_is_told_its_nearest_names(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "")
    with pytest.raises(DataError, match=r"did you mean train\.jsonl\?"):
        read_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match=r"that folder holds train\.jsonl"):
        read_rows(str(tmp_path / "zzz.csv"))
    with pytest.raises(DataError, match=r"its folder .* does not exist either"):
        read_rows(str(tmp_path / "no" / "a.csv"))


def test_a_folder_is_no_file_and_says_what_it_holds(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "")
    with pytest.raises(DataError, match=r"is a folder; give one file of it. It holds train\.jsonl"):
        read_rows(str(tmp_path))


def test_a_relative_path_with_a_known_ending_is_never_asked_of_the_hub() -> None:
    with pytest.raises(DataError, match=r'there is no file "nowhere/train\.csv"'):
        read_rows("nowhere/train.csv")


def test_split_and_config_of_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leave out split and config, which are for Hub data sets"):
        read_rows(write(tmp_path / "a.csv", "q\n1\n"), split="train")


def test_a_split_of_a_folder_is_its_file_plain_or_zipped(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl.gz", '{"q": 1}')
    assert find_file(tmp_path, "test.jsonl").name == "test.jsonl.gz"
    assert read_split(str(tmp_path), "test", file="test.jsonl", config="ignored") == [{"q": 1}]
    with pytest.raises(DataError, match=r"holds no train\.jsonl or train\.jsonl\.gz; it holds test\.jsonl\.gz\."):
        read_split(str(tmp_path), "train", file="train.jsonl")
    with pytest.raises(DataError, match=r"is a file; give the folder that holds test\.jsonl"):
        read_split(str(tmp_path / "test.jsonl.gz"), "test", file="test.jsonl")


# The Hub, played by a function: what is ours is what we ask of it and what we make of its answers.


class FakeHub:
    def __init__(self, answer: Any) -> None:
        self.answer, self.asked = answer, []  # type: Any, list[tuple[Any, ...]]

    def __call__(self, hub_id: str, config: str | None, *, split: str | None, revision: str | None = None) -> Any:
        self.asked.append((hub_id, config, split, revision))
        answer = self.answer(revision) if callable(self.answer) else self.answer
        if isinstance(answer, Exception):
            raise answer
        return answer


def hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> FakeHub:
    fake = FakeHub(answer)
    monkeypatch.setattr(datasets, "load_dataset", fake)
    return fake


TABLE = datasets.Dataset.from_dict({"q": ["x"], "big": ["y"]})


def test_a_hub_id_is_loaded_with_its_config_split_and_needed_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = hub(monkeypatch, TABLE)
    assert read_rows("me/qa", split="train", config="main", columns=["q"]) == [{"q": "x"}]
    assert fake.asked == [("me/qa", "main", "train", None)]


def test_hub_data_of_one_split_needs_no_split(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, datasets.DatasetDict({"train": TABLE}))
    assert read_rows("me/qa") == [{"q": "x", "big": "y"}]


def test_hub_data_of_several_splits_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, datasets.DatasetDict({"train": TABLE, "test": TABLE}))
    with pytest.raises(DataError, match=r'"me/qa" has the splits train, test; name one'):
        read_rows("me/qa")


def test_a_script_on_the_hub_is_not_run_but_read_from_its_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    script = RuntimeError("Dataset scripts are no longer supported, but found qa.py")
    fake = hub(monkeypatch, lambda revision: TABLE if revision else script)
    assert read_rows("me/qa", split="train", columns=["q"]) == [{"q": "x"}]
    assert fake.asked[-1] == ("me/qa", None, "train", "refs/convert/parquet")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ConnectionError("Couldn't reach 'me/qa'"),
            "the Hub cannot be reached .* file or folder as path, e.g. --data",
        ),
        (datasets.exceptions.DatasetNotFoundError("It doesn't exist."), "no data set of that name on the Hub"),
        (ValueError("Unknown split"), "cannot be loaded with config=None, split='trian': Unknown split"),
    ],
)
def test_what_the_hub_refuses_says_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    hub(monkeypatch, error)
    with pytest.raises(DataError, match=said):
        read_rows("me/qa", split="trian")
