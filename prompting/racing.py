"""Racing: which candidates are still worth running, judged from the examples that all of them have run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist


def contenders(scores: Mapping[int, Sequence[float]], total: int, *, confidence: float) -> list[int]:
    """The candidates that may still be the best once all examples have run, in order.

    Each is compared with the leader on the examples both have run, so what makes an example hard for all cancels out.
    With m of n examples run and d the leader's score less the candidate's, the final sum of d is expected at n mean(d),
    with a standard deviation of sd(d) sqrt((n - m) n / m): what is left is a finite sample too, and nothing is left to
    doubt at its end. A candidate drops out when that sum is above 0 with the confidence given, or when full scores on
    all that is left would not bring it to where the leader stands. `sd` counts half a point of doubt on either side
    besides what was seen: among a few equal scores it would else be 0.

    This is a race (Maron & Moore, 1994) with paired normal bounds in place of Hoeffding's, which separate next to
    nothing on a few hundred examples.

    Args:
        scores: candidate -> its scores, of the same examples in the same order, each in [0, 1].
        total: examples in all.
        confidence: of each comparison, in (0.5, 1). Looking again and again adds errors up.

    >>> contenders({0: [1.0] * 16, 1: [0.0] * 16}, 64, confidence=0.98)
    [0]
    """
    z = NormalDist().inv_cdf(confidence)
    leader = max(scores, key=lambda at: (math.fsum(scores[at]), -at))
    return [at for at in sorted(scores) if at == leader or not _behind(scores[at], scores[leader], total, z)]


def _behind(own: Sequence[float], best: Sequence[float], total: int, z: float) -> bool:
    left, done = total - len(own), len(own)
    if math.fsum(own) + left < math.fsum(best):
        return True
    gaps = [b - a for a, b in zip(own, best, strict=True)]
    mean = math.fsum(gaps) / done
    variance = (math.fsum((gap - mean) ** 2 for gap in gaps) + 1) / done
    return left > 0 and total * mean > z * math.sqrt(variance * left * total / done)
