"""Metrics: the tricky cases of exact match and of the last number of a line."""

from __future__ import annotations

from typing import Any

import pytest
from cotune.programs import Example, exact_match, f1, first_line_number, number_match
from cotune.programs.metrics import last_number


def gold(**labels: object) -> Example:
    return Example.of({}, labels, id="e")


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("The Beatles", "beatles"),
        ("a U.S. president", "US President."),
        ("Yes", "yes."),
        ("  two   words ", "two words"),
        ("Café", "Cafe\u0301"),  # composed and decomposed
        ("BJÖRK", "björk"),
        (42, "42"),
        ("1,200", "1200"),
        ('"An apple"', "apple"),
    ],
)
def test_equal_after_normalising(label: object, said: str) -> None:
    assert float(exact_match(gold(answer=label), {"answer": said})) == 1.0


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("yes", "no"),
        ("yes", "yes, it is"),
        ("Café", "Cafe"),  # accents are letters: NFD does not strip them
        ("theatre", "atre"),  # an article is a whole word
        ("3.5", "3 5"),
        ("A", "The"),  # nothing but an article on both sides
        ("+", "-"),  # nothing but punctuation
        ("x", ""),
        ("x²", "x2"),  # NFD keeps what NFKD would fold
    ],
)
def test_not_equal(label: str, said: str) -> None:
    assert float(exact_match(gold(answer=label), {"answer": said})) == 0.0


@pytest.mark.parametrize("label", ["A", "+", "..."])
def test_a_label_of_articles_or_punctuation_only_still_matches_itself(label: str) -> None:
    assert float(exact_match(gold(answer=label), {"answer": f" {label.lower()} "})) == 1.0


def test_all_labels_count_and_a_field_that_is_not_there_is_not_equal() -> None:
    example = gold(answer="1", unit="m")
    assert float(exact_match(example, {"answer": "1", "unit": "m", "reasoning": "..."})) == 1.0
    assert float(exact_match(example, {"answer": "1", "unit": "s"})) == 0.0
    assert float(exact_match(example, {"answer": "1"})) == 0.0


def test_exact_match_without_labels_raises_rather_than_scoring_all_right() -> None:
    with pytest.raises(ValueError, match="example e has no labels"):
        exact_match(gold(), {"answer": "1"})


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("18", 1.0),
        ("$18.00", 1.0),
        ("9 * 2 = 18 dollars.", 1.0),
        ("He makes 18,", 1.0),
        ("18\n7 more lines", 1.0),
        ("\n\n18", 1.0),
        ("18 of 20", 0.0),
        ("no number\n18", 0.0),
        ("-18", 0.0),
        ("180", 0.0),
        ("", 0.0),
        ("eighteen", 0.0),
    ],
)
def test_gsm8k_takes_the_last_number_of_the_first_line(said: str, score: float) -> None:
    assert float(first_line_number(gold(answer="18"), {"answer": said})) == score


def test_gsm8k_without_an_answer_scores_0_and_without_a_gold_number_raises() -> None:
    assert float(first_line_number(gold(answer="18"), {})) == 0.0
    with pytest.raises(ValueError, match="holds no number"):
        first_line_number(gold(answer="none"), {"answer": "18"})


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234,567.5", 1234567.5),
        ("-.5", -0.5),
        ("x=-3.", -3.0),
        ("1.", 1.0),
        ("a1b2", 2.0),
        ("...", None),
        (",", None),
    ],
)
def test_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("#### 18", 1.0),
        ("1,8", 1.0),  # commas never part numbers
        ("20 - 2 = 18", 1.0),
        ("20-38", 0.0),
        ("16-18", 1.0),  # a range, and no minus eighteen
        ("(20)-18", 1.0),
        ("18/1", 0.0),
        ("18 %", 1.0),
        ("€18,00", 0.0),  # a comma for decimals reads as 1800
        ("１８", 1.0),  # full-width digits
        ("18\r\nThe answer is 20.", 1.0),
        ("18\u2028so 20", 1.0),  # U+2028 ends a line too
    ],
)
def test_gsm8k_numbers_in_odd_places(said: str, score: float) -> None:
    assert float(first_line_number(gold(answer="18"), {"answer": said})) == score


@pytest.mark.parametrize("said", ["-18", "x = -18", "$-18", "it is −18", "(-18)"])
def test_a_minus_in_front_counts_whatever_its_character(said: str) -> None:
    assert float(first_line_number(gold(answer="-18"), {"answer": said})) == 1.0


@pytest.mark.parametrize(
    ("label", "said", "score"),
    [
        ("no", "No.", 1.0),
        ("no", "no, he did not", 0.0),
        ("An Officer and a Gentleman", "officer and gentleman", 1.0),
        ("The Who", "who", 1.0),
        ("the the", "The The", 1.0),  # nothing is left of either: compared as they stand
        ("Ångström", "A\u030angstro\u0308m", 1.0),  # the sign, composed and decomposed
        ("Straße", "strasse", 0.0),
        ("“Yes”", '"Yes"', 1.0),  # Unicode punctuation is punctuation
        ("1969–1974", "1969-1974", 1.0),
        ("rock and roll", "rock & roll", 0.0),
        ("New York", "new\tyork\n", 1.0),
    ],
)
def test_hotpotqa_answers_in_odd_spellings(label: str, said: str, score: float) -> None:
    assert float(exact_match(gold(answer=label), {"answer": said})) == score


def test_any_of_several_answers_counts_and_the_feedback_says_what_was_expected() -> None:
    example = gold(answer=["red", "crimson"])
    assert float(exact_match(example, {"answer": "Crimson."})) == 1.0
    wrong = exact_match(example, {"answer": "blue"})
    assert (wrong.value, wrong.feedback) == (0.0, "answer: expected 'red' (or 1 more), got 'blue'")
    assert "no such field; it has colour" in exact_match(example, {"colour": "red"}).feedback


@pytest.mark.parametrize("metric", [exact_match, f1, number_match])
def test_a_label_that_is_an_empty_list_equals_an_empty_list_alone(metric: Any) -> None:
    example = Example.of({"text": "nobody"}, {"people": []})
    assert [metric(example, {"people": said}).value for said in ([], ["Anna"], [7])] == [1.0, 0.0, 0.0]


def test_a_wrong_score_is_false_and_a_right_one_is_not() -> None:
    assert not exact_match(gold(answer="1"), {"answer": "2"})
    assert exact_match(gold(answer="1"), {"answer": "1"})


@pytest.mark.parametrize(
    ("label", "said", "score"),
    [
        (7, "7.0", 1),
        ("1,200", 1200, 1),
        (0.5, "50%", 1),
        ([1, 2], "2", 1),
        (35, "3.5", 0),
        (7, "7 or 8", 0),
        (7, None, 0),
    ],
)
def test_number_match_compares_whole_numbers(label: object, said: object, score: float) -> None:
    assert float(number_match(gold(total=label), {"total": said})) == score


def test_number_match_refuses_a_label_that_is_no_number() -> None:
    with pytest.raises(ValueError, match="example e: the label 'seven' holds no number"):
        number_match(gold(total="seven"), {"total": "7"})


@pytest.mark.parametrize(
    ("label", "said", "score"),
    [
        ("the red house", "a red barn", 0.5),
        (["blue", "red house"], "red house", 1.0),
        ("red red", "red", 2 / 3),
        ("red", "blue", 0.0),
        ("1,200", "1200.0", 1.0),
    ],
)
def test_f1_is_the_words_shared(label: object, said: str, score: float) -> None:
    assert float(f1(gold(answer=label), {"answer": said})) == pytest.approx(score)


@pytest.mark.parametrize(
    ("metric", "label", "said", "score"),
    [
        (f1, ["lamp", "desk"], ["lamp", "desk"], 1),
        (f1, ["lamp", "desk"], ["desk", "chair"], 0.5),
        (f1, [["lamp"], ["desk", "chair"]], ["desk", "chair"], 1),
        (f1, "yes", True, 1),
        (number_match, [3, 5], [3, 5], 1),
        (number_match, ["3", "5"], ["3.0", "$5"], 1),
        (number_match, [3, 5], [5, 3], 0),
        (number_match, [3, 5], [3], 0),
        (number_match, [[3, 5], [7]], [3, 5], 1),
        (number_match, 7, [7], 0),
    ],
)
def test_a_list_of_all_answers_is_compared_as_a_whole(metric: Any, label: Any, said: Any, score: float) -> None:
    assert float(metric(gold(answer=label), {"answer": said})) == pytest.approx(score)
    if score < 1 and isinstance(label, list):
        assert f"expected {label}, got {said}" in metric(gold(answer=label), {"answer": said}).feedback


@pytest.mark.parametrize("said", [None, {1, 2}, object, [], True])
@pytest.mark.parametrize("metric", [exact_match, f1, number_match, first_line_number])
def test_a_prediction_of_any_kind_is_a_wrong_answer_and_no_fault(metric: Any, said: Any) -> None:
    assert float(metric(gold(answer="18"), {"answer": said})) == 0.0


def test_a_label_without_a_value_is_equal_to_none_alone() -> None:
    assert exact_match(gold(answer=None), {"answer": None})
    assert exact_match(gold(answer=None), {"answer": "x"}).feedback == "answer: expected 'None', got 'x'"


@pytest.mark.parametrize(("label", "said"), [("0.00005", 0.00005), (1e16, "10000000000000000"), ("18", 18.0)])
def test_gsm8k_reads_a_number_that_python_writes_with_an_exponent(label: Any, said: Any) -> None:
    assert float(first_line_number(gold(answer=label), {"answer": said})) == 1.0
    assert float(first_line_number(gold(answer="5"), {"answer": 0.00005})) == 0.0


def test_numbers_beyond_a_floats_precision_are_told_apart() -> None:
    assert not first_line_number(gold(answer="9007199254740993"), {"answer": "9007199254740992"})
