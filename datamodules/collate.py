"""Training pairs as tensors: rows that share a prompt prefix stand in one segment, the prefix there once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100
"""The label of a position that bears no loss (PyTorch's own convention)."""


@dataclass(frozen=True)
class Pair:
    """One training pair: the ids of a prompt and of the completion to learn, end-of-turn token included.

    `name` says where it comes from, for messages about it.
    """

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    name: str = ""


class Segment(NamedTuple):
    """Rows of a batch that begin with the same tokens.

    Attributes:
        prefix: (P,) the shared tokens, P >= 0. Computed once, its gradient summed over the rows.
        ids: (B, S) what follows in each row, padded on the left, completion at the right end.
        mask: (B, S) 1 for real tokens, 0 for padding.
        labels: (B, C) the last C tokens' labels: completion ids, IGNORED before a shorter completion. S > C, so that
            every completion token has a position that predicts it.
        names: B names of the rows, for messages. (Loaders turn the tuple into a list.)
    """

    prefix: Tensor
    ids: Tensor
    mask: Tensor
    labels: Tensor
    names: Sequence[str] = ()

    @property
    def rows(self) -> int:
        return int(self.ids.shape[0])

    def part(self, rows: slice) -> Segment:
        """Some of its rows, behind the same prefix."""
        return Segment(self.prefix, self.ids[rows], self.mask[rows], self.labels[rows], self.names[rows])

    def spread(self) -> Segment:
        """The same rows with the prefix in each of them, and none shared."""
        # Padding may stay between prefix and own tokens: it is masked, and positions are counted over real tokens only.
        ids = torch.cat([self.prefix.expand(self.rows, -1), self.ids], dim=1)
        mask = torch.cat([self.mask.new_ones(self.rows, len(self.prefix)), self.mask], dim=1)
        return Segment(self.prefix[:0], ids, mask, self.labels, self.names)

    def to(self, device: torch.device) -> Segment:
        prefix, ids, mask, labels = (tensor.to(device) for tensor in (self.prefix, self.ids, self.mask, self.labels))
        return Segment(prefix, ids, mask, labels, self.names)


class Batch(NamedTuple):
    """What one optimiser step trains on: any mix of stages, a segment for each shared prefix."""

    segments: tuple[Segment, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens that bear loss."""
        return sum(int((segment.labels != IGNORED).sum()) for segment in self.segments)

    @property
    def rows(self) -> int:
        return sum(segment.rows for segment in self.segments)

    @property
    def longest(self) -> int:
        """Tokens of the longest row, its prefix included."""
        return max(len(segment.prefix) + int(segment.mask.sum(dim=1).max()) for segment in self.segments)

    @property
    def names(self) -> tuple[str, ...]:
        """The rows' names, in order."""
        return tuple(name for segment in self.segments for name in segment.names or ("",) * segment.rows)

    def parts(self, rows: int) -> list[Batch]:
        """The batch as batches of at most `rows` rows, in order."""
        found: list[list[Segment]] = []
        room = 0
        for segment in self.segments:
            start = 0
            while start < segment.rows:
                if not room:
                    found.append([])
                    room = rows
                count = min(room, segment.rows - start)
                found[-1].append(segment.part(slice(start, start + count)))
                start, room = start + count, room - count
        return [Batch(tuple(segments)) for segments in found]

    def to(self, device: torch.device) -> Batch:
        return Batch(tuple(segment.to(device) for segment in self.segments))


def collate(groups: Sequence[Sequence[Pair]], *, pad_id: int) -> Batch:
    """Each group of pairs as one segment with the longest prefix that all its prompts share."""
    return Batch(tuple(_segment(group, pad_id) for group in groups if group))


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all prompts share, leaving each at least one of its own.

    >>> shared_prefix([[1, 2, 3], [1, 2, 4, 5]]), shared_prefix([[1, 2], [1, 2]])
    (2, 1)
    """
    ordered = [tuple(prompt) for prompt in prompts]
    low, high = min(ordered), max(ordered)  # what the extremes of the order share, all share
    limit = min(len(prompt) for prompt in prompts) - 1
    length = 0
    while length < limit and low[length] == high[length]:
        length += 1
    return length


def _segment(pairs: Sequence[Pair], pad_id: int) -> Segment:
    shared = shared_prefix([pair.prompt_ids for pair in pairs])
    rows = [[*pair.prompt_ids[shared:], *pair.completion_ids] for pair in pairs]
    width = max(len(row) for row in rows)
    longest = max(len(pair.completion_ids) for pair in pairs)
    return Segment(
        prefix=torch.tensor(list(pairs[0].prompt_ids[:shared]), dtype=torch.long),
        ids=torch.tensor([[pad_id] * (width - len(row)) + row for row in rows]),
        mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        labels=torch.tensor(
            [[IGNORED] * (longest - len(pair.completion_ids)) + list(pair.completion_ids) for pair in pairs]
        ),
        names=tuple(pair.name for pair in pairs),
    )
