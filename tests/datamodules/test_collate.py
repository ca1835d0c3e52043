"""Collating: rows that share a prefix in one segment, the prefix there once, completions at the right end."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from cotune.datamodules import Batch, Pair, Segment, collate
from cotune.datamodules.collate import IGNORED, shared_prefix

PAD = 0


def rows_of(segment: Segment) -> list[tuple[list[int], list[int]]]:
    """(all real tokens, completion) of each row, read back from the tensors."""
    found = []
    for ids, mask, labels in zip(segment.ids, segment.mask, segment.labels, strict=True):
        row = [*segment.prefix.tolist(), *ids[mask == 1].tolist()]
        found.append((row, labels[labels != IGNORED].tolist()))
    return found


def random_pairs(rng: random.Random) -> list[Pair]:
    prefix = [rng.randint(1, 5) for _ in range(rng.randint(0, 8))]
    return [
        Pair(
            prefix + [rng.randint(1, 3) for _ in range(rng.randint(1, 9))],
            [rng.randint(1, 9) for _ in range(rng.randint(1, 6))],
        )
        for _ in range(rng.randint(1, 5))
    ]


@pytest.mark.parametrize("seed", range(30))
def test_no_token_is_lost_moved_or_added(seed: int) -> None:
    pairs = random_pairs(random.Random(seed))
    (segment,) = collate([pairs], pad_id=PAD).segments
    assert rows_of(segment) == [([*p.prompt_ids, *p.completion_ids], list(p.completion_ids)) for p in pairs]


@pytest.mark.parametrize("seed", range(30))
def test_padding_is_on_the_left_and_labels_stand_under_their_tokens(seed: int) -> None:
    (segment,) = collate([random_pairs(random.Random(seed))], pad_id=PAD).segments
    assert (segment.mask.diff(dim=1) >= 0).all()  # zeros, then ones
    own = segment.ids[:, -segment.labels.shape[1] :]
    assert (own[segment.labels != IGNORED] == segment.labels[segment.labels != IGNORED]).all()
    assert segment.ids.shape[1] > segment.labels.shape[1]  # every completion token has one before it


@pytest.mark.parametrize("seed", range(30))
def test_the_prefix_is_the_longest_that_leaves_each_prompt_a_token(seed: int) -> None:
    prompts = [list(p.prompt_ids) for p in random_pairs(random.Random(seed))]

    def fits(length: int) -> bool:
        return all(len(p) > length and p[:length] == prompts[0][:length] for p in prompts)

    assert shared_prefix(prompts) == max(length for length in range(20) if fits(length))


@pytest.mark.parametrize("kinds", [(list, list), (tuple, tuple), (list, tuple)])
def test_prompts_may_be_lists_and_tuples(kinds: tuple[type, type]) -> None:
    first, second = kinds
    assert shared_prefix([first([1, 2, 3]), second([1, 2, 4])]) == 2


def test_a_batch_counts_the_tokens_that_bear_loss() -> None:
    batch = collate([[Pair([1, 2], [3]), Pair([1, 9], [4, 5, 6])], [Pair([7], [8, 8])]], pad_id=PAD)
    assert batch.tokens == 1 + 3 + 2


def groups(*sizes: int) -> list[list[Pair]]:
    return [[Pair([1, i], [2])] * size for i, size in enumerate(sizes)]


@pytest.mark.parametrize(("sizes", "segments"), [((2, 1), 2), ((2, 0, 1), 2), ((0,), 0)])
def test_each_group_is_a_segment_and_an_empty_one_is_none(sizes: Sequence[int], segments: int) -> None:
    batch = collate(groups(*sizes), pad_id=PAD)
    assert isinstance(batch, Batch)
    assert len(batch.segments) == segments


def test_a_padding_id_that_is_also_an_ordinary_token_is_told_apart_by_the_mask() -> None:
    pairs = [Pair([5, 5, 5, 7], [5]), Pair([6], [5, 5])]
    (segment,) = collate([pairs], pad_id=5).segments
    assert rows_of(segment) == [([5, 5, 5, 7, 5], [5]), ([6, 5, 5], [5, 5])]
