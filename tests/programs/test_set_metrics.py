"""Set metrics: right on sets worked out by hand, with intervals that hold the value and are the same each time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from cotune.programs import Example
from cotune.programs.set_metrics import Answered, auc, macro_f1, measured, set_metric


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
    assert measured(["auc"], done) == {}, "what cannot be computed is left out"


def test_a_set_metric_of_ones_own_is_named_by_its_module_and_an_unknown_name_lists_the_known() -> None:
    assert set_metric("cotune.programs.set_metrics.auc") is auc
    with pytest.raises(ValueError, match=r'no set metric "macro_f2" .* macro_f1, auc'):
        set_metric("macro_f2")
