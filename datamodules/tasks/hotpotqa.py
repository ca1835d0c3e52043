"""HotPotQA: questions whose answer needs two Wikipedia abstracts (Yang et al. 2018, CC BY-SA 4.0)."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence, Set
from itertools import combinations
from pathlib import Path
from typing import Any

from cotune.datamodules.files import DataError, find_file, read_rows, read_split
from cotune.datamodules.rows import examples_from_rows
from cotune.datamodules.splits import Duplicates, Sizes, Splits, row_by_id, split
from cotune.datamodules.traces import TraceDataModule
from cotune.programs import Example, Metric, exact_match

# The paper: 1000 train, 500 dev, 1500 test. Its dev both scores and chooses; here those are two sets of 250.
SIZES = Sizes(train=1000, dev=250, val=250, test=1500)
_PARTS = ("train", "val", "test")
_ON_HUB = {"train": "train", "test": "validation"}
_COLUMNS = ["id", "question", "answer", "level"]

_log = logging.getLogger(__name__)


class HotPotQA(TraceDataModule):
    """question -> answer, a few words. The passages belong to the program's retriever, not to the examples.

    Args:
        path: Hub id, or a folder with questions.jsonl (or .gz: objects with id, question, answer, level) and, if the
            sets are fixed, splits.json: {"train": [ids], "val": [ids], "test": [ids]}; dev is then cut out of train.
            On the Hub, where the official test set has no labels, test is drawn from the official "validation".
        level: keep questions of this level only ("easy", "medium", "hard"; the paper: "hard"); null keeps all.
        sizes, metric, duplicates, kwargs: see `TraceDataModule`.
    """

    def __init__(
        self,
        path: str = "hotpotqa/hotpot_qa",
        level: str | None = "hard",
        *,
        sizes: Sizes = SIZES,
        metric: Metric = exact_match,
        duplicates: Duplicates = "drop",
        **kwargs: Any,
    ) -> None:
        super().__init__(sizes=sizes, metric=metric, duplicates=duplicates, **kwargs)
        self.path, self.level = path, level

    def load(self) -> Splits:
        pools = hotpotqa_examples(self.path, level=self.level)
        return split(
            pools["train"],
            self.sizes,
            seed=self.seed,
            duplicates=self.duplicates,
            val=pools.get("val"),
            test=pools.get("test"),
        )


def hotpotqa_examples(path: str, *, level: str | None = "hard") -> dict[str, list[Example]]:
    """What each set is drawn from: "train", and those of "val" and "test" that the data keeps apart from it.

    Raises:
        DataError: the data is not there or not of its format, no question is of the level, or splits.json is wrong.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return {part: _of_level(_hub_rows(path, name), f"{path} ({name})", level) for part, name in _ON_HUB.items()}
    file = find_file(folder, "questions.jsonl")
    rows = read_rows(str(file))
    examples = _of_level(rows, str(file), level)
    fixed = folder / "splits.json"
    if not fixed.is_file():
        return {"train": examples}
    lists = _read_splits(fixed, known={str(row["id"]) for row in rows})
    by_id = {example.id: example for example in examples}
    return {part: [by_id[id_] for id_ in lists[part] if id_ in by_id] for part in _PARTS}


def _hub_rows(path: str, name: str) -> list[dict[str, Any]]:
    return read_split(path, name, file="questions.jsonl", config="distractor", columns=_COLUMNS)


def _of_level(rows: Sequence[Mapping[str, Any]], where: str, level: str | None) -> list[Example]:
    # All rows are checked, then filtered: a broken file should not look whole because of the level.
    examples = examples_from_rows(rows, inputs=["question"], labels=["answer"], id_field="id", where=where)
    row_by_id(examples, where)
    if level is None:
        return examples
    kept = [example for example, row in zip(examples, rows, strict=True) if row.get("level") == level]
    if not kept:
        there = ", ".join(sorted({str(row.get("level")) for row in rows}))
        raise DataError(f'{where}: no question is of level "{level}"; there are {there or "no rows"}, or null for all.')
    _log.info('%s: kept %d of %d questions, those of level "%s"', where, len(kept), len(rows), level)
    return kept


def _read_splits(path: Path, *, known: Set[str]) -> dict[str, list[str]]:
    """Reads and checks the fixed id lists."""
    try:
        lists = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # also what is not UTF-8
        raise DataError(f'"{path}" is not JSON: {error}.') from error
    if not isinstance(lists, dict) or sorted(lists) != sorted(_PARTS) or not all(map(_is_ids, lists.values())):
        raise DataError(f'"{path}" should hold three lists of ids (texts), named {", ".join(_PARTS)}, and no more.')
    for part, ids in lists.items():
        unknown = [id_ for id_ in ids if id_ not in known]
        if unknown:
            raise DataError(
                f'"{path}": {part} names "{unknown[0]}", which is no id in questions.jsonl '
                f"({len(unknown)} of {len(ids)} ids are unknown)."
            )
    for one, other in combinations(_PARTS, 2):
        if both := sorted(set(lists[one]) & set(lists[other])):
            raise DataError(
                f'"{path}": "{both[0]}" is in {one} and in {other} ({len(both)} ids are); the sets are disjoint.'
            )
    used = len(set().union(*lists.values()))
    _log.info("%s: %d of %d questions are in one of its lists", path, used, len(known))
    return lists


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(id_, str) for id_ in value)
