"""GSM8K: grade-school maths in words (Cobbe et al. 2021, MIT), from the Hub or from the official files."""

from __future__ import annotations

from typing import Any

from cotune.datamodules.files import read_split, refuse_bad_rows
from cotune.datamodules.rows import examples_from_rows
from cotune.datamodules.splits import Duplicates, Sizes, Splits, split
from cotune.datamodules.traces import TraceDataModule
from cotune.programs import Example, Metric, first_line_number

# The paper: 1000 train, 500 dev, all 1319 of test. Its dev both scores and chooses; here those are two sets of 250.
SIZES = Sizes(train=1000, dev=250, val=250, test=1319)
_MARK = "####"


class GSM8K(TraceDataModule):
    """question -> answer, a number. The test set is the official one.

    Args:
        path: Hub id, or a folder with train.jsonl and test.jsonl (each may be .gz) as they stand in
            github.com/openai/grade-school-math.
        sizes, metric, duplicates, kwargs: see `TraceDataModule`.
    """

    def __init__(
        self,
        path: str = "openai/gsm8k",
        *,
        sizes: Sizes = SIZES,
        metric: Metric = first_line_number,
        duplicates: Duplicates = "drop",
        **kwargs: Any,
    ) -> None:
        super().__init__(sizes=sizes, metric=metric, duplicates=duplicates, **kwargs)
        self.path = path

    def load(self) -> Splits:
        train, test = gsm8k_examples(self.path, "train"), gsm8k_examples(self.path, "test")
        return split(train, self.sizes, seed=self.seed, duplicates=self.duplicates, test=test)


def gsm8k_examples(path: str, part: str) -> list[Example]:
    """The problems of one part, "train" or "test".

    Raises:
        DataError: the data is not there, or an answer has no number behind "####".
    """
    rows = read_split(path, part, file=f"{part}.jsonl", config="main")
    where = f"{path} ({part})"
    solved = examples_from_rows(rows, inputs=["question"], labels=["answer"], where=where)
    examples, faults = [], []
    for row, example in enumerate(solved, 1):
        try:
            examples.append(Example.of(example.inputs, {"answer": gold_number(str(example.labels["answer"]))}))
        except ValueError as error:
            faults.append(f"row {row}: {error}")
    refuse_bad_rows(faults, len(rows), where)
    return examples


def gold_number(solution: str) -> str:
    """The number behind the last "####" of a worked solution, thousands' commas removed.

    >>> gold_number("48 * 50 = <<48*50=2400>>2400 eggs. #### 2,400")
    '2400'

    Raises:
        ValueError: there is none.
    """
    _, mark, number = solution.rpartition(_MARK)
    number = number.strip().replace(",", "")
    if not mark or not number.removeprefix("-").replace(".", "", 1).isdecimal():
        raise ValueError(f'the answer has no number after "{_MARK}": …{solution[-40:]!r}.')
    return number
