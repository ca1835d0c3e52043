"""Retrieval: passages for a query, from a file of them."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from cotune.programs.faults import raised, shown


class Retriever(Protocol):
    """Finds passages. Must give the same passages for the same query, or a resumed run is another run."""

    def __call__(self, query: str, k: int) -> Sequence[str]:
        """At most k passages, the best first."""
        ...


class RetrieverError(RuntimeError):
    """A retriever raised, or gave something else than passages. Ends a rollout as the retriever's fault."""


def retrieve(retriever: Retriever, query: str, k: int) -> list[str]:
    """The retriever's passages, looked at. Programs call this, and not the retriever, so that its faults are counted as
    its own and not as the program's.

    Raises:
        RetrieverError: it raised, gave something else than a sequence of texts, or more than k of them.
    """
    try:
        found = retriever(query, k=k)
    except (MemoryError, KeyboardInterrupt):
        raise
    except (Exception, SystemExit) as error:  # the user's code: recorded, counted and shown
        raise RetrieverError(f"the retriever raised {raised(error)}") from error
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise RetrieverError(f"the retriever returned {shown(found)}, which is not a sequence of passages")
    wrong = [passage for passage in found if not isinstance(passage, str)]
    if wrong:
        raise RetrieverError(f"the retriever returned a passage that is no text: {shown(wrong[0])}")
    if len(found) > k:
        raise RetrieverError(f"the retriever returned {len(found)} passages, at most {k} were asked for")
    return list(found)


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
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    passages.append(_passage(line, f"{path}, line {number}"))
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f'passage file "{path}" cannot be read as UTF-8 text: {error}.') from error
    if not passages:
        raise ValueError(f'passage file "{path}" holds no passages; it needs one JSON object a line.')
    return passages


def _passage(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: it is not JSON: {error}.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: it is of type {type(row).__name__}; a passage is an object.")
    title, text, sentences = row.get("title") or "", row.get("text") or "", row.get("sentences") or []
    if not (isinstance(sentences, list) and all(isinstance(part, str) for part in (title, text, *sentences))):
        raise ValueError(f'{where}: "title" and "text" are texts, and "sentences" a list of texts.')
    text = text or " ".join(sentence.strip() for sentence in sentences)
    if not text:
        raise ValueError(f'{where}: a passage needs "text" or "sentences"; it has {sorted(row)}.')
    return f"{title} | {text}" if title else text
