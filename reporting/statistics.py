"""How sure a score is: standard errors, intervals, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 10_000
_Z = 1.959964  # of a two-sided 95 % interval


@dataclass(frozen=True)
class Difference:
    """Mean of (second - first) over the same examples, with a 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def standard_error(scores: Sequence[float]) -> float:
    """Of the mean of the scores, in the scores' unit; nan below two scores.

    >>> round(standard_error([0, 1, 1, 1]), 3)
    0.25
    """
    if len(scores) < 2:
        return math.nan
    return float(np.std(np.asarray(scores, dtype=float), ddof=1) / math.sqrt(len(scores)))


def binomial_error(score: float, n: int) -> float:
    """The largest standard error that `n` scores in [0, 1] with this mean can have: that of scores of 0 and 1."""
    return math.sqrt(score * (1 - score) / n) if n else math.nan


def interval(score: float, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a mean of `n` scores of 0 and 1; for graded scores it is wider than need be.

    Unlike score ± 2 errors it does not shrink to nothing at 0 and 1.

    >>> tuple(round(x, 2) for x in interval(1.0, 10))
    (0.72, 1.0)
    """
    if not n:
        return 0.0, 1.0
    middle = (score + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(score * (1 - score) / n + _Z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_difference(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> Difference:
    """Resamples examples, each with both its scores, so what makes an example hard cancels out.

    Raises:
        ValueError: there are no scores, or not as many of one as of the other.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} scores; a paired difference needs as many of both, and one.")
    gaps = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    rng = np.random.default_rng(seed)
    # In parts, so that many examples do not need much memory.
    part = max(1, 1_000_000 // len(gaps))
    drawn = [min(part, _RESAMPLES - start) for start in range(0, _RESAMPLES, part)]
    means = np.concatenate([gaps[rng.integers(0, len(gaps), (count, len(gaps)))].mean(axis=1) for count in drawn])
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(gaps.mean()), float(low), float(high), len(gaps))
