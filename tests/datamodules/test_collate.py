"""Collating: rows that share a prefix in one segment, the prefix there once, and what each of their tokens weighs."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from cotune.datamodules import Batch, Bearing, Pair, collate
from cotune.programs.shared_prefix import shared_prefix


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
    (segment,) = collate([pairs]).segments
    rows = [[*segment.shared, *segment.own(pair)] for pair in segment.pairs]
    assert rows == [[*p.prompt_ids, *p.completion_ids] for p in pairs]


def bearing(batch: Batch) -> Bearing:
    return batch.bearing(torch.device("cpu"), torch.float64)


@pytest.mark.parametrize("seed", range(30))
def test_every_completion_token_bears_weight_1_in_cross_entropy_and_0_elsewhere_unless_said(seed: int) -> None:
    pairs = random_pairs(random.Random(seed))
    tokens = bearing(collate([pairs]))
    assert tokens.ids[:, 0].tolist() == [id_ for pair in pairs for id_ in pair.completion_ids]
    assert tokens.ids.shape[1] == 1
    assert tokens.rows.tolist() == [row for row, pair in enumerate(pairs) for _ in pair.completion_ids]
    assert (tokens.ce == 1).all()
    assert not tokens.pg.any()
    assert not tokens.kl.any()
    assert tokens.reference is None


def test_tokens_without_weight_in_any_stream_are_left_out() -> None:
    streams = Pair([1], [2, 3, 4, 5], ce=(0.5, 0, 0, 0), pg=(0, -2.0, 0, 0), kl=(0, 0, 0, 1))
    choices = Pair([1], [6, 7], ce=(), pg=(1, 0), desirable=False, group="g")
    batch = collate([[streams, choices]])
    tokens = bearing(batch)
    assert batch.tokens == 4
    assert tokens.ids.tolist() == [[2], [3], [5], [6]]
    assert (tokens.ce.tolist(), tokens.pg.tolist(), tokens.kl.tolist()) == ([0.5, 0, 0, 0], [0, -2, 0, 1], [0, 0, 1, 0])
    assert (tokens.groups, tokens.desirable) == (("", "g"), (None, False))
    assert tokens.by_row(torch.ones(4)).tolist() == [3, 1]


def test_a_reference_stands_under_its_candidates() -> None:
    taught = Pair([1], [2, 3], ce=(), kl=(0, 1), candidates=((7, 8), (8, 9)), reference=((-1, -2, -3), (-4, -5, -6)))
    tokens = bearing(collate([[taught, Pair([1], [4])]]))
    assert tokens.ids.tolist() == [[3, 8, 9], [4, -1, -1]]
    assert tokens.reference is not None
    assert tokens.reference.tolist() == [[-4, -5, -6], [0, 0, 0]]


@pytest.mark.parametrize("stream", ["ce", "pg", "kl", "candidates", "reference", "sampled"])
def test_a_stream_that_is_not_as_long_as_its_completion_is_refused(stream: str) -> None:
    given = ((1,),) if stream in ("candidates", "reference") else (1.0,)
    with pytest.raises(ValueError, match=f'"e": {stream} has 1 entries for 2 completion tokens'):
        Pair([1], [2, 3], name='"e"', **{stream: given})  # type: ignore[arg-type]


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
    batch = collate([[Pair([1, 2], [3]), Pair([1, 9], [4, 5, 6])], [Pair([7], [8, 8])]])
    assert batch.tokens == 1 + 3 + 2


def groups(*sizes: int) -> list[list[Pair]]:
    return [[Pair([1, i], [2])] * size for i, size in enumerate(sizes)]


@pytest.mark.parametrize(("sizes", "segments"), [((2, 1), 2), ((2, 0, 1), 2), ((0,), 0)])
def test_each_group_is_a_segment_and_an_empty_one_is_none(sizes: Sequence[int], segments: int) -> None:
    batch = collate(groups(*sizes))
    assert isinstance(batch, Batch)
    assert len(batch.segments) == segments
