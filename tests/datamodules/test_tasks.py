"""The data modules of the tasks, on small files in the official formats.

Where COTUNE_DATA names a folder with gsm8k/, hotpotqa/ and banking77/, also on the real data.
"""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from cotune.datamodules.files import DataError
from cotune.datamodules.splits import NAMES, Sizes, Splits
from cotune.datamodules.table import Table
from cotune.datamodules.tasks.banking77 import Banking77, banking77_examples, frequent_intents
from cotune.datamodules.tasks.gsm8k import GSM8K, gold_number, gsm8k_examples
from cotune.datamodules.tasks.hotpotqa import HotPotQA, hotpotqa_examples
from cotune.datamodules.tasks.iris import Iris, iris_examples
from cotune.programs import exact_match, first_line_number


def sizes_of(splits: Splits) -> list[int]:
    return [len(getattr(splits, name)) for name in NAMES]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


# Iris


def test_iris_is_150_flowers_fifty_of_each_species() -> None:
    examples = iris_examples()
    assert Counter(e.labels["answer"] for e in examples) == {"setosa": 50, "versicolor": 50, "virginica": 50}
    assert (examples[0].id, examples[149].id) == ("iris-000", "iris-149")
    assert dict(examples[0].inputs) == {
        "petal_length": "1.4",
        "petal_width": "0.2",
        "sepal_length": "5.1",
        "sepal_width": "3.5",
    }


def test_two_equal_flowers_keep_two_ids() -> None:
    examples = iris_examples()
    assert examples[101].inputs == examples[142].inputs
    assert len({e.id for e in examples}) == 150


def test_iris_uses_all_rows_by_default_and_each_set_has_every_species() -> None:
    splits = Iris(seed=0).load()
    assert sizes_of(splits) == [50, 20, 30, 50]
    for name in NAMES:
        counts = Counter(e.labels["answer"] for e in getattr(splits, name)).values()
        assert len(counts) == 3
        assert max(counts) - min(counts) <= 1


# Your own table


def test_a_table_is_split_as_its_sizes_say(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "qa.jsonl", [{"Q": f"q{n}", "A": "yes" if n % 2 else "no"} for n in range(20)])
    data = Table(
        str(tmp_path / "qa.jsonl"),
        inputs={"question": "Q"},
        labels={"answer": "A"},
        stratify="answer",
        sizes=Sizes(8, 4, 4, 4),
        seed=1,
    )
    splits = data.load()
    assert sizes_of(splits) == [8, 4, 4, 4]
    assert Counter(e.labels["answer"] for e in splits.train) == {"yes": 4, "no": 4}
    assert data.load() == splits


def test_a_table_may_have_its_own_test_file(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("question,answer\n" + "".join(f"q{n},a\n" for n in range(9)))
    (tmp_path / "test.csv").write_text("question,answer\n" + "".join(f"t{n},a\n" for n in range(5)))
    data = Table(
        str(tmp_path / "train.csv"),
        ["question"],
        ["answer"],
        test_path=str(tmp_path / "test.csv"),
        sizes=Sizes(5, 2, 2, 5),
        seed=0,
    )
    assert all(str(e.inputs["question"]).startswith("t") for e in data.load().test)


def test_a_table_of_the_hub_takes_train_and_test_from_its_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(hub_id: str, config: str | None, split: str) -> datasets.Dataset:
        rows = {"q": [f"{split}{n}" for n in range(4)], "a": ["x"] * 4, "id": list(range(4)), "image": [b""] * 4}
        return datasets.Dataset.from_dict(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = Table("me/qa", ["q"], ["a"], split="train", test_split="validation", sizes=Sizes(2, 1, 1, 4), seed=0)
    splits = data.load()
    assert sizes_of(splits) == [2, 1, 1, 4]
    assert {str(e.inputs["q"])[:-1] for e in splits.test} == {"validation"}


def test_a_table_of_the_hub_may_be_tested_on_a_file_and_only_the_hub_has_a_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def load(hub_id: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((hub_id, config, split))
        return datasets.Dataset.from_dict({"q": [f"h{n}" for n in range(4)], "a": ["x"] * 4})

    monkeypatch.setattr(datasets, "load_dataset", load)
    file = tmp_path / "test.csv"
    file.write_text("q,a\nt0,x\nt1,x\n")
    given = {"inputs": ["q"], "labels": ["a"], "config": "main", "sizes": Sizes(2, 1, 1, 2), "seed": 0}
    splits = Table("me/qa", split="train", test_path=str(file), **given).load()
    assert {e.inputs["q"] for e in splits.test} == {"t0", "t1"}
    assert asked == [("me/qa", "main", "train")]
    with pytest.raises(DataError, match="is a file; leave out split and config"):
        Table(str(file), test_path=str(file), **given).load()


def test_a_row_given_twice_in_a_table_is_refused_by_its_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("q,a\n1,2\n3,4\n1,2\n")
    with pytest.raises(ValueError, match=r"a\.csv, rows 1 and 3 are equal \(1 row is such"):
        Table(str(tmp_path / "a.csv"), ["q"], ["a"], sizes=Sizes(1, 1, 1, 0), seed=0).load()


# GSM8K


@pytest.mark.parametrize(
    ("solution", "number"),
    [("6 eggs.\n#### 6", "6"), ("#### 1,234,567", "1234567"), ("#### -3", "-3"), ("#### 4\n#### 2.5 ", "2.5")],
)
def test_the_gold_number_stands_behind_the_last_mark(solution: str, number: str) -> None:
    assert gold_number(solution) == number


@pytest.mark.parametrize("solution", ["It is 6.", "####", "#### six", "#### ,", "#### 1 or 2"])
def test_a_solution_without_a_gold_number_is_an_error(solution: str) -> None:
    with pytest.raises(ValueError, match='no number after "####"'):
        gold_number(solution)


def gsm8k_folder(folder: Path, train: int = 8, test: int = 4) -> str:
    for part, count, ending in (("train", train, ".gz"), ("test", test, "")):
        rows = [{"question": f"{part} {n}?", "answer": f"So <<{n}>>{n}.\n#### 1,00{n}"} for n in range(count)]
        write_jsonl(folder / f"{part}.jsonl{ending}", rows)
    return str(folder)


def test_gsm8k_reads_the_official_files(tmp_path: Path) -> None:
    path = gsm8k_folder(tmp_path)
    first = gsm8k_examples(path, "train")[0]
    assert (first.inputs, first.labels) == ({"question": "train 0?"}, {"answer": "1000"})
    data = GSM8K(path, sizes=Sizes(4, 2, 2, 4), seed=0)
    splits = data.load()
    assert sizes_of(splits) == [4, 2, 2, 4]
    assert all(str(e.inputs["question"]).startswith("test") for e in splits.test)
    assert data.metric is first_line_number
    assert float(data.metric(splits.test[0], {"answer": f"It is {splits.test[0].labels['answer']}."})) == 1.0


def test_gsm8k_names_the_first_bad_solution_and_counts_them(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": answer} for answer in ("#### 1", "none", "#### 2", "none")]
    write_jsonl(tmp_path / "train.jsonl", rows)
    with pytest.raises(DataError, match=r"\(train\), row 2: the answer has no number .*\(2 of 4 rows are bad\.\)"):
        gsm8k_examples(str(tmp_path), "train")


# HotPotQA


def hotpot_rows(count: int, *, hard_every: int = 1) -> list[dict[str, Any]]:
    return [
        {
            "id": f"h{n}",
            "question": f"q{n}?",
            "answer": f"a{n}",
            "type": "bridge",
            "level": "easy" if n % hard_every else "hard",
            "supporting_facts": None,
        }
        for n in range(count)
    ]


def hotpot_folder(folder: Path, splits: Any = None, **options: Any) -> str:
    write_jsonl(folder / "questions.jsonl.gz", hotpot_rows(20, **options))
    if splits is not None:
        (folder / "splits.json").write_text(json.dumps(splits))
    return str(folder)


def names(start: int, stop: int) -> list[str]:
    return [f"h{n}" for n in range(start, stop)]


def test_hotpotqa_without_fixed_splits_is_cut_by_the_sizes(tmp_path: Path) -> None:
    splits = HotPotQA(hotpot_folder(tmp_path), sizes=Sizes(8, 4, 4, 4), seed=0).load()
    assert sizes_of(splits) == [8, 4, 4, 4]
    assert set(splits.train[0].inputs) == {"question"}


def test_hotpotqa_keeps_fixed_splits_and_cuts_dev_out_of_train(tmp_path: Path) -> None:
    path = hotpot_folder(tmp_path, {"train": names(0, 10), "val": names(10, 14), "test": names(14, 19)})
    splits = HotPotQA(path, sizes=Sizes(7, 3, 4, 5), seed=0).load()
    assert {e.id for e in (*splits.train, *splits.dev)} == set(names(0, 10))
    assert {e.id for e in splits.val} == set(names(10, 14))
    assert {e.id for e in splits.test} == set(names(14, 19))


def test_hotpotqa_keeps_questions_of_its_level_only(tmp_path: Path) -> None:
    path = hotpot_folder(tmp_path, hard_every=2)
    assert len(hotpotqa_examples(path)["train"]) == 10
    assert len(hotpotqa_examples(path, level=None)["train"]) == 20
    with pytest.raises(DataError, match='no question is of level "medium"; there are easy, hard'):
        hotpotqa_examples(path, level="medium")


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        ({"train": names(0, 5), "val": [], "test": ["x1", "x2"]}, r'test names "x1", .*\(2 of 2 ids are unknown\)'),
        ({"train": names(0, 5), "test": []}, "should hold three lists of ids"),
        ({"train": [1], "val": [], "test": []}, "should hold three lists of ids"),
        ([], "should hold three lists of ids"),
    ],
)
def test_hotpotqa_refuses_broken_fixed_splits(tmp_path: Path, splits: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        hotpotqa_examples(hotpot_folder(tmp_path, splits))


def test_hotpotqa_refuses_fixed_splits_that_overlap(tmp_path: Path) -> None:
    path = hotpot_folder(tmp_path, {"train": names(0, 10), "val": names(9, 12), "test": []})
    with pytest.raises(ValueError, match='"h9" is in train and in val'):
        HotPotQA(path, sizes=Sizes(1, 0, 1, 0), seed=0).load()


def test_hotpotqa_refuses_a_question_given_twice(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "questions.jsonl", [*hotpot_rows(3), *hotpot_rows(1)])
    with pytest.raises(ValueError, match=r'rows 1 and 4 of .* have the same id "h0"'):
        hotpotqa_examples(str(tmp_path))


def test_hotpotqa_of_the_hub_tests_on_the_official_validation_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(hub_id: str, config: str, split: str) -> datasets.Dataset:
        assert (hub_id, config) == ("hotpotqa/hotpot_qa", "distractor")
        return datasets.Dataset.from_list(
            [{**row, "id": f"{split}-{row['id']}", "question": f"{split} {row['id']}?"} for row in hotpot_rows(6)]
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    splits = HotPotQA(sizes=Sizes(2, 2, 2, 6), seed=0).load()
    assert {e.id.split("-")[0] for e in splits.test} == {"validation"}
    assert {e.id.split("-")[0] for e in (*splits.train, *splits.dev, *splits.val)} == {"train"}


# Banking77


def banking_folder(folder: Path) -> str:
    kinds = {"card_arrival": 6, "Refund_not_showing_up": 4, "exchange_rate": 4, "age_limit": 2}
    for part in ("train", "test"):
        lines = [f'"\n{part}, {kind} {n}",{kind}\n' for kind, count in kinds.items() for n in range(count)]
        (folder / f"{part}.csv").write_text("text,category\n" + "".join(lines))
    return str(folder)


def test_banking77_answers_are_intents_in_words(tmp_path: Path) -> None:
    first = banking77_examples(banking_folder(tmp_path), "train")[0]
    assert (first.inputs, first.labels) == ({"query": "train, card_arrival 0"}, {"answer": "card arrival"})


def test_banking77_keeps_the_most_frequent_intents_of_train_ties_by_name(tmp_path: Path) -> None:
    train = banking77_examples(banking_folder(tmp_path), "train")
    assert frequent_intents(train, 2) == ["card arrival", "Refund not showing up"]
    assert frequent_intents(train, 2) == frequent_intents(train[::-1], 2)
    assert len(frequent_intents(train, None)) == 4
    for count in (0, 5):
        with pytest.raises(DataError, match="1 to 4, or null for all"):
            frequent_intents(train, count)


def test_banking77_sets_are_balanced_and_hold_the_kept_intents_only(tmp_path: Path) -> None:
    data = Banking77(banking_folder(tmp_path), intents=2, sizes=Sizes(5, 5, 0, 5), seed=0)
    splits = data.load()
    assert data.metric is exact_match
    assert Counter(e.labels["answer"] for e in splits.train) == {"card arrival": 3, "Refund not showing up": 2}
    assert {e.labels["answer"] for e in splits.test} == {"card arrival", "Refund not showing up"}


def test_banking77_takes_a_repeated_query_once_and_one_of_test_never_for_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "train.csv").write_text("text,category\na,x\n a,x\nb,x\nc,x\n")
    (tmp_path / "test.csv").write_text("text,category\nb ,x\nd,x\nd ,x\n")
    with caplog.at_level("INFO"):
        splits = Banking77(str(tmp_path), intents=None, sizes=Sizes(2, 0, 0, 2), seed=0).load()
    assert sorted(str(e.inputs["query"]) for e in splits.train) == ["a", "c"]
    assert sorted(str(e.inputs["query"]) for e in splits.test) == ["b", "d"]
    assert [record.message for record in caplog.records] == [
        "banking77: left out 1 of 3 queries as repetitions",
        "banking77: left out 2 of 4 queries as repetitions",
    ]


def test_banking77_of_the_hub_and_of_the_files_are_the_same_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = banking77_examples(banking_folder(tmp_path), "train")
    intents = sorted({str(e.labels["answer"]).replace(" ", "_") for e in local})
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=intents)})
    rows = [
        {"text": e.inputs["query"], "label": intents.index(str(e.labels["answer"]).replace(" ", "_"))} for e in local
    ]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows, features=features))
    assert banking77_examples("PolyAI/banking77", "train") == local


# The real data

REAL = os.environ.get("COTUNE_DATA", "")
with_real_data = pytest.mark.skipif(not REAL, reason="COTUNE_DATA names no folder with gsm8k/, hotpotqa/, banking77/")


@with_real_data
def test_the_real_gsm8k_fills_the_default_sizes() -> None:
    data = GSM8K(f"{REAL}/gsm8k", seed=0)
    assert len(gsm8k_examples(data.path, "train")) == 7473
    splits = data.load()
    assert sizes_of(splits) == [1000, 250, 250, 1319]
    assert all(float(first_line_number(e, e.labels)) == 1.0 for e in splits.test)


@with_real_data
def test_the_real_hotpotqa_keeps_its_fixed_splits() -> None:
    path = f"{REAL}/hotpotqa"
    fixed = json.loads(Path(path, "splits.json").read_text())
    pools = hotpotqa_examples(path, level=None)
    assert {part: [e.id for e in pool] for part, pool in pools.items()} == fixed
    splits = HotPotQA(path, sizes=Sizes(500, 200, 140, 400), seed=0).load()
    assert {e.id for e in (*splits.train, *splits.dev)} <= set(fixed["train"])
    assert {e.id for e in splits.test} <= set(fixed["test"])


@with_real_data
def test_the_real_banking77_fills_the_default_sizes() -> None:
    path = f"{REAL}/banking77"
    splits = Banking77(path, seed=0).load()
    assert sizes_of(splits) == [500, 250, 250, 400]
    assert set(Counter(e.labels["answer"] for e in splits.test).values()) == {40}
    assert "card payment fee charged" in frequent_intents(banking77_examples(path, "train"), 10)
    assert sizes_of(Banking77(path, intents=None, sizes=Sizes(8993, 500, 500, 3079), seed=0).load())[0] == 8993
