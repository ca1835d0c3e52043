"""BM25 over a passage file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from cotune.programs import BM25

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
