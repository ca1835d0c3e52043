"""Table: your own data, from a jsonl, json, csv, tsv or parquet file or from the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cotune.datamodules.files import read_rows
from cotune.datamodules.rows import Fields, columns_of, examples_from_rows
from cotune.datamodules.splits import Sizes, Splits, split
from cotune.datamodules.traces import TraceDataModule
from cotune.programs import Example, Metric, exact_match


class Table(TraceDataModule):
    """Rows of a file or of a Hub data set as examples; see `read_rows` and `examples_from_rows` for what is allowed.

    Args:
        path: a file, or a Hub id (owner/name).
        inputs: columns that the program reads, as a list or as program field -> column.
        labels: columns that the metric compares with, likewise.
        test_path: where the test set comes from; without it (and without test_split) it is cut out of `path`.
        id_field: column of unique ids; without it ids are made from the contents.
        config: configuration of a Hub data set, be it `path`, `test_path` or both.
        split: its split for train, dev and val.
        test_split: its split for test, of `test_path` or else of `path`.
        stratify: label whose values are balanced over the sets.
        sizes, metric, kwargs: see `TraceDataModule`.
    """

    def __init__(
        self,
        path: str,
        inputs: list[str] | dict[str, str],
        labels: list[str] | dict[str, str],
        test_path: str | None = None,
        id_field: str | None = None,
        config: str | None = None,
        split: str | None = None,
        test_split: str | None = None,
        stratify: str | None = None,
        *,
        sizes: Sizes,
        metric: Metric = exact_match,
        **kwargs: Any,
    ) -> None:
        super().__init__(sizes=sizes, metric=metric, **kwargs)
        self.path, self.test_path = path, test_path
        self.inputs, self.labels, self.id_field = inputs, labels, id_field
        self.config, self.split, self.test_split = config, split, test_split
        self.stratify = stratify

    def load(self) -> Splits:
        test = None
        if self.test_path is not None or self.test_split is not None:
            test = self._read(self.test_path or self.path, self.test_split)
        examples = self._read(self.path, self.split)
        return split(
            examples,
            self.sizes,
            seed=self.seed,
            stratify=self.stratify,
            test=test,
            duplicates=self.duplicates,
            where=self.path,
        )

    def _read(self, path: str, part: str | None) -> list[Example]:
        files = [Path(one).expanduser().exists() for one in (self.path, self.test_path) if one is not None]
        of_the_other = not all(files) and Path(path).expanduser().exists()
        return table_examples(
            path,
            inputs=self.inputs,
            labels=self.labels,
            id_field=self.id_field,
            config=None if of_the_other else self.config,
            split=part,
        )


def table_examples(
    path: str,
    *,
    inputs: Fields,
    labels: Fields,
    id_field: str | None = None,
    config: str | None = None,
    split: str | None = None,
) -> list[Example]:
    """The rows of a file or Hub data set as examples.

    Raises:
        DataError: see `read_rows` and `examples_from_rows`.
    """
    needed = [*columns_of(inputs, "inputs").values(), *columns_of(labels, "labels").values()]
    needed += [id_field] if id_field is not None else []
    rows = read_rows(path, split=split, config=config, columns=needed)
    where = path if split is None else f"{path} ({split})"
    return examples_from_rows(rows, inputs=inputs, labels=labels, id_field=id_field, where=where)
