"""Retrieval: passages for a query, from a file of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class Retriever(Protocol):
    """Finds passages. Must give the same passages for the same query, or a resumed run is another run."""

    def __call__(self, query: str, k: int) -> Sequence[str]:
        """At most k passages, the best first."""
        ...


class BM25:
    """BM25 over a passage file: jsonl (optionally .gz) with a `title` and `text` or `sentences` a line.

    Uses the bm25s library (`pip install "cotune[retrieval]"`). The index is built at the first query.
    """

    def __init__(self, passages: str) -> None:
        self.path = Path(passages)
        self._index: Any = None
        self._passages: list[str] = []

    def __call__(self, query: str, k: int) -> Sequence[str]:
        if self._index is None:
            self._build()
        import bm25s

        tokens = bm25s.tokenize([query], stopwords="en", show_progress=False)
        if not any(len(ids) for ids in tokens.ids):
            return []  # nothing but stop words: no passage is better than another
        found, scores = self._index.retrieve(tokens, k=min(k, len(self._passages)), show_progress=False, n_threads=1)
        return [self._passages[i] for i, score in zip(found[0], scores[0], strict=True) if score > 0]

    def _build(self) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise ImportError('BM25 needs the bm25s library: pip install "cotune[retrieval]".') from error
        if not self.path.is_file():
            raise FileNotFoundError(f'passage file "{self.path}" does not exist; give a jsonl or jsonl.gz file.')
        self._passages = _read_passages(self.path)
        self._index = bm25s.BM25()
        self._index.index(bm25s.tokenize(self._passages, stopwords="en", show_progress=False), show_progress=False)


def _read_passages(path: Path) -> list[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    passages = []
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            text = row.get("text") or " ".join(s.strip() for s in row.get("sentences", []))
            if not text:
                raise ValueError(f'{path}, line {number}: a passage needs "text" or "sentences"; it has {sorted(row)}.')
            passages.append(f"{row['title']} | {text}" if row.get("title") else text)
    return passages
