"""Metrics: (example, prediction) -> a score in [0, 1], higher is better."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from cotune.programs.example import Example
from cotune.programs.score import Score

Metric = Callable[[Example, Mapping[str, Any]], "float | Score"]
"""(example, prediction) -> score in [0, 1]. A function, or an object with __call__ where it needs settings."""


def exact_match(example: Example, prediction: Mapping[str, Any]) -> float:
    """1 if every label equals the prediction's field of that name after normalising (as the paper: NFD, lower case,
    no punctuation, no articles), else 0. A field that the prediction lacks is not equal. Where both are nothing but
    punctuation and articles ("+" and "-", the choice "A"), normalising would make all equal: they are compared
    without it.

    >>> exact_match(Example.of({}, {"answer": "The Beatles"}), {"answer": "beatles."})
    1.0
    """
    if not example.labels:
        raise ValueError(f"example {example.id} has no labels to compare with")
    return float(
        all(field in prediction and _same(prediction[field], label) for field, label in example.labels.items())
    )


def first_line_number(example: Example, prediction: Mapping[str, Any]) -> float:
    """GSM8K as in the paper: the last number of the answer's first line equals the gold number.

    >>> first_line_number(Example.of({}, {"answer": "1,200"}), {"answer": "It costs $1200.\\nOr 7?"})
    1.0
    """
    gold = last_number(str(example.labels["answer"]))
    if gold is None:
        raise ValueError(f"example {example.id}: the label {example.labels['answer']!r} holds no number")
    lines = str(prediction.get("answer", "")).strip().splitlines()
    return float(bool(lines) and last_number(lines[0]) == gold)


def last_number(text: str) -> float | None:
    """The last number in a text, thousands' commas removed; None if there is none.

    A minus belongs to the number unless something stands right before it that it joins or is taken from: "5-3" ends
    with 3, "x = -3" with -3.

    >>> last_number("12 boxes of 1,000 = 12,000.00 pens"), last_number("none")
    (12000.0, None)
    """
    numbers = re.findall(r"(?:(?<![\w.)\]])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)", text.replace("\N{MINUS SIGN}", "-"))
    return float(numbers[-1].replace(",", "")) if numbers else None


def _same(said: Any, label: Any) -> bool:
    ours, theirs = normalise(said), normalise(label)
    return ours == theirs if ours or theirs else str(said).strip().lower() == str(label).strip().lower()


def normalise(value: Any) -> str:
    """NFD, lower case, punctuation and articles out, white space folded.

    >>> normalise("  The  U.S.A., an idea ")
    'usa idea'
    """
    text = unicodedata.normalize("NFD", str(value)).lower()
    text = "".join(c for c in text if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
