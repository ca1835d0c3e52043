"""Values: one value has one text, equal numbers are equal in any writing, and what differs in meaning stays apart."""

from __future__ import annotations

from datetime import date
from decimal import Decimal

import pytest
from claims import claimed
from cotune.programs.types import as_text
from cotune.programs.values import gold_text, normalise, number_of, same
from hypothesis import given
from hypothesis import strategies as st

MANY = claimed(150)

NUMBERS = st.one_of(
    st.integers(-(10**15), 10**15).map(Decimal),
    st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=4),
)
ODD = "aAtThe bB.,:;-−–—'’\"“”`*/\\+#%$€()[]{}_ \t\n0123456789٣３½²ÄäÅßΣςÉe\u0301\u0323\u202f…"
TEXTS = st.one_of(st.text(), st.text(ODD, max_size=20))


def plain(number: Decimal) -> str:
    text = f"{number:f}"
    return text if Decimal(text) else "0"


@st.composite
def writings(draw: st.DrawFn, number: Decimal) -> str:
    """One of the ways in which people and LMs write a number."""
    whole, _, places = plain(abs(number)).partition(".")
    if draw(st.booleans()):
        whole = f"{int(whole):{draw(st.sampled_from(',_'))}}"
    places = places + "0" * draw(st.integers(0, 2))
    text = f"{whole}.{places}" if places else whole
    if draw(st.booleans()):
        text = f"{abs(number):e}" if number else text
    sign = draw(st.sampled_from("-−")) if number < 0 else draw(st.sampled_from(["", "+"]))
    around = draw(st.sampled_from(["{}", " {} ", "{}.", '"{}"', "**{}**", "({})", "`{}`"]))
    return around.format(sign + text)


@MANY
@given(TEXTS)
def test_normalising_twice_is_normalising_once(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert same(text, text)
    assert same(once, text)


@MANY
@given(NUMBERS, st.data())
def test_a_number_equals_itself_in_any_writing(number: Decimal, data: st.DataObject) -> None:
    one, other = data.draw(writings(number)), data.draw(writings(number))
    assert same(one, other)
    assert number_of(one) == number
    if number == number.to_integral_value():
        assert same(one, int(number))
    if Decimal(repr(float(number))) == number:
        assert same(float(number), one)


@MANY
@given(NUMBERS, NUMBERS, st.data())
def test_different_numbers_never_match(number: Decimal, other: Decimal, data: st.DataObject) -> None:
    assert same(data.draw(writings(number)), data.draw(writings(other))) == (number == other)


@MANY
@given(TEXTS, st.lists(st.one_of(TEXTS, st.integers(), st.booleans()), min_size=1, max_size=4))
def test_a_list_matches_iff_one_of_it_matches(said: str, golds: list[object]) -> None:
    assert same(said, golds) == any(same(said, gold) for gold in golds)
    assert all(same(gold, golds) for gold in golds)


@MANY
@given(st.one_of(TEXTS, st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans()))
def test_what_is_shown_is_what_is_compared(value: object) -> None:
    assert same(as_text(value), value)
    assert same(gold_text([value, "another"]), [value, "another"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *[("3.5", "35"), ("-5", "5"), ("- 5", "5"), ("1/2", "12"), ("50%", "50"), ("C++", "C"), ("C#", "C")],
        *[("10:30", "1030"), ("1.2.3", "123"), ("3,5", "35"), ("1, 2", "12"), ("2.(3)", "23"), ("<5", ">5")],
        *[("A-", "A"), ("A+", "A"), ("O-", "O+"), ("Hepatitis A", "Hepatitis"), ("A, B", "B"), ("$5", "€5")],
        *[("007", "7"), ("Python 3.10", "Python 3.1"), (True, 1), ("true", False), (None, "none"), ("x^2", "x2")],
        *[("1 200", "1200"), (["red"], "red"), (9007199254740993, 9007199254740992.0)],
    ],
)
def test_what_differs_in_meaning_differs(one: object, other: object) -> None:
    assert not same(one, other)
    assert not same(other, one) or isinstance(one, list)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *[(7.0, 7), (7.0, "7"), ("7.0", 7), ("1,200", 1200), ("12,34,567", 1234567), (1e22, 10**22), ("1e3", "1000")],
        *[("50 %", "50%"), ("−5", -5), ("３．５", 3.5), ("$5.00", "$5"), (True, "True"), ("it’s", "it's")],
        *[("“Yes”", "yes"), ("¿Sí?", "sí"), ("「東京」", "東京"), ("COVID‑19", "covid-19"), ("1969–1974", "1969-1974")],
        *[(True, "yes"), (False, "No."), (date(2024, 7, 26), "2024-07-26")],
        *[({"a": 7.0}, {"a": "7"}), (["7.0", "red"], [7, "Red."])],
    ],
)
def test_what_differs_in_spelling_is_the_same(one: object, other: object) -> None:
    assert same(one, other)
    assert same(other, one)


def test_a_number_with_a_huge_exponent_takes_no_time() -> None:
    assert not same("1e999999", "1e-999999")
    assert normalise("1" * 5000 + ".5") == "1" * 5000 + ".5"
