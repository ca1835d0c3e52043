"""Set metrics: numbers that only a whole set has, such as macro F1, with a bootstrap interval, beside the scores."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cotune.errors import BadValueError
from cotune.programs.example import Example
from cotune.programs.values import gold_text, normalise, number_of, same

Answered = tuple[Example, "Mapping[str, Any] | None"]
"""An example and the prediction for it; None where its run failed."""

SetMetric = Callable[[Sequence[Answered]], float]
"""The number of a whole set, higher is better."""

_DRAWS = 1000


def macro_f1(done: Sequence[Answered]) -> float:
    """The mean over the classes of their F1: rare classes count as much as frequent ones.

    The classes are the values of the only label. An answer that is none of them is wrong and no class of its own.

    >>> rows = [(Example.of({"n": n}, {"kind": kind}), {"kind": "a"}) for n, kind in enumerate("aaab")]
    >>> round(macro_f1(rows), 3)
    0.429
    """
    name = _label(done)
    golds = [normalise(gold_text(example.labels[name])) for example, _ in done]
    said = [
        gold
        if same((prediction or {}).get(name), example.labels[name])
        else normalise((prediction or {}).get(name, ""))
        for gold, (example, prediction) in zip(golds, done, strict=True)
    ]
    pairs = list(zip(golds, said, strict=True))
    scores = []
    for kind in sorted(set(golds)):
        right = sum(gold == answer == kind for gold, answer in pairs)
        scores.append(2 * right / (golds.count(kind) + said.count(kind)))
    return sum(scores) / len(scores)


def auc(done: Sequence[Answered]) -> float:
    """The area under the ROC curve: how often a positive example has a higher number than a negative one, ties half.

    The only label says what is positive (true, yes, 1); the prediction's field `score`, or else that of the label's
    name, is the number. A run that failed, or has no number, stands below all.

    Raises:
        ValueError: the set has no positive or no negative example.
    """
    name = _label(done)
    numbers: tuple[list[float], list[float]] = [], []
    for example, prediction in done:
        found = number_of((prediction or {}).get("score", (prediction or {}).get(name)))
        positive = example.labels[name] == 1 or same(example.labels[name], True) or same(example.labels[name], "1")
        numbers[positive].append(float("-inf") if found is None else float(found))
    negatives, positives = numbers
    if not negatives or not positives:
        raise ValueError(f"auc needs positive and negative examples; there are {len(positives)} and {len(negatives)}")
    won = sum((high > low) + 0.5 * (high == low) for high in positives for low in negatives)
    return won / (len(positives) * len(negatives))


def set_metric(name: str) -> SetMetric:
    """The set metric of a name: one of cotune's, or a function of one's own as module.function.

    Raises:
        ValueError: there is none.
    """
    if name in SET_METRICS:
        return SET_METRICS[name]
    module, _, function = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadValueError(
            f'there is no set metric "{name}" ({error}); use one of {", ".join(SET_METRICS)}, or your own, '
            "written as module.function."
        ) from None
    made: SetMetric = found
    return made


def measured(names: Sequence[str], done: Sequence[Answered]) -> dict[str, list[float]]:
    """Each metric's value on the set, and the ends of its 95 % interval by resampling examples; plain types.

    A metric that cannot be computed on the set is left out; a draw on which it cannot be is not counted.
    """
    found = {}
    for name in names:
        metric = set_metric(name)
        value = _value(metric, done)
        if value is not None:
            rng = random.Random(0)
            drawn = (_value(metric, rng.choices(done, k=len(done))) for _ in range(_draws(len(done))))
            values = sorted(v for v in drawn if v is not None) or [value]
            low, high = (values[round(share * (len(values) - 1))] for share in (0.025, 0.975))
            found[name] = [value, low, high]
    return found


SET_METRICS: dict[str, SetMetric] = {"macro_f1": macro_f1, "auc": auc}


def _value(metric: SetMetric, done: Sequence[Answered]) -> float | None:
    try:
        return float(metric(done))
    except (ValueError, ZeroDivisionError):
        return None


def _draws(size: int) -> int:
    """Fewer on large sets, whose intervals are narrow anyway: the time stays about that of a thousand examples."""
    return max(100, min(_DRAWS, _DRAWS * 1000 // max(size, 1)))


def _label(done: Sequence[Answered]) -> str:
    names = list(dict.fromkeys(name for example, _ in done for name in example.labels))
    if len(names) != 1:
        raise ValueError(f"it needs examples with one label; they have {', '.join(names) or 'none'}")
    return names[0]
