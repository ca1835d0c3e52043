"""Metrics: the tricky cases of exact match and of the last number of a line."""

from __future__ import annotations

import pytest
from cotune.programs import Example, exact_match, first_line_number
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
    assert exact_match(gold(answer=label), {"answer": said}) == 1.0


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
    assert exact_match(gold(answer=label), {"answer": said}) == 0.0


@pytest.mark.parametrize("label", ["A", "+", "..."])
def test_a_label_of_articles_or_punctuation_only_still_matches_itself(label: str) -> None:
    assert exact_match(gold(answer=label), {"answer": f" {label.lower()} "}) == 1.0


def test_all_labels_count_and_a_field_that_is_not_there_is_not_equal() -> None:
    example = gold(answer="1", unit="m")
    assert exact_match(example, {"answer": "1", "unit": "m", "reasoning": "..."}) == 1.0
    assert exact_match(example, {"answer": "1", "unit": "s"}) == 0.0
    assert exact_match(example, {"answer": "1"}) == 0.0


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
    assert first_line_number(gold(answer="18"), {"answer": said}) == score


def test_gsm8k_without_an_answer_scores_0_and_without_a_gold_number_raises() -> None:
    assert first_line_number(gold(answer="18"), {}) == 0.0
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
    assert first_line_number(gold(answer="18"), {"answer": said}) == score


@pytest.mark.parametrize("said", ["-18", "x = -18", "$-18", "it is −18", "(-18)"])
def test_a_minus_in_front_counts_whatever_its_character(said: str) -> None:
    assert first_line_number(gold(answer="-18"), {"answer": said}) == 1.0


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
        ("“Yes”", '"Yes"', 0.0),  # only ASCII punctuation goes, as in the official script
        ("1969–1974", "1969-1974", 0.0),
        ("rock and roll", "rock & roll", 0.0),
        ("New York", "new\tyork\n", 1.0),
    ],
)
def test_hotpotqa_answers_in_odd_spellings(label: str, said: str, score: float) -> None:
    assert exact_match(gold(answer=label), {"answer": said}) == score
