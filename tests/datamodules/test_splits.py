"""Splits: disjoint, seeded, balanced, and the same whatever the order of the file."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from cotune.datamodules.splits import NAMES, Sizes, Splits, apportion, leak_notes, rotated, split
from cotune.programs import Example
from hypothesis import given, settings
from hypothesis import strategies as st


def examples(count: int, *, kinds: int = 3, prefix: str = "e") -> list[Example]:
    return [Example.of({"n": f"{prefix}{n}"}, {"kind": f"k{n % kinds}"}, id=f"{prefix}{n}") for n in range(count)]


def ids(part: tuple[Example, ...]) -> list[str]:
    return [example.id for example in part]


def all_ids(splits: Splits) -> list[str]:
    return [id_ for name in NAMES for id_ in ids(getattr(splits, name))]


def test_the_sets_have_the_sizes_asked_for_and_no_example_in_common() -> None:
    splits = split(examples(100), Sizes(40, 10, 20, 25), seed=0)
    assert [len(getattr(splits, name)) for name in NAMES] == [40, 10, 20, 25]
    assert len(set(all_ids(splits))) == 95


@pytest.mark.parametrize("stratify", [None, "kind"])
def test_the_row_order_of_the_file_does_not_matter(stratify: str | None) -> None:
    rows = examples(60)
    shuffled = random.Random(1).sample(rows, len(rows))
    sizes = Sizes(20, 10, 10, 10)
    assert split(rows, sizes, seed=3, stratify=stratify) == split(shuffled, sizes, seed=3, stratify=stratify)


def test_the_row_order_of_an_own_test_set_does_not_matter() -> None:
    rows, test = examples(30), examples(30, prefix="t")
    sizes = Sizes(10, 5, 5, 10)
    assert split(rows, sizes, seed=3, test=test) == split(rows, sizes, seed=3, test=test[::-1])


def test_another_seed_gives_other_sets() -> None:
    sizes = Sizes(20, 10, 10, 10)
    assert set(ids(split(examples(60), sizes, seed=0).train)) != set(ids(split(examples(60), sizes, seed=1).train))


def test_a_row_added_to_the_file_moves_few_others() -> None:
    sizes = Sizes(20, 0, 0, 0)
    before, after = (set(ids(split(examples(n), sizes, seed=0).train)) for n in (60, 61))
    assert len(before - after) <= 1


def test_stratified_sets_hold_each_value_in_proportion() -> None:
    splits = split(examples(150), Sizes(50, 20, 30, 50), seed=0, stratify="kind")
    counts = [sorted(Counter(e.labels["kind"] for e in getattr(splits, name)).values()) for name in NAMES]
    assert counts == [[16, 17, 17], [6, 7, 7], [10, 10, 10], [16, 17, 17]]


def test_a_stratified_set_is_not_sorted_by_label() -> None:
    train = split(examples(150), Sizes(50, 0, 0, 0), seed=0, stratify="kind").train
    assert len({e.labels["kind"] for e in train[:10]}) == 3


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=5),
    st.lists(st.integers(0, 20), min_size=4, max_size=4),
    st.integers(0, 5),
)
@settings(max_examples=200, deadline=None)
def test_any_stratified_split_is_disjoint_and_within_two_of_proportion(
    kinds: list[int], asked: list[int], seed: int
) -> None:
    rows = [Example.of({}, {"kind": k}, id=f"{k}-{n}") for k, count in enumerate(kinds) for n in range(count)]
    asked[0] = max(1, asked[0])
    if sum(asked) > len(rows):
        with pytest.raises(ValueError, match=f"{len(rows)} in the examples"):
            split(rows, Sizes(*asked), seed=seed, stratify="kind")
        return
    splits = split(rows, Sizes(*asked), seed=seed, stratify="kind")
    assert len(set(all_ids(splits))) == sum(asked)
    for name, size in zip(NAMES, asked, strict=True):
        got = Counter(e.labels["kind"] for e in getattr(splits, name))
        assert sum(got.values()) == size
        for kind, count in enumerate(kinds):
            # Each set is rounded once, from what the sets before it left, themselves off by less than one a set.
            assert abs(got[kind] - size * count / len(rows)) < 2


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(0, 400))
@settings(max_examples=200, deadline=None)
def test_apportioned_seats_add_up_and_are_within_one_of_the_quota(counts: list[int], size: int) -> None:
    size = min(size, sum(counts))
    seats = apportion(size, counts)
    assert sum(seats) == size
    for seat, count in zip(seats, counts, strict=True):
        assert 0 <= seat <= count
        assert abs(seat * sum(counts) - size * count) < max(1, sum(counts))


def test_more_seats_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot take 4 of 3"):
        apportion(4, [1, 2])


def test_sets_other_than_train_may_be_empty() -> None:
    splits = split(examples(5), Sizes(5, 0, 0, 0), seed=0)
    assert (splits.dev, splits.val, splits.test) == ((), (), ())


def test_an_own_test_set_is_where_test_comes_from() -> None:
    splits = split(examples(30), Sizes(10, 10, 10, 20), seed=0, test=examples(40, prefix="t"))
    assert len(splits.test) == 20
    assert all(id_.startswith("t") for id_ in ids(splits.test))
    assert all(id_.startswith("e") for part in (splits.train, splits.dev, splits.val) for id_ in ids(part))


def test_an_own_val_set_is_where_val_comes_from() -> None:
    splits = split(examples(20), Sizes(10, 10, 5, 5), seed=0, val=examples(5, prefix="v"), test=examples(5, prefix="t"))
    assert sorted(ids(splits.val)) == ["v0", "v1", "v2", "v3", "v4"]


def test_an_own_test_set_is_stratified_too() -> None:
    splits = split(examples(9), Sizes(3, 0, 0, 6), seed=0, stratify="kind", test=examples(30, prefix="t"))
    assert set(Counter(e.labels["kind"] for e in splits.test).values()) == {2}


def test_a_test_example_among_the_training_rows_is_refused_even_if_no_set_draws_it() -> None:
    leaked = [*examples(5, prefix="t"), Example.of({}, {"kind": "k0"}, id="e7")]
    with pytest.raises(ValueError, match=r'"e7" is both row 8 of the examples and row 6 of the test examples'):
        split(examples(30), Sizes(1, 0, 0, 1), seed=0, test=leaked)


@pytest.mark.parametrize(("kind", "said"), [("k1", "are equal"), ("k2", "have the same inputs and different labels")])
def test_rows_with_the_inputs_of_another_are_refused_by_name_number_and_count(kind: str, said: str) -> None:
    rows = [*examples(9), *(Example.of({"n": f"e{n}"}, {"kind": kind}, id=f"again{n}") for n in (1, 4))]
    with pytest.raises(ValueError, match=rf"^a\.csv, rows 2 and 10 {said} \(2 rows are such: .*data.duplicates drop"):
        split(rows, Sizes(1, 1, 1, 1), seed=0, where="a.csv")


def test_a_row_of_test_with_the_inputs_of_a_train_row_is_refused_too() -> None:
    leaked = [Example.of({"n": "e7"}, {"kind": "k0"}, id="other")]
    with pytest.raises(ValueError, match="row 8 and row 1 of the test examples have the same inputs"):
        split(examples(30), Sizes(1, 0, 0, 1), seed=0, test=leaked)


def test_drop_takes_each_once_whatever_the_order_and_leaves_test_its_own() -> None:
    rows, test = [*examples(10), *examples(4)], examples(3)
    splits = split(rows, Sizes(5, 1, 1, 3), seed=0, test=test, duplicates="drop")
    assert splits == split(rows[::-1], Sizes(5, 1, 1, 3), seed=0, test=test[::-1], duplicates="drop")
    assert set(ids(splits.test)) == {"e0", "e1", "e2"}
    assert {e.id for e in (*splits.train, *splits.dev, *splits.val)} == {f"e{n}" for n in range(3, 10)}
    assert splits.notes == (
        "7 of 17 rows have the inputs of another (7 with equal labels, 0 with others) and are left out",
    )
    assert not leak_notes(splits)


def test_keep_takes_all_and_says_how_many_leak() -> None:
    splits = split([*examples(4), *examples(4)], Sizes(4, 2, 1, 1), seed=0, duplicates="keep")
    assert len(set(all_ids(splits))) == 8
    assert "4 of 8 rows have the inputs of another" in splits.notes[0]
    seen = {str(e.inputs) for e in splits.train}
    leaked = sum(str(e.inputs) in seen for e in splits.dev)
    assert f"leakage: {leaked} of 2 dev" in leak_notes(splits)[0]


def test_duplicates_do_not_hide_that_too_few_are_left() -> None:
    with pytest.raises(ValueError, match=r"4 in a\.csv"):
        split([*examples(4), *examples(4)], Sizes(5, 0, 0, 0), seed=0, duplicates="drop", where="a.csv")


def test_two_rows_with_one_id_are_refused_by_their_numbers() -> None:
    rows = [*examples(4), Example.of({}, {}, id="e1")]
    with pytest.raises(ValueError, match=r'rows 2 and 5 of the examples have the same id "e1"'):
        split(rows, Sizes(1, 0, 0, 0), seed=0)


def test_overlapping_sets_cannot_be_built() -> None:
    a, b, c = examples(3)
    with pytest.raises(ValueError, match=r'"e0" is in both train and val'):
        Splits(train=(a, b), dev=(), val=(c, a), test=())
    with pytest.raises(ValueError, match=r'rows 1 and 2 of dev have the same id "e2"'):
        Splits(train=(a, b), dev=(c, c), val=(), test=())


def test_too_few_examples_says_how_many_there_are_and_what_to_lower() -> None:
    with pytest.raises(ValueError) as error:
        split(examples(150), Sizes(100, 20, 0, 50), seed=0)
    assert str(error.value) == (
        "too few examples: 150 in the examples, but train 100 + dev 20 + test 50 = 170 are needed. "
        "Lower sizes.train or sizes.dev or sizes.test by 20 in all."
    )


def test_too_small_an_own_test_set_asks_to_lower_test_only() -> None:
    with pytest.raises(ValueError, match=r"3 in the test examples, but test 5 are needed. Lower sizes.test by 2\.$"):
        split(examples(9), Sizes(1, 1, 1, 5), seed=0, test=examples(3, prefix="t"))


def test_stratifying_by_what_is_no_label_names_the_labels() -> None:
    with pytest.raises(ValueError, match=r'stratify="answer" is no label of example "e\d"; its labels are kind\.'):
        split(examples(9), Sizes(1, 1, 1, 1), seed=0, stratify="answer")


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((0, 1, 1, 1), "sizes.train is 0"),
        ((1, -2, 1, 1), "sizes.dev is -2"),
        ((1, 1, 2.5, 1), "sizes.val is 2.5"),
        ((1, 1, 1, True), "sizes.test is True"),
    ],
)
def test_impossible_sizes_are_refused(sizes: tuple[int, int, int, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Sizes(*sizes)


def test_over_all_folds_every_row_outside_test_is_in_val_once_whatever_the_sizes() -> None:
    rows = [Example.of({"n": n}, {"even": n % 2 == 0}) for n in range(40)]
    own, more = rows[:30], {"val": rows[30:35], "test": rows[35:]}
    for drawn, outside in (
        (split(rows, Sizes(12, 6, 8, 6), seed=0, stratify="even"), 34),
        (split(own, Sizes(5, 2, 3, 2), seed=0, **more), 35),  # the rest of test's own rows stays out
    ):
        folds = [rotated(drawn, fold=k, folds=5, seed=0) for k in range(5)]
        assert len({e.id for fold in folds for e in fold.val}) == sum(len(fold.val) for fold in folds) == outside
        assert all(len(fold.train) + len(fold.dev) + len(fold.val) == outside for fold in folds)
        assert all(fold.test == folds[0].test and len(fold.test) == len(drawn.test) for fold in folds)
        assert f"of all {outside} but test" in folds[0].notes[-1]


@pytest.mark.parametrize("stratify", [None, "kind"])
def test_with_folds_no_size_but_tests_own_changes_which_rows_are_test(stratify: str | None) -> None:
    sizes = (Sizes(24, 6, 4, 6), Sizes(5, 2, 3, 6), Sizes(1, 0, 0, 6))
    drawn = [split(examples(40), one, seed=1, stratify=stratify) for one in sizes]
    first, *others = [rotated(one, fold=2, folds=5, seed=1) for one in drawn]
    assert others == [first, first]
    assert set(ids(first.test)).isdisjoint(ids((*first.train, *first.dev, *first.val)))
    own = split(examples(30), Sizes(5, 2, 3, 4), seed=1, stratify=stratify, test=examples(9, prefix="t"))
    assert rotated(own, fold=2, folds=5, seed=1).test == own.test


def test_folds_spread_the_labels_and_leave_test_alone() -> None:
    rows = [Example.of({"n": n}, {"kind": "rare" if n % 5 == 0 else "common"}) for n in range(30)]
    drawn = split(rows, Sizes(12, 6, 7, 5), seed=3, stratify="kind")
    folds = [rotated(drawn, fold=k, folds=5, seed=3) for k in range(5)]
    assert all(fold.test == drawn.test for fold in folds)
    assert {e.id for fold in folds for e in fold.val} == {e.id for e in rows} - {e.id for e in drawn.test}
    assert [fold.dev for fold in folds] == [folds[(k + 1) % 5].val for k in range(5)]
    assert {sum(e.labels["kind"] == "rare" for e in fold.val) for fold in folds} == {1}
    for fold, count in ((5, 5), (0, 2), (0, 26)):
        with pytest.raises(ValueError, match=f"fold {fold} of {count} folds, over 25 examples"):
            rotated(drawn, fold=fold, folds=count, seed=3)
