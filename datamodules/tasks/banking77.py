"""Banking77: what a bank's customer wants, from one query (Casanueva et al. 2020, CC BY 4.0)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cotune.datamodules.files import DataError, read_split
from cotune.datamodules.rows import examples_from_rows
from cotune.datamodules.splits import Duplicates, Sizes, Splits, split
from cotune.datamodules.traces import TraceDataModule
from cotune.programs import Example, Metric, exact_match

# Not a task of the paper. The ten most frequent intents have 1,769 queries to train on and 400 to test.
SIZES = Sizes(train=500, dev=250, val=250, test=400)

_log = logging.getLogger(__name__)


class Banking77(TraceDataModule):
    """query -> answer, an intent in words ("card payment fee charged"). The test set is the official one.

    Queries that the official files repeat are taken once, and those of test never for training.

    Args:
        path: Hub id, or a folder with the official train.csv and test.csv (columns text and category).
        intents: how many intents to keep, the most frequent of train first; null keeps all 77.
        stratify: label whose values are balanced over the sets; null for sets at random.
        sizes, metric, duplicates, kwargs: see `TraceDataModule`.
    """

    def __init__(
        self,
        path: str = "PolyAI/banking77",
        intents: int | None = 10,
        stratify: str | None = "answer",
        *,
        sizes: Sizes = SIZES,
        metric: Metric = exact_match,
        duplicates: Duplicates = "keep",
        **kwargs: Any,
    ) -> None:
        super().__init__(sizes=sizes, metric=metric, duplicates=duplicates, **kwargs)
        self.path, self.intents, self.stratify = path, intents, stratify

    def load(self) -> Splits:
        test = distinct(banking77_examples(self.path, "test"))
        train = distinct(banking77_examples(self.path, "train"), apart_from=test)
        kept = frequent_intents(train, self.intents)
        train, test = ([e for e in part if e.labels["answer"] in kept] for part in (train, test))
        return split(train, self.sizes, seed=self.seed, duplicates=self.duplicates, stratify=self.stratify, test=test)


def banking77_examples(path: str, part: str) -> list[Example]:
    """The queries of one part, "train" or "test", white space around them removed.

    Raises:
        DataError: the data is not there or not of its format.
    """
    # The Hub's data set was a script; `read_rows` falls back to the Hub's parquet conversion where it still is.
    # There the intent is a class index, column "label"; `read_rows` gives its name.
    intent = "category" if Path(path).expanduser().is_dir() else "label"
    rows = read_split(path, part, file=f"{part}.csv", columns=["text", intent])
    where = f"{path} ({part})"
    raw = examples_from_rows(rows, inputs={"query": "text"}, labels={"answer": intent}, where=where)
    return [
        Example.of({"query": str(e.inputs["query"]).strip()}, {"answer": str(e.labels["answer"]).replace("_", " ")})
        for e in raw
    ]


def distinct(examples: Sequence[Example], *, apart_from: Sequence[Example] = ()) -> list[Example]:
    """The examples without repetitions and without those of another set; how many go is logged.

    The official files repeat a handful of queries that differ in white space only, six of them across train and test.
    """
    taken = {e.id for e in apart_from}
    kept = {e.id: e for e in examples if e.id not in taken}
    if len(kept) < len(examples):
        _log.info("banking77: left out %d of %d queries as repetitions", len(examples) - len(kept), len(examples))
    return list(kept.values())


def frequent_intents(examples: Sequence[Example], count: int | None) -> list[str]:
    """The `count` most frequent intents, ties by name; all for None.

    Raises:
        DataError: there are not that many, or count is below 1.
    """
    found = Counter(str(e.labels["answer"]) for e in examples)
    if count is not None and not 1 <= count <= len(found):
        raise DataError(f"intents is {count}; train has {len(found)} intents, so 1 to {len(found)}, or null for all.")
    return sorted(found, key=lambda intent: (-found[intent], intent))[:count]
