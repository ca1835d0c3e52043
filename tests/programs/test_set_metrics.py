"""Set metrics: right on sets worked out by hand, with intervals that hold the value and are the same each time."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
from cotune.programs import Example
from cotune.programs.set_metrics import SET_METRICS, Answered, auc, macro_f1, measured, set_metric


def answered(golds: Sequence[Any], said: Sequence[Any]) -> list[Answered]:
    return [
        (Example.of({"n": n}, {"kind": gold}), None if answer is None else {"kind": answer})
        for n, (gold, answer) in enumerate(zip(golds, said, strict=True))
    ]


def test_macro_f1_counts_rare_classes_as_much_as_frequent_ones() -> None:
    # a: precision 3/4, recall 1; b: never said
    assert macro_f1(answered("aaab", "aaaa")) == pytest.approx((2 * 3 / 7 + 0) / 2)
    assert macro_f1(answered("aab", "aab")) == 1.0


def test_an_answer_of_no_class_and_a_failed_run_are_wrong_and_no_class() -> None:
    assert macro_f1(answered(["a", "b", "b"], ["A.", "x", None])) == pytest.approx((1 + 0) / 2)
    assert macro_f1(answered([["a", "one"], "b"], ["one", "b"])) == 1.0


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    assert auc(answered([1, 1, 0, 0], [0.9, 0.4, 0.4, 0.1])) == pytest.approx((3 + 0.5) / 4)
    assert auc(answered([True, False], ["0.2", "0.7"])) == 0.0
    assert auc(answered(["yes", "no"], [0.7, None])) == 1.0
    with pytest.raises(ValueError, match="there are 2 and 0"):
        auc(answered([1, 1], [0.5, 0.6]))


def test_the_interval_holds_the_value_and_is_the_same_each_time() -> None:
    done = answered("ab" * 8, "aa" * 4 + "ab" * 4)
    found = measured(["macro_f1"], done)
    value, low, high = found["macro_f1"]
    assert 0 < low < value < high < 1
    assert found == measured(["macro_f1"], done)


def macro_f1_of_classes(golds: Sequence[str], said: Sequence[str]) -> float:
    scores = []
    for kind in set(golds):
        right = sum(g == s == kind for g, s in zip(golds, said, strict=True))
        precision, recall = right / max(said.count(kind), 1), right / golds.count(kind)
        scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    return sum(scores) / len(scores)


@pytest.mark.parametrize(
    ("yes", "no", "said_yes", "said_no"),
    [
        ("yes", "no", True, False),
        ("True", "false", True, False),
        (True, False, "Yes.", "no"),
        (True, False, "true", "False"),
        (True, False, True, False),
        ("yes", "no", "Yes.", "no"),
    ],
)
def test_truth_is_the_same_class_in_a_typed_answer_and_in_a_label_of_text(
    yes: Any, no: Any, said_yes: Any, said_no: Any
) -> None:
    rng = random.Random(0)
    golds, said = ([rng.random() < 0.4 for _ in range(40)] for _ in range(2))
    done = answered([yes if gold else no for gold in golds], [said_yes if one else said_no for one in said])
    words = [["ny"[one] for one in part] for part in (golds, said)]
    assert macro_f1(done) == pytest.approx(macro_f1_of_classes(*words))
    pairs = [
        (a, b) for gold, a in zip(golds, said, strict=True) if gold for b, g in zip(said, golds, strict=True) if not g
    ]
    assert auc(done) == pytest.approx(sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs))


def test_a_wrong_answer_counts_for_the_class_that_it_equals_and_a_missing_one_for_none() -> None:
    # b: precision 1/2, recall 1; a: never said
    assert macro_f1(answered([["a", "one"], ["b", "two"]], ["two", "b"])) == pytest.approx((0 + 2 / 3) / 2)
    assert macro_f1(answered(["none", "a"], [None, "a"])) == pytest.approx((0 + 1) / 2)


def test_auc_reads_truth_and_infinite_numbers_and_refuses_where_no_run_has_a_number() -> None:
    assert auc(answered(["yes", "no"] * 3, [True, False] * 3)) == auc(answered(["yes", "no"], ["Yes", "no"])) == 1.0
    assert auc(answered([1, 1, 0, 0], [math.inf, 0.5, math.nan, None])) == 1.0
    with pytest.raises(ValueError, match='in the field "score" or "kind"; no run has one'):
        auc(answered([1, 0], ["high", None]))


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (lambda done: sum(prediction["kind"] == "a" for _, prediction in done), "TypeError: 'NoneType' object is"),
        (lambda done: None, "it returned None, which is not a finite number"),
        (lambda done: math.nan, "it returned nan"),
        (lambda done: 1e400, "it returned inf"),
        (lambda done: "0.5", "it returned '0.5'"),
        (lambda done: 1 / 0, "ZeroDivisionError"),
        (lambda done: exit("no"), "SystemExit: no"),
    ],
)
def test_a_set_metric_that_fails_is_left_out_with_a_warning_and_the_others_are_computed(
    metric: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SET_METRICS, "own", metric)
    with pytest.warns(UserWarning, match=r"the set metric own could not be computed and is left out; .*" + said):
        assert list(measured(["own", "macro_f1"], answered("ab", ["a", None]))) == ["macro_f1"]


def test_a_set_metric_that_changes_what_it_is_given_changes_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def wipes(done: Any) -> float:
        for _, prediction in done:
            prediction.clear()
        return 1.0

    monkeypatch.setitem(SET_METRICS, "own", wipes)
    done = answered("ab", "ab")
    assert measured(["own"], done) == {"own": [1.0, 1.0, 1.0]}
    assert done == answered("ab", "ab")


def test_a_set_metric_of_ones_own_is_named_by_its_module_and_an_unknown_name_lists_the_known() -> None:
    assert set_metric("cotune.programs.set_metrics.auc") is auc
    with pytest.raises(ValueError, match=r'no set metric "macro_f2" .* macro_f1, auc'):
        set_metric("macro_f2")
    with pytest.raises(ValueError, match=r"math\.pi is no function"):
        set_metric("math.pi")
