"""Values: what a value of the data looks like as text, and when what was said is the same as a label."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal
from itertools import groupby
from typing import Any

from cotune.programs.types import as_text, plain


def gold_text(label: Any) -> str:
    """A label in words, for hints and messages: of several right answers the first.

    >>> gold_text(["red", "crimson"]), gold_text(7.0)
    ('red', '7.0')
    """
    return _text(label[0] if isinstance(label, (list, tuple)) and label else label)


def same(said: Any, label: Any) -> bool:
    """Whether what a program said is the label, spelling aside (see `normalise`).

    A list as label holds several right answers; any of them will do, and so will a list of all of them, in order.

    >>> same("crimson", ["red", "crimson"]), same("1,200.0", 1200), same("35", "3.5"), same(True, "True")
    (True, True, False, True)
    """
    said, label = plain(said), plain(label)
    if said is None or label is None:
        return said is label
    if isinstance(label, Mapping):
        return isinstance(said, Mapping) and said.keys() == label.keys() and all(same(said[k], label[k]) for k in label)
    if isinstance(label, (list, tuple)):
        pairs = zip(said, label, strict=False) if isinstance(said, (list, tuple)) and len(said) == len(label) else ()
        return any(same(said, one) for one in label) or (bool(pairs) and all(same(one, gold) for one, gold in pairs))
    if isinstance(said, bool) != isinstance(label, bool):
        truth, text = (said, label) if isinstance(said, bool) else (label, said)
        return normalise(text) in (("yes", "true") if truth else ("no", "false"))
    return normalise(said) == normalise(label)


def normalise(value: Any) -> str:
    """The value as text, without what is spelling and not meaning.

    NFD, lower case, white space folded, no article that stands before a word, and no punctuation, Unicode's included,
    except where it makes another thing of a word or number: 3.5, 1/2, 10:30, -5, 50 %, C#, A-. Symbols (+, <, $, ^)
    stay. A text that is one number has one writing: 7, 7.0 and "7" are equal, 1,200 is 1200, and 007, a code, is not 7.
    Where there is nothing but punctuation it stays. Applying it twice is applying it once.

    >>> normalise("  The  U.S.A., an idea "), normalise("+1,200.50"), normalise("“3.5”"), normalise("Hepatitis A.")
    ('usa idea', '1200.5', '3.5', 'hepatitis a')
    """
    text, before = _plain(value), None
    while text != before:
        text, before = _once(text), text
    return text


def number_of(value: Any) -> Decimal | None:
    """The number that a value is, if it is one and nothing else: 7, "7.0", "1,200", "$ 5"; None for anything else.

    >>> number_of("1,200.50"), number_of("-5."), number_of("50 %"), number_of("5 or 6"), number_of(True)
    (Decimal('1200.50'), Decimal('-5'), Decimal('0.50'), None, None)
    """
    found = None if isinstance(value, bool) else _NUMBER.fullmatch(_bare(_plain(value)))
    return _decimal(found).scaleb({"%": -2, "‰": -3}.get(found["percent"], 0), _EXACT) if found else None


# Texts


_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"), "-")
_SPACED = dict.fromkeys(map(ord, "\u2014\u2015"), " ")
_WRITTEN_OTHERWISE = {**_DASHES, **_SPACED, 0x066B: ".", 0x066C: ",", 0x03C2: "σ", 0x2019: "'"}
_GROUPED = re.compile(
    r"(?<![\d.,])(?:[1-9]\d{0,2}(?:([,'_\u00a0\u2009\u202f])\d{3})(?:\1\d{3})*|[1-9]\d?(?:,\d\d)+,\d{3})(?![,\d])"
)
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s*(?P<before>[$€£¥₹₩]?)\s*(?P<inner>[-+]?)(?P<digits>\d+(?:\.\d*)?|\.\d+)"
    r"(?P<power>e[-+]?\d{1,6})?\s*(?:(?P<percent>[%‰])|(?P<behind>[$€£¥₹₩]))?"
)
_EXACT = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN)
_ARTICLES = ("a", "an", "the")


def _plain(value: Any) -> str:
    """The value as text, with one character for what Unicode has several of."""
    text = unicodedata.normalize("NFD", _text(value)).lower().translate(_WRITTEN_OTHERWISE)
    return unicodedata.normalize("NFD", "".join(map(_usual, text)))


def _text(value: Any) -> str:
    try:
        return as_text(value)
    except (TypeError, ValueError):  # labels and predictions may hold anything
        return str(value)


def _usual(char: str) -> str:
    """A digit of any script as 0 to 9, punctuation of full width as ASCII has it."""
    if char.isascii():
        return char
    kind = unicodedata.category(char)
    if kind == "Nd":
        return str(unicodedata.decimal(char))
    folded = unicodedata.normalize("NFKC", char) if kind[0] == "P" else char
    return folded if len(folded) == 1 else char


def _once(text: str) -> str:
    """One pass of `normalise`; later passes find what the removal of a character has left."""
    whole = _NUMBER.fullmatch(_bare(text))
    if whole and not re.match(r"0\d", whole["digits"]):
        return f"{whole['before'] or whole['behind'] or ''}{_written(_decimal(whole))}{whole['percent'] or ''}"
    text = _ungrouped(text)
    text = re.sub(r"(?<=\d)\s+(?=[%‰])", "", re.sub(r"(?<=\d)\s*([-/])\s*(?=\d)", r"\1", text))
    said = _without_articles("".join(_kept(text)).split())
    return unicodedata.normalize("NFD", " ".join(said)) or " ".join(text.split())


def _bare(text: str) -> str:
    """A text without the white space and punctuation around it that are no part of a number, and ungrouped."""
    first, last = 0, len(text)
    while first < last and (text[first].isspace() or (_is_mark(text, first) and text[first] not in "-.")):
        first += 1
    while first < last and (text[last - 1].isspace() or (_is_mark(text, last - 1) and text[last - 1] != "-")):
        last -= 1
    return _ungrouped(text[first:last])


def _ungrouped(text: str) -> str:
    """The text without what groups the digits of its numbers."""
    return _GROUPED.sub(lambda found: re.sub(r"\D", "", found[0]), text)


def _kept(text: str) -> Iterator[str]:
    """The text in pieces, of each run of punctuation only what has a meaning there."""
    place = 0
    for is_mark, group in groupby(range(len(text)), lambda at: _is_mark(text, at)):
        run = text[place : place + len(list(group))]
        before, after = text[:place][-1:], text[place + len(run) :][:1]
        place += len(run)
        yield _meant(run, before, after, text[place:].lstrip()[:1]) if is_mark else run


def _is_mark(text: str, at: int) -> bool:
    """Whether a character is punctuation; % is a unit, and # behind a letter belongs to it (C#)."""
    char = text[at]
    if char in "%‰`´":
        return char in "`´"
    return unicodedata.category(char)[0] == "P" and not (char == "#" and text[:at][-1:].isalpha())


def _meant(run: str, before: str, after: str, next_word: str) -> str:
    if before.isdigit() and after.isdigit():
        return run if len(run) == 1 and run != "," else " "
    if after.isdigit():  # a sign, a point
        tail = re.search(r"-?\.?$", run)
        return tail[0] if tail and not before.isalpha() else ""
    if run[0] == "-" and before.isalnum() and (not after or after.isspace()):  # A-, 1969-
        return "-"
    return "-" if run[-1] == "-" and after.isspace() and next_word.isdigit() else ""


def _without_articles(words: list[str]) -> list[str]:
    kept: list[str] = []
    for word in reversed(words):
        # Not the last word (Hepatitis A), and an "a" not before a letter (A, B): those name something.
        if word not in _ARTICLES or not kept or (word == "a" and len(kept[-1]) == 1):
            kept.append(word)
    return kept[::-1]


# Numbers


def _decimal(found: re.Match[str]) -> Decimal:
    sign = "-" if (found["sign"] + found["inner"]).count("-") == 1 else ""
    return Decimal(f"{sign}{found['digits']}{found['power'] or ''}")


def _written(number: Decimal) -> str:
    """A number in its one writing: no zeros that say nothing, an exponent only beyond forty digits."""
    sign, places, exponent = number.as_tuple()
    assert isinstance(exponent, int)
    digits = "".join(map(str, places)).lstrip("0")
    kept = digits.rstrip("0")
    exponent += len(digits) - len(kept)
    if not kept:
        return "0"
    if not -40 <= exponent <= 40:
        text = f"{kept}e{exponent}"
    elif exponent >= 0:
        text = kept + "0" * exponent
    else:
        padded = kept.rjust(1 - exponent, "0")
        text = f"{padded[:exponent]}.{padded[exponent:]}"
    return f"-{text}" if sign else text
