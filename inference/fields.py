"""Filling in: a layout compiled for one tokenizer, and one completion on its way through it, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from cotune.errors import BadValueError
from cotune.inference.automata import Automaton, CalibratedChoices, ChoicesAutomaton, Guide, NumberAutomaton
from cotune.inference.codec import Codec
from cotune.inference.engine import Generated
from cotune.inference.grammars import Grammar
from cotune.programs.layout import Choices, Field, Fixed, Layout, Number
from cotune.programs.lm import Filled
from torch import Tensor

Ended = Literal["stop", "eos", "complete", "length"]
Finished = Literal["eos", "stop", "length"]

_SLACK = 4
"""Ids that a fixed text may need beyond those it has alone: where it goes on from a token that crossed a stop."""

_RESERVE = 32
"""Tokens that a later field of any text gets at least, if the budget has four times as many."""


class Plan:
    """A layout compiled for one tokenizer.

    Attributes:
        needs: ids that there must be room for, part by part: a fixed text's own, one for a field of any text, and what
            any value of a constrained field may take, or can be closed within.
        tail: 1 if the end of the turn may have to be put behind the last part.

    Raises:
        ValueError: two parts of a kind stand side by side, there is no field, or a constraint cannot be used.
    """

    def __init__(self, layout: Layout, codec: Codec) -> None:
        _check(layout)
        self.layout, self.codec = layout, codec
        self.languages = [self._language(place) for place in range(len(layout))]
        self.needs = [self._need(place) for place in range(len(layout))]
        self.tail = int(isinstance(layout[-1], Fixed) or self.languages[-1] is not None)

    @property
    def least(self) -> int:
        """Ids that a completion must have room for, or none is begun."""
        return sum(self.needs) + self.tail

    def most(self, max_new_tokens: int) -> int:
        """Ids that a completion can come to have."""
        put = [
            need
            for need, part, language in zip(self.needs, self.layout, self.languages, strict=True)
            if isinstance(part, Fixed) or language is not None
        ]
        return self.budget(max_new_tokens) + sum(put) + self.tail

    def budget(self, max_new_tokens: int) -> int:
        """Free tokens of all fields together: `max_new_tokens`, or what constrained fields need at least."""
        return max(max_new_tokens, sum(self.reserves(max_new_tokens)))

    def reserves(self, max_new_tokens: int) -> list[int]:
        """Free tokens that each part gets at least, however much the fields before it take."""
        share = max(1, max_new_tokens // sum(isinstance(part, Field) for part in self.layout))
        found = []
        for part, language in zip(self.layout, self.languages, strict=True):
            if isinstance(part, Fixed):
                found.append(0)
            elif language is not None:
                found.append(language.reserve)
            else:
                found.append(min(share, part.max_tokens or min(_RESERVE, max(1, max_new_tokens // 4))))
        return found

    def _language(self, place: int) -> Automaton[Any] | Grammar | None:
        part = self.layout[place]
        if isinstance(part, Fixed) or part.syntax is None:
            return None
        first = place == 0  # nothing is before it, and so nothing between that and it
        lead, spaced = "" if first else part.lead, first and self.codec.vocabulary.strips_start
        if isinstance(part.syntax, Choices):
            texts, offsets = part.syntax.texts, part.syntax.offsets
            if offsets:
                return CalibratedChoices(self.codec, texts, lead, offsets, spaced=spaced)
            return ChoicesAutomaton(self.codec, texts, lead, spaced=spaced)
        if isinstance(part.syntax, Number):
            return NumberAutomaton(self.codec, lead, integer=part.syntax.integer, spaced=spaced)
        return Grammar(self.codec, part.syntax, lead, spaced=spaced)

    def _need(self, place: int) -> int:
        part, language = self.layout[place], self.languages[place]
        if isinstance(part, Fixed):
            if part.text not in self.codec.decode(self.codec.encode("a" + part.text)):
                raise BadValueError(f"the tokenizer cannot write the fixed text {part.text!r}; use a form without it.")
            return len(self.codec.encode(part.text)) + _SLACK
        return 1 if language is None else language.room


class Filling:
    """A completion under way: what is written, in which field it is, and what may come next.

    An engine gives it the tokens that the LM chooses, one at a time, and feeds the LM all of `written` that it has not
    fed yet: behind a token that ends a field stand the ids of the next fixed text.

    Args:
        max_new_tokens: free tokens of all fields together.
        room: ids that there is room for; at least `plan.least`.

    Attributes:
        written: ids so far, fixed texts and free tokens.
        forced: for each, whether it was put there.
        log_probs: for each, what `take` was told; 0 where it was put there, or no other token was allowed.
        free: tokens decided so far, those that were taken back included: the index of the next random draw.
        kept: how many of the ids before the last `take` are still there.
        fields: what has been filled in.
        text: the text of the whole, once it is finished.
        finished: why it ended; None while it goes on.
    """

    def __init__(self, plan: Plan, *, max_new_tokens: int, room: int) -> None:
        self.plan, self._codec = plan, plan.codec
        self._room = min(room, plan.most(max_new_tokens))
        self._budget, self._reserves = plan.budget(max_new_tokens), plan.reserves(max_new_tokens)
        self.written: list[int] = []
        self.forced: list[bool] = []
        self.log_probs: list[float] = []
        self.free, self.kept = 0, 0
        self.fields: list[Filled] = []
        self.text = ""
        self.finished: Finished | None = None
        self._limit, self._blank = 1, False  # of the field that is open
        first = plan.layout[0]
        if isinstance(first, Fixed):
            self._put(first.text)
        self._open(1 if isinstance(first, Fixed) else 0)
        self._go_on()

    @property
    def most(self) -> int:
        """Ids that it can come to have."""
        return self._room

    @property
    def draws(self) -> int:
        """Tokens that can come to be decided: of each field as many as there is room for, as it may take them back."""
        return min(self._budget, self._room * sum(isinstance(part, Field) for part in self.plan.layout))

    @property
    def left(self) -> int:
        """Tokens that the open field may still take."""
        return self._limit - (self.free - self._opened)

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the open field."""
        return self._field.stops

    @property
    def guided(self) -> bool:
        """Whether the open field's syntax says which tokens may come."""
        return self._guide is not None

    def forbidden(self, width: int, device: torch.device) -> Tensor | None:
        """(width,) True for tokens that may not come next; None where any may."""
        if self._guide is not None:
            return self._guide.forbidden(width, device)
        return self._codec.empties(self._field.stops, width, device) if self._blank else None

    def offsets(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """(n,) tokens and (n,) nats to add to their logits before one is chosen; None where nothing is added."""
        return None if self._guide is None else self._guide.offsets(device)

    def result(self, *, log_probs: bool) -> Generated:
        """The completion, once it is finished; with its log-probabilities where they were asked for."""
        assert self.finished is not None
        forced = tuple(self.forced) if any(self.forced) else ()
        told = tuple(self.log_probs) if log_probs else ()
        return Generated(self.written, self.text, self.finished, tuple(self.fields), forced, told)

    def take(self, token: int, log_prob: float = 0.0) -> None:
        """Writes a token that the LM chose, and what follows from it."""
        self.kept = len(self.written)
        self._take(token, log_prob)
        self._go_on()

    def _go_on(self) -> None:
        """Takes the tokens to which there is no other."""
        # No pass of the model is spent on a token that has no alternative; its log-probability is 0.
        while self.finished is None and self._guide is not None and (token := self._guide.only()) is not None:
            self._take(token, 0.0)

    def _take(self, token: int, log_prob: float) -> None:
        self._write([token], forced=False, log_prob=log_prob)
        self.free += 1
        if self._guide is not None:
            self._guided(self._guide, token)
        elif token in self._codec.ends:
            self._end_of_turn()
        else:
            self._unguided()

    def _guided(self, guide: Guide, token: int) -> None:
        if not guide.take(token):
            # The token is none of the value: it ends the turn, or begins what comes behind the field.
            whole = self._codec.decode(self.written[:-1])[len(self._before) :]
            value, ends = guide.closed(), token in self._codec.ends
            if ends and self._is_last and value == whole:
                self._fill("eos", value, but=1)
                self._finish("eos")
            else:
                del self.written[-1], self.forced[-1], self.log_probs[-1]
                self._close("eos" if ends else "complete", value)
        elif guide.finished:
            self._close("complete", guide.closed())
        elif self.free - self._opened >= self._limit:
            self._close("length", guide.closed())

    def _end_of_turn(self) -> None:
        if self._is_last:
            self._fill("eos", self._codec.decode(self.written[:-1])[len(self._before) :], but=1)
            self._finish("eos")
        else:
            del self.written[-1], self.forced[-1], self.log_probs[-1]
            self._close("eos", self._whole_characters())

    def _unguided(self) -> None:
        stopped = self._stopped()
        if stopped is not None:
            self._close("stop", stopped)
        elif self.free - self._opened >= self._limit:
            self._close("length", self._whole_characters())
        elif self._blank:
            self._blank = not self._codec.decode(self.written)[len(self._before) :].strip()

    def _stopped(self) -> str | None:
        """The field's text up to its first stop; None where none is written."""
        stops, decode = self._field.stops, self._codec.decode
        if not stops:
            return None
        # Only the tail is decoded for each token, or long fields would cost their square.
        longest = 2 + max(len(stop.encode()) for stop in stops)  # a token has a byte or more
        tail = decode(self.written[max(self._start, len(self.written) - longest) :])
        if not any(stop in tail for stop in stops):
            return None
        text = decode(self.written)[len(self._before) :]
        return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]

    def _whole_characters(self) -> str:
        """The field's text. Where more follows, without the first bytes of a character that was not finished.

        Some tokenizers read neighbouring byte tokens as one, and such bytes spoil the fixed text's before them: so too.
        """
        decode, count = self._codec.decode, len(self.written)
        texts = [decode(self.written[: count - n]) for n in range(min(4, count - self._start + 1))]
        keep = self._is_last and texts[0].startswith(self._before)
        whole = texts[0] if keep else next((t for t in texts if not t.endswith("\ufffd")), texts[0])
        return whole[len(self._before) :]

    @property
    def _is_last(self) -> bool:
        return self._place == len(self.plan.layout) - 1

    def _open(self, place: int) -> None:
        """Begins the field in this place of the layout."""
        part, language = self.plan.layout[place], self.plan.languages[place]
        assert isinstance(part, Field)
        self._place, self._field = place, part
        self._start, self._opened = len(self.written), self.free
        self._before = self._codec.decode(self.written) if self.written else ""
        self._guide = None if language is None else language.begin()
        self._blank = self._guide is None and not part.may_be_empty
        # The least of: what the budget leaves, the share of the room, and bounds of its own.
        bounds = [self._budget - self.free - sum(self._reserves[place + 1 :]), self._share(place)]
        if language is not None:
            bounds = [bounds[0], bounds[1] - language.closing]
        bounds += [most for most in (part.max_tokens, language.most if language else None) if most]
        self._limit = max(1, min(bounds))

    def _share(self, place: int) -> int:
        """The field's share of the room that there is: what later fields do not need, nor would like to have."""
        plan = self.plan
        later = range(place + 1, len(plan.layout))
        fields = [i for i in later if isinstance(plan.layout[i], Field)]
        room = self._room - len(self.written) - plan.tail - sum(plan.needs[i] for i in later if i not in fields)
        needed = sum(plan.needs[i] for i in fields)
        wanted = sum(max(plan.needs[i], self._reserves[i]) for i in fields)
        return min(room - needed, max(room - wanted, room // (1 + len(fields)), plan.needs[place]))

    def _close(self, ended: Ended, value: str) -> None:
        """Ends the field with this value, and puts down what follows it.

        Ids stay that write it, or it and the beginning of the fixed text that follows; the others are taken back, and
        what is missing is put there.
        """
        last, ids, decode = self._is_last, self.written, self._codec.decode
        following = "" if last else self.plan.layout[self._place + 1]
        fixed = following.text if isinstance(following, Fixed) else ""
        target, kept = self._before + value + fixed, len(ids)
        # Nothing follows, and the ids hold the value: they stay, also where its first bytes spoil what is before.
        done = last and decode(ids)[len(self._before) :] == value
        # A token that crosses a stop stays if it writes what is to follow; else it goes, and its text is put there.
        while not done and kept > self._start and not target.startswith(decode(ids[:kept])):
            kept -= 1
        del ids[kept:], self.forced[kept:], self.log_probs[kept:]
        self.kept = min(self.kept, kept)
        fits = self._put(target[len(decode(ids)) :])
        self._fill(ended, value)
        if not fits:
            self._finish("length")
        elif last and ended in ("stop", "length"):
            self._finish(ended)
        elif self._place + 2 < len(self.plan.layout):
            self._open(self._place + 2)
        else:
            self._write(self._codec.end_ids[:1], forced=True)
            self._finish("eos")

    def _fill(self, ended: Ended, value: str, *, but: int = 0) -> None:
        """Notes the field. It ends with the id that writes the last of its value, which may write more."""
        upto, end = self._before + value, len(self.written) - but
        while end > self._start and self._codec.decode(self.written[: end - 1]).startswith(upto):
            end -= 1
        self.fields.append(Filled(self._field.name, value, self._start, end, ended))

    def _put(self, text: str) -> bool:
        """Puts ids there that write this text behind what is written; whether there was room for them."""
        if not text:
            return True
        room = self._room - len(self.written)
        fitting = next((ids for ids in self._codec.behind(self.written, text) if len(ids) <= room), None)
        self._write(fitting or (), forced=True)
        return fitting is not None

    def _write(self, ids: Sequence[int], *, forced: bool, log_prob: float = 0.0) -> None:
        self.written += ids
        self.forced += [forced] * len(ids)
        self.log_probs += [log_prob] * len(ids)

    def _finish(self, finished: Finished) -> None:
        ended = finished == "eos" and self.written[-1:] and self.written[-1] in self._codec.ends
        text, before = self._codec.decode(self.written[:-1] if ended else self.written), self._before
        # As in `_whole_characters`, where more was written behind the half of a character.
        self.text = text if text.startswith(before) else before + text[len(before) :]
        self.finished = finished


def _check(layout: Layout) -> None:
    kinds = [isinstance(part, Field) for part in layout]
    if not any(kinds) or any(a == b for a, b in pairwise(kinds)):
        raise BadValueError(f"a layout alternates fixed texts and fields, with at least one field; this is {layout}.")
