"""References: what an LM says of training rows before they are trained on, by its own prompts or by others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from cotune.datamodules import Batch, Pair, PairMaker, Trace, collate
from torch import Tensor

_ROWS = 32
"""Rows computed together, so that what their prompts share is computed once."""


def with_reference(
    traces: Sequence[Trace], maker: PairMaker, score: Callable[[Batch], tuple[Tensor, Tensor]]
) -> list[Trace]:
    """The traces with candidates and reference, less those that do not fit the window behind the maker's prompts.

    Args:
        maker: of the prompts that the reference reads.
        score: batch -> (n, k) candidates at its tokens that bear weight, and (n, 1 + k) log-probabilities.
    """
    rows = [(place, trace, maker.pair(trace)) for place, trace in enumerate(traces)]
    rows = sorted((row for row in rows if maker.fits(row[2])), key=lambda row: row[1].stage)
    found: dict[int, Trace] = {}
    for _, same in groupby(rows, key=lambda row: row[1].stage):
        of_stage = list(same)  # their prompts begin alike
        for start in range(0, len(of_stage), _ROWS):
            some = of_stage[start : start + _ROWS]
            ids, values = score(collate([[pair for _, _, pair in some]]))
            scored = zip(ids.tolist(), values.tolist(), strict=True)
            for place, trace, pair in some:
                found[place] = _filled(trace, pair, scored)
    return [found[place] for place in sorted(found)]  # in the traces' order


def _filled(trace: Trace, pair: Pair, scored: Iterator[tuple[list[int], list[float]]]) -> Trace:
    """The trace with the next of what was scored, at its tokens that bear weight."""
    at = {place: next(scored) for place in pair.bearing}
    count = len(next(iter(at.values()))[0])
    every = [at.get(place, ([-1] * count, [0.0] * (1 + count))) for place in range(len(trace.completion_ids))]
    candidates = tuple(tuple(ids) for ids, _ in every) if count else ()
    return replace(trace, candidates=candidates, reference=tuple(tuple(values) for _, values in every))


def drawn_by(traces: Sequence[Trace]) -> list[Trace]:
    """The traces with what the reference says of their tokens as that with which they were drawn."""
    return [replace(trace, sampled=tuple(own for own, *_ in trace.reference), reference=()) for trace in traces]
