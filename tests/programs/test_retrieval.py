"""BM25 over a passage file."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cotune.programs import BM25, Dense, RetrieverError, SentenceEncoder, retrieve

PASSAGES = [
    {"title": "Paris", "text": "Paris is the capital of France."},
    {"title": "Rome", "sentences": ["Rome is the capital ", " of Italy."]},
    {"text": "The otter lives in rivers."},
]


@pytest.fixture
def passages(tmp_path: Path) -> str:
    path = tmp_path / "passages.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in PASSAGES), encoding="utf-8")
    return str(path)


def test_the_best_passage_comes_first_with_its_title(passages: str) -> None:
    assert BM25(passages)("capital of Italy", k=2) == [
        "Rome | Rome is the capital of Italy.",
        "Paris | Paris is the capital of France.",
    ]


def test_k_bounds_the_passages_and_may_exceed_them(passages: str) -> None:
    bm25 = BM25(passages)
    assert len(bm25("capital", k=1)) == 1
    assert len(bm25("capital", k=100)) == 2  # the otter's passage does not hold the word


@pytest.mark.parametrize("query", ["", "the of is", "zzzz", "?!"])
def test_a_query_that_matches_nothing_finds_nothing(passages: str, query: str) -> None:
    assert list(BM25(passages)(query, k=3)) == []


def test_the_same_query_finds_the_same(passages: str) -> None:
    assert BM25(passages)("rivers of France", k=3) == BM25(passages)("rivers of France", k=3)


def test_a_gzipped_file_reads_alike(passages: str, tmp_path: Path) -> None:
    packed = tmp_path / "passages.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(passages).read_bytes()))
    assert BM25(str(packed))("otter", k=3) == BM25(passages)("otter", k=3) == ["The otter lives in rivers."]


def test_a_missing_file_and_an_empty_passage_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        BM25(str(tmp_path / "nowhere.jsonl"))("x", k=1)
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n{"title": "no text"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2: .*\['title'\]"):
        BM25(str(path))("x", k=1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", r"line 1: it is not JSON"),
        (b"[1]", r"line 1: it is of type list; a passage is an object"),
        (b'{"text": 5}', r'line 1: "title" and "text" are texts'),
        (b'{"sentences": "one"}', r'line 1: "title" and "text" are texts, and "sentences" a list of texts'),
        (b"\xff", r"cannot be read as UTF-8 text"),
        (b"\n\n", r"holds no passages"),
    ],
)
def test_a_bad_passage_file_is_named_with_its_line(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.jsonl.*{said}"):
        BM25(str(path))("x", k=1)


def test_a_passage_that_stands_twice_in_the_file_is_found_once(passages: str) -> None:
    with open(passages, "a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(PASSAGES[2]))
    assert BM25(passages)("otter", k=3) == ["The otter lives in rivers."]


# Dense retrieval


class Letters:
    """An encoder whose vectors are counts of letters; queries and passages are told apart by what it was asked."""

    def __init__(self, name: str = "letters") -> None:
        self.name, self.asked = name, list[tuple[str, int]]()

    def __call__(self, texts: Sequence[str], kind: str) -> Any:
        self.asked.append((kind, len(texts)))
        return [[text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts]

    def __repr__(self) -> str:
        return f"Letters({self.name})"


def test_dense_retrieval_finds_the_nearest_passages_in_order(passages: str) -> None:
    dense = Dense(passages, Letters())
    assert dense("The otter lives in rivers.", k=1) == ["The otter lives in rivers."]
    assert len(dense("capital of Italy", k=9)) == 3
    assert dense("rivers", k=2) == dense("rivers", k=2) == dense("rivers rivers", k=2)  # length does not count


def test_it_can_stand_where_bm25_stands(passages: str) -> None:
    assert retrieve(Dense(passages, Letters()), "otter", 2) == list(Dense(passages, Letters())("otter", k=2))


def test_equal_passages_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("abc", "cab", "bca", "zzz")))
    assert Dense(str(path), Letters())("abc", k=3) == ["abc", "cab", "bca"]


def test_passages_are_encoded_once_and_vectors_kept_for_the_next_run(passages: str, tmp_path: Path) -> None:
    vectors = str(tmp_path / "vectors.npy")
    first, second = Letters(), Letters()
    found = [Dense(passages, encoder, vectors)("otter", k=2) for encoder in (first, second)]
    assert found[0] == found[1]
    assert (first.asked, second.asked) == ([("passage", 3), ("query", 1)], [("query", 1)])


@pytest.mark.parametrize("change", ["encoder", "passages", "cut", "key"])
def test_kept_vectors_of_something_else_are_made_anew(change: str, passages: str, tmp_path: Path) -> None:
    vectors = tmp_path / "vectors.npy"
    Dense(passages, Letters(), str(vectors))("otter", k=1)
    if change == "passages":
        Path(passages).write_text('{"text": "Another."}')
    if change == "cut":
        vectors.write_bytes(vectors.read_bytes()[:40])
    if change == "key":
        vectors.with_name("vectors.npy.key").unlink()
    again = Letters("other" if change == "encoder" else "letters")
    Dense(passages, again, str(vectors))("otter", k=1)
    assert again.asked[0][0] == "passage"


@pytest.mark.parametrize("vectors", [[1.0, 2.0], [[1.0], [2.0]], [[float("nan")]]])
def test_an_encoder_that_gives_something_else_is_the_retrievers_fault(vectors: Any, passages: str) -> None:
    with pytest.raises(RetrieverError, match=r"the encoder returned shape"):
        retrieve(Dense(passages, lambda texts, kind: vectors), "x", 1)


def test_without_the_library_the_error_says_what_to_install(passages: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"cotune\[dense\]"):
        Dense(passages)("x", k=1)


def test_the_library_is_given_each_kinds_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Model:
        def __init__(self, name: str, device: str | None) -> None:
            seen.append((name, device))

        def encode(self, texts: list[str], show_progress_bar: bool) -> Any:
            seen.append(texts)
            return [[1.0]] * len(texts)

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Model))
    encoder = SentenceEncoder("me/e5", "query: ", "passage: ", device="cpu")
    encoder(["a"], "query")
    encoder(["b", "c"], "passage")
    assert seen == [("me/e5", "cpu"), ["query: a"], ["passage: b", "passage: c"]]
    assert "me/e5" in repr(encoder)
