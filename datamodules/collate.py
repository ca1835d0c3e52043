"""Training pairs and batches: each token with its weights, and pairs that share a prompt prefix in one segment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, repeat

import torch
from cotune.errors import BadValueError
from cotune.programs.shared_prefix import shared_prefix
from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """One training row: the ids of a prompt and of the completion to learn from, and what each of these weighs.

    Every token of the completion has a weight in each of three streams. As they are they make a completion loss.

    Attributes:
        completion_ids: end-of-turn token included.
        name: where it comes from, for messages about it.
        ce: weights of the cross-entropy stream, one a completion token; None for 1 everywhere, empty for 0.
        pg: of the policy gradient stream, where a weight is an advantage; empty for 0.
        kl: of the stream that keeps the LM near a reference; empty for 0.
        candidates: ids whose log-probabilities the objective reads besides the token's own, as many at each token.
        reference: log-probabilities under the reference at each token: of the token itself, then of its candidates.
            Empty where the row has none of its own.
        sampled: log-probabilities with which the tokens were drawn; 0 for those that were forced, or drawn among fewer
            than all tokens. Empty where unknown.
        group: rows of one non-empty group stand in one batch, in their order: preferred and rejected, say.
        desirable: whether the run was a good one, for objectives that learn from either kind.

    Raises:
        ValueError: a stream, the candidates or the reference are not as many as the completion's tokens.
    """

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    name: str = ""
    ce: Sequence[float] | None = None
    pg: Sequence[float] = ()
    kl: Sequence[float] = ()
    candidates: Sequence[Sequence[int]] = ()
    reference: Sequence[Sequence[float]] = ()
    sampled: Sequence[float] = ()
    group: str = ""
    desirable: bool | None = None

    def __post_init__(self) -> None:
        for name in ("ce", "pg", "kl", "candidates", "reference", "sampled"):
            given = len(getattr(self, name) or ())
            if given not in (0, len(self.completion_ids)):
                raise BadValueError(
                    f"{self.name or 'a training row'}: {name} has {given} entries for {len(self.completion_ids)} "
                    "completion tokens; give one per token, or none at all."
                )

    @cached_property
    def bearing(self) -> Sequence[int]:
        """Places in the completion whose token has a weight in any stream."""
        every = range(len(self.completion_ids))
        if self.ce is None:
            return every
        streams = [stream for stream in (self.ce, self.pg, self.kl) if stream]
        return tuple(i for i in every if any(stream[i] for stream in streams))


@dataclass(frozen=True)
class Segment:
    """Pairs of a batch whose prompts begin with the same `prefix` tokens, which are computed once for all of them."""

    prefix: int
    pairs: tuple[Pair, ...]

    @property
    def shared(self) -> list[int]:
        """The ids that all prompts begin with."""
        return list(self.pairs[0].prompt_ids[: self.prefix])

    def own(self, pair: Pair) -> list[int]:
        """The ids of one of its pairs behind the prefix, completion included."""
        return [*pair.prompt_ids[self.prefix :], *pair.completion_ids]


@dataclass(frozen=True)
class Bearing:
    """The n tokens of a batch that bear weight, row by row: what an objective is told of R rows.

    Attributes:
        rows: (n,) the row that each is of.
        ids: (n, K) the token itself, then its candidates; -1 where a row has fewer than others.
        ce, pg, kl: (n,) its weights.
        sampled: (n,) the log-probability that it was drawn with; 0 where unknown.
        reference: (n, K) log-probabilities of `ids` under the reference; None where none is known.
        groups, desirable: of each row.
    """

    rows: Tensor
    ids: Tensor
    ce: Tensor
    pg: Tensor
    kl: Tensor
    sampled: Tensor
    reference: Tensor | None
    groups: tuple[str, ...]
    desirable: tuple[bool | None, ...]

    def by_row(self, values_n: Tensor) -> Tensor:
        """(R,) the sum of a value of each token over each row."""
        return values_n.new_zeros(len(self.groups)).index_add(0, self.rows, values_n)

    def with_reference(self, log_probs_nK: Tensor) -> Bearing:
        return replace(self, reference=log_probs_nK)


@dataclass(frozen=True)
class Batch:
    """What one optimiser step trains on: any mix of stages, a segment for each shared prefix. Plain ids; no tensors."""

    segments: tuple[Segment, ...]

    @property
    def pairs(self) -> Iterator[Pair]:
        """All rows, in order."""
        return (pair for segment in self.segments for pair in segment.pairs)

    @property
    def tokens(self) -> int:
        """Number of tokens that bear weight."""
        return sum(len(pair.bearing) for pair in self.pairs)

    @property
    def rows(self) -> int:
        return sum(len(segment.pairs) for segment in self.segments)

    @property
    def longest(self) -> int:
        """Tokens of the longest row, its prefix included."""
        return max(len(pair.prompt_ids) + len(pair.completion_ids) for pair in self.pairs)

    @property
    def names(self) -> tuple[str, ...]:
        """The rows' names, in order."""
        return tuple(pair.name for pair in self.pairs)

    def parts(self, rows: int) -> list[Batch]:
        """The batch as batches of at most `rows` rows, in order."""
        return self._cut(repeat(rows))

    def slices(self, count: int) -> list[Batch]:
        """The batch as so many batches of nearly as many rows, in order; some are empty where there are fewer rows."""
        ends = [i * self.rows // count for i in range(count + 1)]
        return self._cut(iter([end - start for start, end in pairwise(ends)]))

    def _cut(self, sizes: Iterator[int]) -> list[Batch]:
        found: list[list[Segment]] = []
        room = 0
        for segment in self.segments:
            left = segment.pairs
            while left:
                while not room:
                    found.append([])
                    room = next(sizes)
                found[-1].append(Segment(segment.prefix, left[:room]))
                room, left = max(room - len(left), 0), left[room:]
        return [Batch(tuple(segments)) for segments in found]

    def bearing(self, device: torch.device, dtype: torch.dtype) -> Bearing:
        """The tokens that bear weight, as tensors."""
        pairs = list(self.pairs)
        places = [(pair, i) for pair in pairs for i in pair.bearing]
        wide = max(len(row) for pair in pairs for row in pair.candidates or ((),))

        def numbers(of: Callable[[Pair, int], float | list[float]]) -> Tensor:
            return torch.tensor([of(pair, i) for pair, i in places], device=device, dtype=dtype)

        return Bearing(
            rows=torch.tensor([row for row, pair in enumerate(pairs) for _ in pair.bearing], device=device),
            ids=torch.tensor([_ids(pair, i, wide) for pair, i in places], device=device),
            ce=numbers(lambda pair, i: 1.0 if pair.ce is None else _at(pair.ce, i)),
            pg=numbers(lambda pair, i: _at(pair.pg, i)),
            kl=numbers(lambda pair, i: _at(pair.kl, i)),
            sampled=numbers(lambda pair, i: _at(pair.sampled, i)),
            reference=numbers(lambda pair, i: _known(pair, i, wide)) if any(p.reference for p in pairs) else None,
            groups=tuple(pair.group for pair in pairs),
            desirable=tuple(pair.desirable for pair in pairs),
        )


def collate(groups: Sequence[Sequence[Pair]]) -> Batch:
    """Each group of pairs as one segment with the longest prefix that all its prompts share."""
    segments = (Segment(shared_prefix([pair.prompt_ids for pair in group]), tuple(group)) for group in groups if group)
    return Batch(tuple(segments))


def _at(stream: Sequence[float], place: int) -> float:
    return float(stream[place]) if stream else 0.0


def _ids(pair: Pair, place: int, wide: int) -> list[int]:
    more = list(pair.candidates[place]) if pair.candidates else []
    return [pair.completion_ids[place], *more, *[-1] * (wide - len(more))]


def _known(pair: Pair, place: int, wide: int) -> list[float]:
    known = list(pair.reference[place]) if pair.reference else []
    return [*known, *[0.0] * (1 + wide - len(known))]
