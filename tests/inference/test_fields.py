"""Filling in: whatever an LM writes, a completion is its layout's fixed texts and fields, in ids that decode to it."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cotune.inference import Codec, Filling, Plan, canonical_share
from cotune.programs import Json, Signature
from cotune.programs.layout import FREE, Choices, Field, Fixed, Layout, Number, Pattern, Schema
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_tokenizers import CORPUS, END, KINDS, codec

CPU = torch.device("cpu")
NUMBER = r"-?(\d{1,3}(,\d{3})+|\d+)"
TEXTS = ("\nanswer:", "\n\nso the answer is", "<answer>", "]] ## answer ##", "日本語:", '\n{"a":')
STOPS = ("\n", "\nanswer:", ".", "answer", "</", "。", " no", "1")
SYNTAXES = (
    Choices(("yes", "no", "maybe", "maybe not")),
    Choices(("Iris-setosa", "Iris-versicolor")),
    Choices(("1", "12", "120")),
    Number(),
    Number(integer=True),
)

each_kind = pytest.mark.parametrize("kind", KINDS)

HALF_A_CHARACTER = (Field("a", may_be_empty=True), Fixed("<answer>"), Field("a", stops=("answer",)))
"""With seed 8907 the last field begins with one, and is cut off where the room ends."""


def layouts(*, guided: bool = True) -> st.SearchStrategy[Layout]:
    """Layouts of one to three fields, with a fixed text before, between and behind them or not."""
    free = st.builds(
        Field,
        st.sampled_from("abc"),
        stops=st.lists(st.sampled_from(STOPS), max_size=2, unique=True).map(tuple),
        max_tokens=st.none() | st.integers(1, 12),
        may_be_empty=st.booleans(),
    )
    bound = st.builds(
        Field,
        st.sampled_from("abc"),
        lead=st.sampled_from(("", " ", "\n")),
        syntax=st.sampled_from(SYNTAXES),
        stops=st.just(()) | st.just(("\n",)),
        max_tokens=st.none() | st.integers(1, 12),
    )
    fixed = st.sampled_from(TEXTS).map(Fixed)

    @st.composite
    def made(draw: Any) -> Layout:
        parts: list[Fixed | Field] = []
        for _ in range(draw(st.integers(1, 3))):
            if parts or draw(st.booleans()):
                parts.append(draw(fixed))
            parts.append(draw(free | bound if guided else free))
        if draw(st.booleans()):
            parts.append(draw(fixed))
        return tuple(parts)

    return made()


class Writer:
    """Stands in for an LM: draws tokens that are allowed, those of a few texts more often than others."""

    def __init__(self, codec: Codec, seed: int) -> None:
        self.rng = random.Random(seed)
        self.width = len(codec.vocabulary.tokens)
        self.queue: list[int] = []
        self.codec = codec

    def next(self, forbidden: torch.Tensor | None) -> int:
        if not self.queue:
            self.queue = self._more()
        token = self.queue.pop(0)
        if forbidden is not None and forbidden[token]:
            self.queue = []
            token = self.rng.choice((~forbidden).nonzero()[:, 0].tolist())
        return token

    def _more(self) -> list[int]:
        kind = self.rng.random()
        if kind < 0.1:
            return [END]
        if kind < 0.3:
            return [self.rng.randrange(3, self.width)]
        text = self.rng.choice([*TEXTS, *STOPS, " yes", " 12", " maybe not", "Let us think", " 1,250.", *CORPUS])
        ids = self.codec.encode(text)
        return ids[: self.rng.randint(1, len(ids))]


def filled(plan: Plan, writer: Writer, *, new: int, room: int) -> Filling:
    """A finished filling; what it says of itself on the way is checked."""
    filling = Filling(plan, max_new_tokens=new, room=room)
    before = list(filling.written)
    while filling.finished is None:
        filling.take(writer.next(filling.forbidden(writer.width, CPU)), -1.0)
        assert filling.kept <= len(before)
        assert filling.written[: filling.kept] == before[: filling.kept]
        assert filling.free <= filling.draws
        before = list(filling.written)
    return filling


def whole(layout: Layout, filling: Filling) -> str:
    """The text that the layout's fixed texts and the fields as they are filled in come to."""
    texts = iter(filling.fields)
    return "".join(part.text if isinstance(part, Fixed) else next(texts).text for part in layout)


def fits(field: Field, text: str) -> bool:
    """Whether the text is one that the field's syntax allows, its lead before it."""
    if not text.startswith(field.lead):
        return False
    value, syntax = text[len(field.lead) :], field.syntax
    if isinstance(syntax, Choices):
        return value in syntax.texts
    assert isinstance(syntax, Number)
    return re.fullmatch(NUMBER if syntax.integer else NUMBER + r"(\.\d+)?", value) is not None


@each_kind
@settings(max_examples=150, deadline=None)
@given(layout=layouts(), seed=st.integers(0, 1 << 30), new=st.integers(1, 60), spare=st.integers(0, 60))
@example(layout=HALF_A_CHARACTER, seed=8907, new=6, spare=0)
def test_whatever_is_written_the_completion_is_its_layout(
    kind: str, layout: Layout, seed: int, new: int, spare: int
) -> None:
    plan = Plan(layout, codec(kind))
    room = plan.least + spare
    filling = filled(plan, Writer(plan.codec, seed), new=new, room=room)
    ids, fields = filling.written, [part for part in layout if isinstance(part, Field)]
    assert filling.text == whole(layout, filling)
    spoilt = kind == "dummy_prefix" and "\ufffd" in filling.text  # byte tokens: half a character spoils those before it
    assert plan.codec.decode(ids) == filling.text or spoilt
    assert [field.name for field in filling.fields] == [field.name for field in fields]
    assert len(ids) <= room
    assert filling.free <= plan.budget(new)
    assert plan.budget(new) == max(new, sum(plan.reserves(new)))
    assert len(filling.forced) == len(filling.log_probs) == len(ids)
    assert all(log_prob == 0 for log_prob, put in zip(filling.log_probs, filling.forced, strict=True) if put)
    assert END not in ids[:-1]
    assert (ids[-1:] == [END]) == (filling.finished == "eos")
    at = 0
    for field, found in zip(fields, filling.fields, strict=True):
        assert at <= found.start <= found.end <= len(ids)
        assert found.text in plan.codec.decode(ids[: found.end])
        assert not any(stop in found.text for stop in field.stops) or field.syntax is not None
        assert field.syntax is None or fits(field if field is not layout[0] else replace(field, lead=""), found.text)
        at = found.end


@each_kind
def test_a_field_is_cut_by_position_and_not_found_again_in_the_text(kind: str) -> None:
    layout = (Fixed("answer:"), Field("a", stops=(".",)), Fixed(".\nanswer:"), Field("b"))
    text = " answer: answer: no"
    filling = dictated(kind, layout, text, ".", " answer: yes")
    a, b = filling.fields
    assert (a.text, b.text) == (text, " answer: yes")
    assert codec(kind).decode(filling.written[: a.end]) == "answer:" + text


def dictated(kind: str, layout: Layout, *pieces: str | int, new: int = 64) -> Filling:
    """What comes of an LM that would write these pieces, each in the ids that it has there, and then end its turn."""
    plan = Plan(layout, codec(kind))
    filling = Filling(plan, max_new_tokens=new, room=1000)
    context = ""
    for piece in (*pieces, END):
        if isinstance(piece, int):
            ids = [piece]
        else:
            ids = plan.codec.continues("a" + context, piece)[0]
            context += piece
        for i in ids:
            if filling.finished is None:
                filling.take(i)
    return filling


# A token that crosses a stop (rule b)

TWO = (Field("why", stops=("\n",)), Fixed("\nanswer:"), Field("answer"))


def token(text: str, kind: str = "merging_lines") -> int:
    """The one token that writes this."""
    (found, *_) = codec(kind).vocabulary.ids[text.encode()]
    return found


def test_a_token_across_the_stop_stays_where_the_fixed_text_goes_on_from_it() -> None:
    crossing = token(".\n")
    filling = dictated("merging_lines", TWO, "Let us think", crossing, " yes")
    assert filling.text == "Let us think.\nanswer: yes"
    assert (filling.fields[0].text, filling.fields[0].ended) == ("Let us think.", "stop")
    assert filling.written[filling.fields[0].end - 1] == crossing
    assert not filling.forced[filling.fields[0].end - 1], "the LM chose it"
    assert canonical_share(codec("merging_lines"), [filling.written]) == 1


def test_a_token_across_the_stop_that_writes_something_else_is_taken_back_and_its_text_before_the_stop_put_there() -> (
    None
):
    crossing = token(".\n\n")
    filling = dictated("merging_lines", TWO, "Let us think", crossing, " yes")
    assert filling.text == "Let us think.\nanswer: yes"
    assert crossing not in filling.written
    at = len(codec("merging_lines").encode("Let us think"))
    # Its text before the stop is put there, with the fixed text.
    assert filling.forced[at:-3] == [True] * (len(filling.forced) - at - 3), "the full stop and the fixed text"
    assert canonical_share(codec("merging_lines"), [filling.written]) == 1


def test_the_lm_may_write_the_beginning_of_the_fixed_text_itself() -> None:
    layout = (Field("why", stops=("\nans",)), *TWO[1:])
    filling = dictated("byte_level", layout, "so", "\n", "answer", " yes")
    assert filling.text == "so\nanswer: yes"
    put = [i for i, forced in zip(filling.written, filling.forced, strict=True) if forced]
    assert codec("byte_level").decode(put) == ":"


def test_at_the_last_stop_the_text_before_it_is_put_there_too() -> None:
    filling = dictated("merging_lines", (Field("text", stops=("\n",)),), "Let us think", token(".\n"))
    assert (filling.text, filling.finished) == ("Let us think.", "stop")
    assert filling.forced == [False] * (len(filling.forced) - 1) + [True]
    assert codec("merging_lines").decode(filling.written) == filling.text


def test_a_character_that_is_not_finished_at_the_limit_is_left_out() -> None:
    layout = (Field("a", max_tokens=2), Fixed("\nanswer:"), Field("b"))
    first, second, third = (codec("byte_level").vocabulary.ids[bytes([b])][0] for b in "日".encode())
    filling = dictated("byte_level", layout, first, second, " yes")
    assert filling.text == "\nanswer: yes"
    assert third not in filling.written


# Where a field ends


def test_the_end_of_the_turn_closes_a_field_and_is_kept_only_at_the_end() -> None:
    filling = dictated("byte_level", TWO, "so", END, " yes")
    assert filling.text == "so\nanswer: yes"
    assert [field.ended for field in filling.fields] == ["eos", "eos"]
    assert [i for i in filling.written if i == END] == [END]
    assert not filling.forced[-1], "the LM ended this one"


def test_the_end_of_the_turn_is_put_behind_a_complete_field_and_behind_a_last_fixed_text() -> None:
    complete = dictated("byte_level", (Fixed("answer:"), Field("a", " ", syntax=Choices(("yes", "no")))), " no")
    assert (complete.finished, complete.forced[-1], complete.written[-1]) == ("eos", True, END)
    assert complete.fields[0].ended == "complete"
    closed = dictated("byte_level", (Field("a"), Fixed("</answer>")), " no", END)
    assert closed.text == " no</answer>"
    assert (closed.finished, closed.forced[-1], closed.written[-1]) == ("eos", True, END)


def test_a_field_that_eats_the_budget_is_closed_and_the_next_one_gets_its_reserve() -> None:
    filling = filled(Plan(TWO, codec("byte_level")), Talker(), new=40, room=200)
    why, answer = filling.fields
    assert (why.ended, answer.ended, filling.finished) == ("length", "length", "length")
    assert (why.end - why.start, answer.end - answer.start) == (30, 10), "a quarter is the answer's"
    assert filling.free == 40


def test_a_limit_of_its_own_is_what_a_later_field_gets_and_no_field_gets_more() -> None:
    layout = (Field("a"), Fixed("\nx"), Field("b", max_tokens=3), Fixed("\ny"), Field("c", max_tokens=5))
    filling = filled(Plan(layout, codec("byte_level")), Talker(), new=60, room=200)
    assert [field.end - field.start for field in filling.fields] == [52, 3, 5]


def test_a_window_with_little_room_is_shared() -> None:
    plan = Plan(TWO, codec("byte_level"))
    filling = filled(plan, Talker(), new=500, room=plan.least + 20)
    why, answer = filling.fields
    assert min(why.end - why.start, answer.end - answer.start) >= 10
    assert len(filling.written) <= plan.least + 20


class Talker(Writer):
    """An LM that never ends its turn."""

    def __init__(self) -> None:
        super().__init__(codec("byte_level"), 0)

    def _more(self) -> list[int]:
        return self.codec.encode(" and so on")[:1]


def test_no_field_is_left_empty_unless_it_may_be() -> None:
    plan = Plan(TWO, codec("merging_lines"))
    filling = Filling(plan, max_new_tokens=20, room=100)
    width = len(plan.codec.vocabulary.tokens)
    forbidden = filling.forbidden(width, CPU)
    assert forbidden is not None
    assert all(forbidden[i] for i in (END, token("\n")))
    assert not forbidden[token(".\n")]
    filling.take(token(" "))
    forbidden = filling.forbidden(width, CPU)
    assert forbidden is not None, "white space is nothing"
    filling.take(token("a"))
    assert filling.forbidden(width, CPU) is None
    assert Filling(Plan(FREE, plan.codec), max_new_tokens=20, room=100).forbidden(width, CPU) is None


# Ids of fixed texts (rule d)


@each_kind
def test_fixed_texts_have_the_ids_that_the_tokenizer_gives_them_in_their_place(kind: str) -> None:
    layout = (Field("why", stops=("\nanswer:",)), Fixed("\nanswer:"), Field("answer", " ", syntax=Number()))
    plan, rows = Plan(layout, codec(kind)), []
    for text in ("Let us think step by step", "There are 12 birds", "so 5 remain", "yes"):
        filling = Filling(plan, max_new_tokens=64, room=500)
        for i in [*plan.codec.encode(text), END]:
            filling.take(i)
        answered = plan.codec.decode(filling.written)  # with the space, where no token but a space begins the answer
        for i in [*plan.codec.continues(answered, f"{text}\nanswer: 12"[len(answered) :])[0], END]:
            filling.take(i)
        assert filling.text == f"{text}\nanswer: 12"
        rows.append(filling.written)
    assert canonical_share(plan.codec, rows) >= 0.75
    assert canonical_share(plan.codec, [[*rows[0][:1], *rows[0]]]) in (0, 1)


def test_a_row_that_is_spelt_out_is_not_canonical() -> None:
    made = codec("byte_level")
    letters = [made.vocabulary.ids[bytes([b])][0] for b in b"Let us"]
    assert made.decode(letters) == "Let us"
    assert canonical_share(made, [letters, [*made.encode("Let us"), END]]) == 0.5


# Layouts that cannot be


@pytest.mark.parametrize("layout", [(), (Fixed("a"),), (Field("a"), Field("b")), (Fixed("a"), Fixed("b"), Field("c"))])
def test_a_layout_is_fixed_texts_and_fields_by_turns(layout: Layout) -> None:
    with pytest.raises(ValueError, match="a layout alternates fixed texts and fields"):
        Plan(layout, codec("byte_level"))


def test_choices_differ_and_have_tokens() -> None:
    for texts in ((), ("a", "a"), ("",)):
        with pytest.raises(ValueError, match="none empty and none twice"):
            Plan((Field("a", syntax=Choices(texts)),), codec("byte_level"))
    with pytest.raises(ValueError, match="cannot write the fixed text '☃'"):
        Plan((Fixed("☃"), Field("a")), codec("unigram"))
    with pytest.raises(ValueError, match="no tokens for the choice '☃'"):
        Plan((Field("a", syntax=Choices(("yes", "☃"))),), codec("unigram"))


# Guided by a grammar


@dataclass
class Goods:
    name: str
    count: int


GRAMMARS: list[tuple[Pattern | Schema, Callable[[str], bool]]] = [
    (Pattern("[a-c]{2,4}(-[0-9]+)?"), lambda text: re.fullmatch("[a-c]{2,4}(-[0-9]+)?", text) is not None),
    (Pattern("a/b|\\d{4}"), lambda text: re.fullmatch(r"a/b|\d{4}", text) is not None),
]


@each_kind
@pytest.mark.parametrize("syntax", [pytest.param(syntax, id=syntax.regex) for syntax, _ in GRAMMARS[:2]])  # type: ignore[union-attr]
@pytest.mark.parametrize("lead", ["", " ", "\n"])
def test_a_pattern_is_all_that_a_field_holds(kind: str, syntax: Pattern, lead: str) -> None:
    pytest.importorskip("llguidance")
    right = next(check for known, check in GRAMMARS if known == syntax)
    layout = (Fixed("answer:"), Field("a", lead, syntax=syntax), Fixed("\nb:"), Field("b", lead, syntax=syntax))
    plan = Plan(layout, codec(kind))
    for seed in range(12):
        filling = filled(plan, Writer(plan.codec, seed), new=60, room=400)
        assert filling.text == whole(layout, filling)
        for field in filling.fields:
            assert field.text.startswith(lead)
            assert right(field.text[len(lead) :]), field


@each_kind
def test_a_schema_is_all_that_a_field_holds_even_closed_at_its_limit(kind: str) -> None:

    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}, "s": {"type": "string", "maxLength": 200}, "l": {"enum": ["x", "yy"]}},
        "required": ["n", "s", "l"],
        "additionalProperties": False,
    }
    layout = (Field("why", max_tokens=3), Fixed("\nanswer:"), Field("a", " ", syntax=Schema(json.dumps(schema))))
    plan = Plan(layout, codec(kind))
    ends = set()
    for seed in range(12):
        filling = filled(plan, Writer(plan.codec, seed), new=40, room=400)
        found = filling.fields[1]
        ends.add(found.ended)
        value = json.loads(found.text)
        assert isinstance(value["n"], int)
        assert isinstance(value["s"], str)
        assert value["l"] in ("x", "yy")
    assert ends <= {"complete", "length"}


def test_records_within_records_can_be_decoded_in_the_form_of_one_json_object() -> None:
    pytest.importorskip("llguidance")
    signature = Signature.parse("text -> order, team", types={"order": list[Goods], "team": ["a", "b"]})
    plan = Plan(Json().layout(signature), codec("byte_level"))
    for seed in range(6):
        held = json.loads(filled(plan, Writer(plan.codec, seed), new=60, room=400).text)
        assert all({"name", "count"} <= set(one) for one in held["order"])
        assert held["team"] in ("a", "b")


def test_what_no_grammar_can_read_is_refused_with_its_text() -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(ValueError, match=r"the pattern '\(a' cannot be"):
        Plan((Field("a", syntax=Pattern("(a")),), codec("byte_level"))
    with pytest.raises(ValueError, match=r'the JSON schema \{"type": "nothing"\} cannot be'):
        Plan((Field("a", syntax=Schema('{"type": "nothing"}')),), codec("byte_level"))


def test_without_the_library_the_command_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r'pip install "cotune\[guided\]"'):
        Plan((Field("a", syntax=Pattern("a")),), codec("byte_level"))


# What a vocabulary writes


@each_kind
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_bytes_of_tokens_are_what_they_decode_to(kind: str, data: st.DataObject) -> None:
    vocabulary = codec(kind).vocabulary
    usable = [i for i, written in enumerate(vocabulary.tokens) if written]
    ids = data.draw(st.lists(st.sampled_from(usable), min_size=1, max_size=8))
    assert text_of(ids, kind) in (None, codec(kind).decode(ids))


def text_of(ids: Sequence[int], kind: str) -> str | None:
    """What tokens write by the vocabulary; None where they are not whole characters."""
    vocabulary = codec(kind).vocabulary
    written = b"".join(vocabulary.tokens[i] or b"" for i in ids)
    try:
        text = written.decode()
    except UnicodeDecodeError:
        return None
    return text.removeprefix(" ") if vocabulary.strips_start else text


def test_a_tokenizer_of_an_unknown_kind_is_decoded_token_by_token() -> None:
    from cotune.inference.vocabulary import Vocabulary
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordPiece({"<unk>": 0, "ab": 1, "##c": 2, "d": 3}, unk_token="<unk>"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    made = Codec(tokenizer, end_ids=[0])
    assert Vocabulary(tokenizer, made.decode).tokens[1:] == [b" ab", b"c", b" d"]
