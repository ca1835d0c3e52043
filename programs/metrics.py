"""Metrics: (example, prediction) -> a score in [0, 1], higher is better, and why it is no higher."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from cotune.programs.example import Example
from cotune.programs.faults import quoted
from cotune.programs.rollout import Failure
from cotune.programs.score import Score
from cotune.programs.types import as_text, plain
from cotune.programs.values import gold_text, normalise, number_of, same

Metric = Callable[[Example, Mapping[str, Any]], "float | Score"]
"""(example, prediction) -> score in [0, 1]. A function, or an object with __call__ where it needs settings."""


class BatchMetric(ABC):
    """A metric that scores many predictions together. The `Runner` calls `scores` once for all rollouts of a run."""

    @abstractmethod
    def scores(self, pairs: Sequence[tuple[Example, Mapping[str, Any]]]) -> Sequence[Score | Failure]:
        """A score for each pair of example and prediction, in their order; a `Failure` where there can be none."""

    def __call__(self, example: Example, prediction: Mapping[str, Any]) -> Score:
        (found,) = self.scores([(example, prediction)])
        if isinstance(found, Failure):
            raise ValueError(found.message)
        return found


def exact_match(example: Example, prediction: Mapping[str, Any]) -> Score:
    """1 if every label equals the prediction's field of that name, else 0. A field that the prediction lacks is not
    equal. Spelling does not count (`normalise`), numbers are equal as numbers, and of several answers (a list as label)
    any will do.

    >>> exact_match(Example.of({}, {"answer": "The Beatles"}), {"answer": "beatles."}).value
    1.0
    """
    _check_labels(example)
    wrong = [
        name for name, label in example.labels.items() if name not in prediction or not same(prediction[name], label)
    ]
    return Score(float(not wrong), "; ".join(_expected(example, prediction, name) for name in wrong))


def number_match(example: Example, prediction: Mapping[str, Any]) -> Score:
    """1 if every label, a number, equals the prediction's field of that name as a number, else 0.

    The field must be a number and nothing else: 1200, "1,200.0", "$1200". Of several answers (a list as label) any will
    do, and so will a list of all of them, in order.

    >>> number_match(Example.of({}, {"total": 7}), {"total": "7.0"}).value
    1.0

    Raises:
        ValueError: a label is no number.
    """
    _check_labels(example)
    wrong = [
        _expected(example, prediction, name)
        for name, label in example.labels.items()
        if not _same_number(example, prediction.get(name), label)
    ]
    return Score(float(not wrong), "; ".join(wrong))


def f1(example: Example, prediction: Mapping[str, Any]) -> Score:
    """How much of the words a prediction and its label share, F1 as in SQuAD, the mean over the labels.

    Words are those that `normalise` leaves. Of several answers the nearest counts; a prediction that is a list is
    compared with the words of all of them together.

    >>> f1(Example.of({}, {"answer": "the red house"}), {"answer": "a red barn"}).value
    0.5
    """
    _check_labels(example)
    scores = {
        name: _nearest(prediction[name], label) if name in prediction else 0.0 for name, label in example.labels.items()
    }
    low = [_expected(example, prediction, name) for name, score in scores.items() if score < 1]
    return Score(sum(scores.values()) / len(scores), "; ".join(low))


def first_line_number(example: Example, prediction: Mapping[str, Any]) -> Score:
    """GSM8K as in the paper: the last number of the answer's first line equals the gold number.

    >>> first_line_number(Example.of({}, {"answer": "1,200"}), {"answer": "It costs $1200.\\nOr 7?"}).value
    1.0

    Raises:
        ValueError: there is no label "answer", or it holds no number.
    """
    if "answer" not in example.labels:
        raise ValueError(f'example {example.id} has no label "answer"; first_line_number needs it')
    gold = [_gold_number(example, one, last_number) for one in _answers(example.labels["answer"])]
    said = plain(prediction.get("answer"))
    lines = [said] if isinstance(said, float) else [] if said is None else as_text(said).strip().splitlines()
    right = bool(lines) and last_number(lines[0]) in gold
    return Score(float(right), "" if right else _expected(example, prediction, "answer"))


COMPARE_FIELDS: tuple[Metric, ...] = (exact_match, number_match, f1, first_line_number)
"""The metrics that compare a label with the prediction's field of the same name."""


def last_number(value: Any) -> Decimal | None:
    """The last number in a text, thousands' commas removed; None if there is none.

    A minus belongs to the number unless something stands right before it that it joins or is taken from: "5-3" ends
    with 3, "x = -3" with -3.

    >>> last_number("12 boxes of 1,000 = 12,000.00 pens"), last_number("none")
    (Decimal('12000.00'), None)
    """
    if isinstance(value, float):  # as text it may have an exponent
        return number_of(value)
    text = as_text(value).replace("\N{MINUS SIGN}", "-")
    numbers = re.findall(r"(?:(?<![\w.)\]])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)", text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def _check_labels(example: Example) -> None:
    if not example.labels:
        raise ValueError(f"example {example.id} has no labels to compare with")


def _answers(label: Any) -> list[Any]:
    return list(label) if _is_list(label) else [label]


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _gold_number(example: Example, label: Any, read: Callable[[Any], Decimal | None]) -> Decimal:
    number = read(label)
    if number is None:
        raise ValueError(f"example {example.id}: the label {label!r} holds no number")
    return number


def _same_number(example: Example, said: Any, label: Any) -> bool:
    """As `same`, for numbers."""
    if not _is_list(label):
        return number_of(said) == _gold_number(example, label, number_of)
    found = [_same_number(example, said, one) for one in label]  # all of them, so that one that is no number is refused
    whole = _is_list(said) and len(said) == len(label)
    return any(found) or (whole and all(_same_number(example, *pair) for pair in zip(said, label, strict=True)))


def _nearest(said: Any, label: Any) -> float:
    """The overlap with the nearest of the right answers. A list is compared with lists: the label, or several in it."""
    if same(said, label):
        return 1.0
    if _is_list(said) and _is_list(label):
        return max(_overlap(said, one) for one in (label, *filter(_is_list, label)))
    return max((_overlap(said, one) for one in _answers(label)), default=0.0)


def _overlap(said: Any, label: Any) -> float:
    ours, theirs = Counter(_words(said)), Counter(_words(label))
    shared = (ours & theirs).total()
    return 2 * shared / (ours.total() + theirs.total()) if shared else 0.0


def _words(value: Any) -> list[str]:
    return [word for item in value for word in _words(item)] if _is_list(value) else normalise(value).split()


def _expected(example: Example, prediction: Mapping[str, Any], name: str) -> str:
    """Why a field is not right: what was expected, and what there is."""
    label = example.labels[name]
    whole = _is_list(label) and _is_list(prediction.get(name))
    others = f" (or {len(label) - 1} more)" if _is_list(label) and len(label) > 1 and not whole else ""
    expected = quoted(label if whole else gold_text(label), limit=100)
    if name not in prediction:
        there = ", ".join(map(str, prediction)) or "nothing"
        return f"{name}: expected {expected}{others}, but the prediction has no such field; it has {there}"
    return f"{name}: expected {expected}{others}, got {quoted(prediction[name], limit=100)}"
