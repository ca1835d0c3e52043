"""Intervals over seeds and test examples: against a slow reference, on known cases, and how often they hold."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from cotune.reporting.statistics import Scores, paired_difference, widened


def scores(table: list[list[float]]) -> dict[int, dict[str, float]]:
    return {seed: {f"e{n}": score for n, score in enumerate(row)} for seed, row in enumerate(table)}


def reference(first: Scores, second: Scores, resamples: int) -> tuple[float, float]:
    """The pigeonhole bootstrap as one would say it: draw seeds, draw examples, average their pairs."""
    rng = random.Random(1)
    gaps = {(s, e): first[s][e] - second[s][e] for s in first for e in first[s] if e in second.get(s, {})}
    seeds, ids = sorted({s for s, _ in gaps}), sorted({e for _, e in gaps})
    means = []
    for _ in range(resamples):
        # Each seed sees the same draw of examples: that is what makes it a pigeonhole and not a hierarchy.
        picked = rng.choices(ids, k=len(ids))
        pairs = [(s, e) for s in rng.choices(seeds, k=len(seeds)) for e in picked]
        there = [gaps[pair] for pair in pairs if pair in gaps]
        if there:
            means.append(sum(there) / len(there))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def drawn(seed: int, *, seeds: int, examples: int, by_seed: float, by_example: float) -> Scores:
    rng = np.random.default_rng(seed)
    of_seed, of_example = rng.normal(0, by_seed, (seeds, 1)), rng.normal(0, by_example, (1, examples))
    return scores((of_seed + of_example + rng.normal(0, 1, (seeds, examples))).tolist())


ZERO = scores([[0.0] * 40] * 6)


def test_noise_of_a_judge_may_take_a_positive_difference_below_0() -> None:
    low, high = widened(0.05, (0.01, 0.10), 0.01, floor=-1.0)
    assert low == pytest.approx(0.05 - math.hypot(0.04, 1.96 * 0.1), abs=1e-3)
    assert high == pytest.approx(0.05 + math.hypot(0.05, 1.96 * 0.1), abs=1e-3)
    assert widened(0.05, (0.01, 0.10), 0.01)[0] == 0.0  # of a score


def test_it_agrees_with_a_plain_reference() -> None:
    first = drawn(0, seeds=4, examples=30, by_seed=0.5, by_example=0.5)
    found = paired_difference(ZERO, first)
    assert found is not None
    low, high = reference(first, ZERO, 4000)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05)
    assert found.mean == pytest.approx(np.mean([list(row.values()) for row in first.values()]))
    assert (found.seeds, found.examples, found.pairs) == (4, 30, 120)


def test_equal_scores_have_no_difference_and_no_width() -> None:
    found = paired_difference(ZERO, ZERO)
    assert found is not None
    assert (found.mean, found.low, found.high) == (0, 0, 0)


def test_a_difference_that_is_the_same_everywhere_is_as_wide_as_so_few_examples_leave_it() -> None:
    found = paired_difference(scores([[0.75] * 9] * 3), scores([[1.0] * 9] * 3))
    assert found is not None
    rest = 1 - 0.025 ** (1 / 9)
    assert (found.mean, found.low, found.high) == pytest.approx((0.25, 0.25 - 0.5 * rest, 0.25 + 0.5 * rest))


@pytest.mark.parametrize("n", [1, 2, 5, 6, 50])
@pytest.mark.parametrize("seeds", [1, 3])
def test_examples_that_are_all_won_are_a_clear_difference_where_a_sign_test_says_so(n: int, seeds: int) -> None:
    for sign in (1, -1):
        won, lost = scores([[1.0] * n] * seeds), scores([[0.0] * n] * seeds)
        found = paired_difference(lost, won) if sign > 0 else paired_difference(won, lost)
        assert found is not None
        assert found.mean == sign
        assert found.clear == (2 * 0.5**n < 0.05)
        near, far = (found.low, found.high) if sign > 0 else (found.high, found.low)
        assert (sign * near, far) == pytest.approx((1 - 2 * (1 - 0.025 ** (1 / n)), sign))


def test_a_few_equal_scores_do_not_show_that_there_is_no_difference() -> None:
    found = paired_difference(scores([[1.0]]), scores([[1.0]]))
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((0, -0.975, 0.975))


def test_with_one_seed_it_is_the_bootstrap_over_examples() -> None:
    values = [0.0, 1.0] * 50
    found = paired_difference(scores([[0.0] * 100]), scores([values]))
    assert found is not None
    # The mean of 100 draws of a fair coin: 0.5 +- 1.96 * 0.05.
    assert (found.low, found.high) == pytest.approx((0.402, 0.598), abs=0.015)
    assert found.clear
    chance = paired_difference(scores([[0.0, 1.0]]), scores([[1.0, 0.0]]))
    assert chance is not None
    assert not chance.clear


def test_pairing_takes_out_what_makes_examples_hard() -> None:
    hard = np.random.default_rng(0).integers(0, 2, 200).astype(float)
    found = paired_difference(scores([(hard * 0.5).tolist()] * 3), scores([(hard * 0.5 + 0.25).tolist()] * 3))
    assert found is not None
    rest = 1 - 0.025 ** (1 / 200)  # what 200 examples leave open; the bootstrap adds nothing
    assert (found.low, found.high) == pytest.approx((0.25 - 0.5 * rest, 0.25 + 0.5 * rest))


def test_only_common_seeds_and_examples_are_compared() -> None:
    first = {0: {"a": 1.0, "b": 1.0}, 1: {"a": 0.0}, 7: {"a": 1.0}}
    second = {0: {"b": 0.0, "c": 1.0}, 1: {"a": 1.0}, 8: {"a": 0.0}}
    found = paired_difference(second, first)
    assert found is not None
    assert (found.mean, found.pairs, found.seeds, found.examples) == (0.0, 2, 2, 2)
    assert paired_difference({0: {"a": 1.0}}, {1: {"a": 1.0}}) is None
    assert paired_difference(second, {}) is None


def test_test_sets_that_differ_by_seed_are_taken_as_they_are() -> None:
    first = {seed: {f"{seed}-{n}": float(n % 2) for n in range(20)} for seed in range(3)}
    second = {seed: dict.fromkeys(row, 0.0) for seed, row in first.items()}
    found = paired_difference(second, first)
    assert found is not None
    assert found.mean == pytest.approx(0.5)
    assert found.low < 0.45
    assert found.high > 0.55


@pytest.mark.parametrize(("by_seed", "by_example"), [(0.0, 0.0), (0.4, 0.0), (0.0, 1.0), (0.3, 0.7)])
def test_intervals_of_no_difference_hold_zero_about_as_often_as_they_say(by_seed: float, by_example: float) -> None:
    held = 0
    for seed in range(150):
        found = paired_difference(
            ZERO, drawn(seed, seeds=6, examples=40, by_seed=by_seed, by_example=by_example), resamples=400
        )
        assert found is not None
        held += found.low <= 0 <= found.high
    # Six seeds' own variance is estimated 5/6 of what it is; pairs drawn independently would hold 60 % of these.
    assert held / 150 >= 0.86
