"""Sampling: tokens by inverse CDF from the nucleus, against a reference in numpy and against the distribution."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from cotune.errors import BadValueError
from cotune.inference.local.sampling import sample
from cotune.programs import Sampling
from cotune.programs.lm import Request


def reference(logits: np.ndarray, draw: float, temperature: float, top_p: float) -> int:
    """One row, as the paper of nucleus sampling says it: the fewest likeliest tokens that reach top_p, renormalised."""
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    probabilities = weights / weights.sum()
    if top_p >= 1:
        order = np.arange(len(probabilities))  # no nucleus: the vocabulary's own order
    else:
        order = np.argsort(-probabilities, kind="stable")
        reached = np.cumsum(probabilities[order])
        order = order[: int(np.argmax(reached >= top_p)) + 1]
    inside = probabilities[order] / probabilities[order].sum()
    return int(order[int(np.argmax(np.cumsum(inside) > draw))])


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("vocabulary", [5, 256, 2000])
def test_tokens_are_those_of_the_reference(vocabulary: int, temperature: float, top_p: float) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(40, vocabulary, generator=generator) * 2
    draws = torch.rand(40, generator=generator, dtype=torch.float64)
    found = sample(logits, draws, temperature=temperature, top_p=top_p)
    rows = zip(logits.numpy(), draws.tolist(), strict=True)
    assert found.tolist() == [reference(row, draw, temperature, top_p) for row, draw in rows]


def test_a_nucleus_wider_than_the_head_of_the_order_is_whole() -> None:
    logits = torch.zeros(1, 1000).expand(4000, 1000) + torch.linspace(0, 1e-3, 1000)  # all but equal: 900 reach 0.9
    draws = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = sample(logits, draws, temperature=1.0, top_p=0.9)
    assert len(found.unique()) > 850
    assert found.min() >= 98  # the least likely tenth is out


def test_a_neighbour_with_a_wide_nucleus_does_not_change_a_row_with_ties() -> None:
    tied = torch.full((1, 600), -20.0)
    tied[0, torch.randperm(600, generator=torch.Generator().manual_seed(1))[:40]] = 1.0
    wide = torch.zeros(1, 600)
    for draw in torch.linspace(0, 0.99, 25, dtype=torch.float64):
        alone = sample(tied, draw[None], temperature=1.0, top_p=0.9)
        beside = sample(torch.cat([tied, wide]), draw.expand(2), temperature=1.0, top_p=0.9)
        assert beside[0] == alone[0]


@pytest.mark.parametrize("top_p", [0.75, 1.0])
def test_many_draws_follow_the_distribution(top_p: float) -> None:
    count = 60_000
    logits = torch.tensor([1.0, 0.2, -0.5, 2.0, -3.0, 0.9])
    draws = torch.rand(count, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    found = sample(logits.expand(count, 6), draws, temperature=0.7, top_p=top_p)
    probabilities = torch.softmax(logits.double() / 0.7, dim=0)
    if top_p < 1:
        kept = probabilities.argsort(descending=True)[:2]  # 0.64 alone does not reach 0.75, with 0.15 it does
        probabilities = torch.zeros(6, dtype=torch.float64).index_copy(0, kept, probabilities[kept])
        probabilities = probabilities / probabilities.sum()
    seen = torch.bincount(found, minlength=6).double()
    expected = probabilities * count
    assert bool((seen[expected == 0] == 0).all())
    live = expected > 0
    chi_square = float(((seen - expected)[live] ** 2 / expected[live]).sum())
    freedom = int(live.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)  # four standard deviations


@pytest.mark.parametrize("draw", [0.0, math.nextafter(1.0, 0.0)])
@pytest.mark.parametrize("top_p", [0.3, 0.5, 0.9, 1.0])
def test_the_ends_of_the_unit_interval_stay_inside_the_nucleus(draw: float, top_p: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(500, 300, generator=generator)
    logits[:, :4] = -torch.inf  # tokens that can never be written, at both ends of the order
    logits[:, -4:] = -torch.inf
    found = sample(logits, torch.full((500,), draw, dtype=torch.float64), temperature=1.0, top_p=top_p)
    probabilities = torch.softmax(logits.double(), dim=-1)
    likelier = (probabilities * (probabilities > probabilities.gather(1, found[:, None]))).sum(dim=-1)
    assert bool((probabilities.gather(1, found[:, None]) > 0).all())
    assert bool((likelier < top_p).all())


def test_low_temperature_takes_the_likeliest() -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(4))
    draws = torch.rand(50, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert torch.equal(sample(logits, draws, temperature=1e-6, top_p=1.0), logits.argmax(dim=-1))
    assert torch.equal(sample(logits, draws, temperature=1.0, top_p=1e-6), logits.argmax(dim=-1))


@pytest.mark.parametrize(
    "options",
    [
        *({"temperature": wrong} for wrong in (-1.0, 5e-324, 1e-308, 1e-5, math.inf, math.nan)),
        *({"top_p": wrong} for wrong in (0.0, 1.5, math.nan)),
        *({"max_new_tokens": wrong} for wrong in (0, -3, True, 2.5, math.inf, math.nan)),
    ],
)
def test_what_nothing_can_be_drawn_by_is_refused(options: dict[str, Any]) -> None:
    ((name, wrong),) = options.items()
    with pytest.raises(BadValueError, match=f"{name} {re.escape(str(wrong))} is "):
        Sampling(**options)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_request_with_a_seed_that_no_generator_takes_is_refused(seed: int) -> None:
    with pytest.raises(BadValueError, match=f"seed {re.escape(str(seed))} of a request is no number from 0 to"):
        Request([], seed=seed)


def test_the_least_temperature_takes_the_likeliest_of_the_largest_logits() -> None:
    draws, sampling = torch.tensor([0.7], dtype=torch.float64), Sampling(temperature=1e-4)
    largest = torch.tensor([[-3e38, 3e38, 1.0, -3e38]])
    assert sample(largest, draws, temperature=sampling.temperature, top_p=1.0).tolist() == [1]
