"""Retrieval: passages for a query, from a file of them, by their words (BM25) or by their meaning (Dense)."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from cotune.errors import BadValueError, CotuneError, MissingFileError, MissingPackageError
from cotune.programs.faults import quoted, raised


class Retriever(Protocol):
    """Finds passages. Must give the same passages for the same query, or a resumed run is another run."""

    def __call__(self, query: str, k: int) -> Sequence[str]:
        """At most k passages, the best first."""
        ...


class RetrieverError(CotuneError):
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
        raise RetrieverError(f"the retriever returned {quoted(found)}, which is not a sequence of passages")
    wrong = [passage for passage in found if not isinstance(passage, str)]
    if wrong:
        raise RetrieverError(f"the retriever returned a passage that is not text: {quoted(wrong[0])}")
    if len(found) > k:
        raise RetrieverError(f"the retriever returned {len(found)} passages, but at most {k} were requested")
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
        # bm25s calls jax where it is installed, and that takes three quarters of a GPU's memory unless told not to.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        try:
            import bm25s
        except ImportError as error:
            raise MissingPackageError('BM25 needs the bm25s library: pip install "cotune[retrieval]".') from error
        if not self.path.is_file():
            raise MissingFileError(f'passage file "{self.path}" does not exist; give a jsonl or jsonl.gz file.')
        self._passages = _read_passages(self.path)
        self._index = bm25s.BM25()
        self._index.index(bm25s.tokenize(self._passages, stopwords="en", show_progress=False), show_progress=False)


class Encoder(Protocol):
    """Texts as vectors, near each other where the texts are. Must give the same vectors for the same texts."""

    def __call__(self, texts: Sequence[str], kind: Literal["query", "passage"]) -> Any:
        """A row of numbers for each text (N, D); many models read queries and passages differently."""
        ...


class SentenceEncoder:
    """An encoder of the sentence-transformers library (`pip install "cotune[dense]"`), loaded at the first text.

    Args:
        model: Hub id or local folder.
        query_prefix, passage_prefix: what the model's card says stands before each ("query: " for the E5 family).
        device: null takes CUDA when there is one.
    """

    def __init__(
        self,
        model: str = "sentence-transformers/all-MiniLM-L6-v2",
        query_prefix: str = "",
        passage_prefix: str = "",
        device: str | None = None,
    ) -> None:
        self.name, self.device = model, device
        self.prefixes = {"query": query_prefix, "passage": passage_prefix}
        self._model: Any = None

    def __call__(self, texts: Sequence[str], kind: Literal["query", "passage"]) -> Any:
        if self._model is None:
            try:
                from sentence_transformers import SentenceTransformer
            except ImportError as error:
                raise MissingPackageError(
                    'SentenceEncoder needs the sentence-transformers library: pip install "cotune[dense]".'
                ) from error
            self._model = SentenceTransformer(self.name, device=self.device)
        return self._model.encode([self.prefixes[kind] + text for text in texts], show_progress_bar=False)

    def __repr__(self) -> str:
        return f"SentenceEncoder({self.name!r}, {self.prefixes!r})"


class Dense:
    """Passages nearest to a query by the cosine of their vectors, over the same passage files as BM25.

    The passages are encoded at the first query, and all are compared: for millions of passages use a vector database
    behind your own `Retriever`.

    Args:
        passages: jsonl file, as for BM25.
        encoder: texts -> vectors.
        vectors: .npy file that keeps the passages' vectors for the next run; made anew where passages or encoder (by
            its repr) are others. Null keeps none.
    """

    def __init__(self, passages: str, encoder: Encoder | None = None, vectors: str | None = None) -> None:
        self.path, self.encoder = Path(passages), encoder or SentenceEncoder()
        self.vectors = None if vectors is None else Path(vectors)
        self._passages: list[str] = []
        self._matrix: Any = None

    def __call__(self, query: str, k: int) -> Sequence[str]:
        import numpy as np

        if self._matrix is None:
            self._build()
        scores = self._matrix @ _unit_rows(self.encoder([query], "query"), 1)[0]
        # A stable sort: of equal passages the earlier comes first, on every machine.
        return [self._passages[i] for i in np.argsort(-scores, kind="stable")[:k]]

    def _build(self) -> None:
        if not self.path.is_file():
            raise MissingFileError(f'passage file "{self.path}" does not exist; give a jsonl or jsonl.gz file.')
        self._passages = _read_passages(self.path)
        key = hashlib.sha256("\0".join([repr(self.encoder), *self._passages]).encode()).hexdigest()
        kept = self._kept(key)
        if kept is None:
            kept = _unit_rows(self.encoder(self._passages, "passage"), len(self._passages))
            self._keep(kept, key)
        self._matrix = kept

    def _kept(self, key: str) -> Any:
        import numpy as np

        if self.vectors is None or not self.vectors.is_file() or not self._key_path.is_file():
            return None
        if self._key_path.read_text(encoding="utf-8") != key:
            return None
        try:
            return np.load(self.vectors, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None  # cut short by a kill: it is made again

    def _keep(self, matrix: Any, key: str) -> None:
        import numpy as np

        if self.vectors is not None:
            self._key_path.unlink(missing_ok=True)  # the key comes last: it vouches for the whole file
            with self.vectors.open("wb") as file:
                np.save(file, matrix, allow_pickle=False)
            self._key_path.write_text(key, encoding="utf-8")

    @property
    def _key_path(self) -> Path:
        assert self.vectors is not None
        return self.vectors.with_name(f"{self.vectors.name}.key")


def _unit_rows(vectors: Any, count: int) -> Any:
    """Rows of length 1 as float32; a row of zeros stays.

    Raises:
        ValueError: it is no matrix of `count` rows of finite numbers.
    """
    import numpy as np

    matrix = np.asarray(vectors, dtype=np.float32)
    if matrix.ndim != 2 or len(matrix) != count or not np.isfinite(matrix).all():
        raise BadValueError(
            f"the encoder returned shape {matrix.shape} for {count} texts; it must return one row of finite numbers "
            "per text."
        )
    return matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)


def _read_passages(path: Path) -> list[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    passages = []
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    passages.append(_passage(line, f"{path}, line {number}"))
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise BadValueError(f'passage file "{path}" cannot be read as UTF-8 text: {error}.') from error
    if not passages:
        raise BadValueError(f'passage file "{path}" holds no passages; it needs one JSON object per line.')
    return list(dict.fromkeys(passages))  # one that stands twice would take two of the k places


def _passage(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadValueError(f"{where}: it is not JSON: {error}.") from error
    if not isinstance(row, dict):
        raise BadValueError(f"{where}: it is of type {type(row).__name__}; a passage is an object.")
    title, text, sentences = row.get("title") or "", row.get("text") or "", row.get("sentences") or []
    if not (isinstance(sentences, list) and all(isinstance(part, str) for part in (title, text, *sentences))):
        raise BadValueError(f'{where}: "title" and "text" are texts, and "sentences" a list of texts.')
    text = text or " ".join(sentence.strip() for sentence in sentences)
    if not text:
        raise BadValueError(f'{where}: a passage needs "text" or "sentences"; it has {sorted(row)}.')
    return f"{title} | {text}" if title else text
