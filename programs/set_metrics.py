"""Set metrics: numbers that only a whole set has, such as macro F1, with a bootstrap interval, beside the scores."""

from __future__ import annotations

import importlib
import math
import random
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from cotune.errors import BadValueError
from cotune.programs.example import Example
from cotune.programs.faults import quoted, raised
from cotune.programs.judging import own_copy
from cotune.programs.values import gold_text, normalise, number_of, same

Answered = tuple[Example, "Mapping[str, Any] | None"]
"""An example and the prediction for it; None where its run failed."""

SetMetric = Callable[[Sequence[Answered]], float]
"""The number of a whole set, higher is better. It may raise where the set has none."""

_DRAWS = 1000


def macro_f1(done: Sequence[Answered]) -> float:
    """The mean over the classes of their F1: rare classes count as much as frequent ones.

    The classes are the values of the only label. An answer is of the class that it equals (see `same`: True is "yes");
    one that equals none is wrong and no class of its own.

    >>> rows = [(Example.of({"n": n}, {"kind": kind}), {"kind": "a"}) for n, kind in enumerate("aaab")]
    >>> round(macro_f1(rows), 3)
    0.429
    """
    name = _label(done)
    labels = [example.labels[name] for example, _ in done]
    golds = [_normal(gold_text(label)) for label in labels]
    classes = {text: gold for gold, label in zip(golds, labels, strict=True) for text in _label_texts(label)}
    said: list[str | None] = []
    for gold, label, (_, prediction) in zip(golds, labels, done, strict=True):
        answer = (prediction or {}).get(name)
        texts = _texts(answer)
        own = any(text in texts for text in _label_texts(label))
        own = own or (not isinstance(answer, (str, int, float)) and same(answer, label))
        said.append(gold if own else next((classes[text] for text in texts if text in classes), None))
    pairs = list(zip(golds, said, strict=True))
    scores = []
    for kind in sorted(set(golds)):
        right = sum(gold == answer == kind for gold, answer in pairs)
        scores.append(2 * right / (golds.count(kind) + said.count(kind)))
    return sum(scores) / len(scores)


def auc(done: Sequence[Answered]) -> float:
    """The area under the ROC curve: how often a positive example has a higher number than a negative one, ties half.

    The only label says what is positive (true, yes, 1); the prediction's field `score`, or else that of the label's
    name, is the number; true and yes are 1, false and no 0. A run that failed, or has no number, stands below all.

    Raises:
        ValueError: the set has no positive or no negative example, or no prediction has a number.
    """
    name = _label(done)
    found = [_number((prediction or {}).get("score", (prediction or {}).get(name))) for _, prediction in done]
    negatives: list[float] = []
    positives: list[float] = []
    for number, (example, _) in zip(found, done, strict=True):
        positive = not {"yes", "true", "1"}.isdisjoint(_texts(example.labels[name]))
        (positives if positive else negatives).append(-math.inf if number is None else number)
    if not negatives or not positives:
        raise ValueError(
            f"auc needs positive and negative examples; there are {len(positives)} and {len(negatives)} (a label is "
            "positive if it is true, yes or 1)"
        )
    if all(number is None for number in found):
        raise ValueError(f'auc needs a number, true, false, yes or no in the field "score" or "{name}"; no run has one')
    negatives.sort()
    won = sum((bisect_left(negatives, high) + bisect_right(negatives, high)) / 2 for high in positives)
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
        if not callable(found):
            raise AttributeError(f"{name} is no function")
    except (ImportError, AttributeError, ValueError) as error:
        raise BadValueError(
            f'there is no set metric "{name}" ({error}); use one of {", ".join(SET_METRICS)}, or your own, '
            "written as module.function."
        ) from None
    made: SetMetric = found
    return made


def measured(names: Sequence[str], done: Sequence[Answered]) -> dict[str, list[float]]:
    """Each metric's value on the set, and the ends of its 95 % interval by resampling examples; plain types.

    A metric that cannot be computed on the set is left out, with a warning; a draw on which it cannot be computed is
    not counted.
    """
    found = {}
    for name in names:
        metric, own = set_metric(name), [(own_copy(one), own_copy(prediction)) for one, prediction in done]
        value = _value(metric, own)
        if isinstance(value, str):
            warnings.warn(
                f"the set metric {name} could not be computed and is left out; the run continues: {value}",
                stacklevel=1,  # so that it is said once
            )
            continue
        rng = random.Random(0)
        drawn = (_value(metric, rng.choices(own, k=len(own))) for _ in range(_draws(len(own))))
        values = sorted(v for v in drawn if not isinstance(v, str))
        low, high = (values[round(share * (len(values) - 1))] for share in (0.025, 0.975)) if values else (value, value)
        found[name] = [value, low, high]
    return found


SET_METRICS: dict[str, SetMetric] = {"macro_f1": macro_f1, "auc": auc}


def _value(metric: SetMetric, done: Sequence[Answered]) -> float | str:
    """The metric's value, or why there is none."""
    try:
        given: Any = metric(done)
        if isinstance(given, (str, bytes)) or given is None or not math.isfinite(value := float(given)):
            return f"it returned {quoted(given)}, which is not a finite number"
    except (MemoryError, KeyboardInterrupt):
        raise
    except (Exception, SystemExit) as error:  # the user's code: the number is only reported, so the run goes on
        return raised(error)
    return value


def _texts(value: Any) -> tuple[str, ...]:
    """The texts that a value of a prediction or a label equals; none where there is no value."""
    if value is None:
        return ()
    if isinstance(value, bool):
        return ("yes", "true") if value else ("no", "false")
    return (_normal(value) if isinstance(value, (str, int, float)) else normalise(value),)


def _label_texts(label: Any) -> list[str]:
    answers = [*label, label] if isinstance(label, (list, tuple)) else [label]
    return [text for answer in answers for text in _texts(answer)]


def _number(value: Any) -> float | None:
    if isinstance(value, float):
        return None if math.isnan(value) else float(value)
    if (found := number_of(value)) is not None:
        return float(found)
    texts = _texts(value)
    return 1.0 if "yes" in texts or "true" in texts else 0.0 if "no" in texts or "false" in texts else None


_normal = lru_cache(maxsize=10_000, typed=True)(normalise)  # a metric is called a thousand times on the same answers


def _draws(size: int) -> int:
    """Fewer on large sets, whose intervals are narrow anyway: the time stays about that of a thousand examples."""
    return max(100, min(_DRAWS, _DRAWS * 1000 // max(size, 1)))


def _label(done: Sequence[Answered]) -> str:
    names = list(dict.fromkeys(name for example, _ in done for name in example.labels))
    if len(names) != 1:
        raise ValueError(f"it needs examples with one label; they have {', '.join(names) or 'none'}")
    return names[0]
