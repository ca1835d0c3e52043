"""How sure a score is: standard errors, intervals, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 10_000
_AT_ONCE = 500
_Z = 1.959964  # of a two-sided 95 % interval
_FEW = 6  # gaps, all to one side, that a two-sided sign test at 5 % needs: 2 * 0.5**6 < 0.05


Scores = Mapping[int, Mapping[str, float]]
"""Seed -> example id -> score."""


@dataclass(frozen=True)
class Difference:
    """Mean of (second - first) over the (seed, example) pairs that both have, and a 95 % interval of it.

    `seeds` and `examples` are how many different ones there are, `pairs` how many pairs.
    """

    mean: float
    low: float
    high: float
    seeds: int
    examples: int
    pairs: int

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


def interval(score: float, n: int, noise: float = 0.0) -> tuple[float, float]:
    """95 % Wilson interval of a mean of `n` scores of 0 and 1; for graded scores it is wider than need be.

    Unlike score ± 2 errors it does not shrink to nothing at 0 and 1.

    Args:
        noise: variance of one score by the metric alone, as of a judge that contradicts itself; it is added.

    >>> tuple(round(x, 2) for x in interval(1.0, 10)), tuple(round(x, 2) for x in interval(0.5, 10, noise=0.1))
    ((0.72, 1.0), (0.17, 0.83))
    """
    if not n:
        return 0.0, 1.0
    if noise:
        return widened(score, interval(score, n), noise / n)
    middle = (score + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(score * (1 - score) / n + _Z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def widened(middle: float, ends: tuple[float, float], variance: float, *, floor: float = 0.0) -> tuple[float, float]:
    """An interval with a further, independent variance added; `floor` is -1 for a difference of two scores."""
    more = _Z * math.sqrt(variance)
    low, high = middle - math.hypot(middle - ends[0], more), middle + math.hypot(ends[1] - middle, more)
    return max(floor, low), min(1.0, high)


def paired_difference(first: Scores, second: Scores, *, resamples: int = _RESAMPLES) -> Difference | None:
    """How much better the second is, each pair of scores on the same seed and the same example.

    The interval is that of a pigeonhole bootstrap (Owen, 2007): seeds and examples are resampled apart from each
    other, and each (seed, example) pair counts as often as its seed and its example were drawn together. So it covers
    both the luck of the runs and that of the test set. Resampling the pairs as if they were independent would make it
    too narrow: all pairs of a seed share one training run, and all pairs of an example its difficulty. With one seed it
    is the usual paired bootstrap over examples; with few, the seeds' part is rough. Bounds are percentiles.

    Gaps that are all the same leave a bootstrap nothing to resample, however few they are. What they say of others is
    the bound of Clopper and Pearson (1934) for a thing that all of n examples did: at most 1 - 0.025 ** (1 / n) of all
    examples do otherwise (3.7 / n; one-sided it is the 3 / n of the rule of three, Hanley and Lippman-Hand, 1983). The
    interval is that of a mean in which so many are off by twice the gap, as those with the opposite one are; so it
    leaves out 0 where a sign test would, from six examples on. Scores equal everywhere, most often of one program
    twice, keep [0, 0] from six pairs on; fewer bound only how many examples may differ, by 1 each.

    Returns:
        None where there is no common pair.
    """
    seeds = sorted(set(first) & set(second))
    ids = sorted({id_ for seed in seeds for id_ in set(first[seed]) & set(second[seed])})
    gaps_SN, there_SN = np.zeros((len(seeds), len(ids))), np.zeros((len(seeds), len(ids)))
    place = {id_: n for n, id_ in enumerate(ids)}
    for s, seed in enumerate(seeds):
        for id_ in set(first[seed]) & set(second[seed]):
            gaps_SN[s, place[id_]] = second[seed][id_] - first[seed][id_]
            there_SN[s, place[id_]] = 1
    pairs = int(there_SN.sum())
    if not pairs:
        return None
    low, high = np.quantile(_resampled(gaps_SN, there_SN, resamples), [0.025, 0.975])
    mean = float(gaps_SN.sum() / pairs)
    if high - low < 1e-9:
        low, high = _of_equal_gaps(mean, len(ids), pairs)
    used = int((there_SN.sum(axis=1) > 0).sum())
    return Difference(mean, float(low), float(high), used, len(ids), pairs)


def _of_equal_gaps(gap: float, examples: int, pairs: int) -> tuple[float, float]:
    """
    >>> [tuple(round(end, 2) for end in _of_equal_gaps(gap, n, n)) for gap, n in ((1.0, 5), (1.0, 6), (0.25, 60))]
    [(-0.04, 1.0), (0.08, 1.0), (0.22, 0.28)]
    """
    rest = 1 - 0.025 ** (1 / examples)
    reach = rest * (2 * abs(gap) if gap else float(pairs < _FEW))
    return max(gap - reach, min(gap, -1.0)), min(gap + reach, max(gap, 1.0))


def _resampled(gaps_SN: np.ndarray, there_SN: np.ndarray, resamples: int) -> np.ndarray:
    """Weighted means, a resample each; one in which no pair was drawn is drawn again as the plain mean."""
    rng = np.random.default_rng(0)
    seeds, examples = gaps_SN.shape
    found = []
    for start in range(0, resamples, _AT_ONCE):
        size = min(_AT_ONCE, resamples - start)
        seeds_RS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=size)
        examples_RN = rng.multinomial(examples, np.full(examples, 1 / examples), size=size)
        total_R = ((seeds_RS @ gaps_SN) * examples_RN).sum(axis=1)
        count_R = ((seeds_RS @ there_SN) * examples_RN).sum(axis=1)
        plain = gaps_SN.sum() / there_SN.sum()
        found.append(np.where(count_R > 0, total_R / np.maximum(count_R, 1), plain))
    return np.concatenate(found)
