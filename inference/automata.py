"""Choices and numbers as small automata over tokens: what may be written next, and where a value may end."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Generic, TypeVar

import torch
from cotune.errors import BadValueError
from cotune.inference.codec import Codec, mask_of
from torch import Tensor

State = TypeVar("State", bound=Hashable)

_DIGITS = frozenset(b"0123456789")
_NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_FRACTION = r"(?:\.\d+)?"


class Guide(ABC):
    """One constrained field under way: which tokens it takes, and what its value is when it ends."""

    @abstractmethod
    def forbidden(self, width: int, device: torch.device) -> Tensor | None:
        """(width,) True for tokens that may not come next. None where any may: one that is no part of the value
        ends it."""

    def offsets(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """(n,) tokens and (n,) nats to add to their logits before one is chosen; None where nothing is added."""
        return None

    @abstractmethod
    def only(self) -> int | None:
        """The token that comes next because no other may; None where there is a choice."""

    @abstractmethod
    def take(self, token: int) -> bool:
        """Whether the token is part of the value, which it is not only where the value may end.

        Raises:
            ValueError: the token is forbidden.
        """

    @property
    @abstractmethod
    def finished(self) -> bool:
        """The value is complete, and nothing more can follow."""

    @abstractmethod
    def closed(self) -> str:
        """The field's text if it ends here: what is written, or the nearest to it that is a whole value."""


class Automaton(ABC, Generic[State]):
    """A language of texts, token by token. States are hashable, so that the tokens of each are found once.

    Args:
        codec: the tokenizer.

    Attributes:
        room: ids that a field of it has room for at least; every text fits, or can be closed early.
        closing: how many of those may be needed to close it.
        reserve: tokens that a field of it gets at least.
        most: tokens that a field of it gets at most; None for no bound of its own.
    """

    room: int
    closing: int = 0
    reserve: int
    most: int | None = None

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self._moves: dict[State, Mapping[int, State]] = {}
        self._alive: dict[State, bool] = {}
        self._masks: dict[tuple[State, int, torch.device], Tensor] = {}

    @property
    @abstractmethod
    def start(self) -> State: ...

    @abstractmethod
    def find(self, state: State) -> Mapping[int, State]:
        """The tokens that go on from here, and where each leads; some may lead nowhere."""

    @abstractmethod
    def complete(self, state: State) -> bool:
        """Whether what is written is a whole value."""

    @abstractmethod
    def may_end(self, state: State) -> bool:
        """Whether a value may end here; what is behind the last whole value is then taken back."""

    @abstractmethod
    def closed(self, written: bytes) -> str:
        """The text of the language that is nearest to what is written."""

    def moves(self, state: State) -> Mapping[int, State]:
        """The tokens that go on from here to a whole value, and where each leads."""
        if state not in self._moves:
            self._moves[state] = {token: to for token, to in self.find(state).items() if self._lives(to)}
        return self._moves[state]

    def forbidden(self, state: State, width: int, device: torch.device) -> Tensor:
        key = (state, width, device)
        if key not in self._masks:
            self._masks[key] = mask_of(self.moves(state), width, device, but=True)
        return self._masks[key]

    def offsets(self, state: State, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """What is added to logits in this state; see `Guide.offsets`."""
        return None

    def begin(self) -> Guide:
        return _Walk(self)

    def _lives(self, state: State) -> bool:
        """Whether any whole value can be reached: a vocabulary without some characters has dead ends."""
        if state not in self._alive:
            self._alive[state] = self.complete(state) or any(map(self._lives, self.find(state).values()))
        return self._alive[state]


class _Walk(Guide):
    """A walk through an automaton."""

    def __init__(self, automaton: Automaton[State]) -> None:
        self._automaton, self._state, self._written = automaton, automaton.start, b""

    def forbidden(self, width: int, device: torch.device) -> Tensor | None:
        if self._automaton.may_end(self._state):
            return None
        return self._automaton.forbidden(self._state, width, device)

    def offsets(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        return self._automaton.offsets(self._state, device)

    def only(self) -> int | None:
        moves = self._automaton.moves(self._state)
        return next(iter(moves)) if len(moves) == 1 and not self._automaton.may_end(self._state) else None

    def take(self, token: int) -> bool:
        to = self._automaton.moves(self._state).get(token)
        if to is None:
            if not self._automaton.may_end(self._state):
                raise ValueError(f"token {token} may not come next, {self._written!r} is no whole value.")
            return False
        self._state = to
        self._written += self._automaton.codec.vocabulary.tokens[token] or b""
        return True

    @property
    def finished(self) -> bool:
        return self._automaton.complete(self._state) and not self._automaton.moves(self._state)

    def closed(self) -> str:
        return self._automaton.closed(self._written)


class ChoicesAutomaton(Automaton[bytes]):
    """One of a few texts. A state is what is written so far.

    Raises:
        ValueError: a choice is empty, stands twice, or has no tokens.
    """

    start = b""

    def __init__(self, codec: Codec, texts: Sequence[str], lead: str, *, spaced: bool = False) -> None:
        super().__init__(codec)
        if not texts or "" in texts or len(set(texts)) < len(texts):
            raise BadValueError(f"the choices are {list(texts)}; give one or more texts, none empty and none twice.")
        self.texts = tuple(texts)
        self._shown = {(lead + text).encode(): lead + text for text in texts}
        if spaced:  # decoding drops a space here, so it may be written or not
            self._shown |= {b" " + written: text for written, text in self._shown.items()}
        self._ends = {text: self._live_places(text) for text in self._shown}
        dead = [text for text in texts if 0 not in self._ends[(lead + text).encode()]]
        if dead:
            raise BadValueError(f"the tokenizer has no tokens for the choice {dead[0]!r}; use other characters.")
        self.room = max(map(len, self._shown))
        self.reserve = max(len(codec.encode(text)) for text in self._shown.values()) + 1

    def find(self, state: bytes) -> Mapping[int, bytes]:
        vocabulary, done = self.codec.vocabulary, len(state)
        return {
            token: text[:end]
            for text in self._shown
            if text.startswith(state)
            for end in range(done + 1, min(len(text), done + vocabulary.longest) + 1)
            for token in vocabulary.ids.get(text[done:end], ())
        }

    def complete(self, state: bytes) -> bool:
        return state in self._shown

    may_end = complete

    def closed(self, written: bytes) -> str:
        return self._shown.get(written) or next(
            text for whole, text in self._shown.items() if whole.startswith(written)
        )

    def _lives(self, state: bytes) -> bool:
        return any(text.startswith(state) and len(state) in ends for text, ends in self._ends.items())

    def _live_places(self, text: bytes) -> frozenset[int]:
        """The places in a text from which tokens can be put together to the rest of it."""
        vocabulary, live = self.codec.vocabulary, {len(text)}
        for start in reversed(range(len(text))):
            ends = range(start + 1, min(len(text), start + vocabulary.longest) + 1)
            if any(end in live and text[start:end] in vocabulary.ids for end in ends):
                live.add(start)
        return frozenset(live)


class CalibratedChoices(ChoicesAutomaton):
    """One of a few texts, each with an offset, and each by the tokenizer's own ids alone.

    With offsets o the probability p of a choice becomes one in proportion to p exp(o), token by token: what is written
    so far has the offset -log(mean of exp(-o)) over the choices that begin with it, and a token adds the difference.
    With o = -log(p on average) each token, too, is then as likely on average as the number of choices behind it.

    Args:
        offsets: nats for each text.
    """

    def __init__(
        self, codec: Codec, texts: Sequence[str], lead: str, offsets: Sequence[float], *, spaced: bool = False
    ) -> None:
        super().__init__(codec, texts, lead, spaced=spaced)
        by_text = dict(zip((lead + text for text in texts), offsets, strict=True))
        self._offsets = {written: by_text[text] for written, text in self._shown.items()}
        # By another way of cutting a choice into tokens, which the LM seldom takes, it would have another probability.
        self._tokens = {written: self._own_tokens(written) for written in self._shown}
        self._tensors: dict[tuple[bytes, torch.device], tuple[Tensor, Tensor]] = {}

    def find(self, state: bytes) -> Mapping[int, bytes]:
        return {
            token: written[: len(state) + len(self.codec.vocabulary.tokens[token] or b"")]
            for written, tokens in self._tokens.items()
            if written.startswith(state) and (token := tokens.get(len(state))) is not None
        }

    _lives = Automaton._lives

    def offsets(self, state: bytes, device: torch.device) -> tuple[Tensor, Tensor] | None:
        if (key := (state, device)) not in self._tensors:
            added = self.added(state)
            nats = torch.tensor([*added.values()], dtype=torch.float32, device=device)
            self._tensors[key] = torch.tensor([*added], dtype=torch.long, device=device), nats
        return self._tensors[key]

    def added(self, state: bytes) -> dict[int, float]:
        """Token that may come next -> nats that are added to its logit."""
        # Where the value may end, what ends it is any other token, and those are left as they are.
        here = self._offsets[state] if self.may_end(state) else self.offset(state)
        return {token: self.offset(to) - here for token, to in self.moves(state).items()}

    @cached_property
    def forks(self) -> dict[bytes, list[int]]:
        """Each state in which there is more than one way to go on -> the ids that lead to it."""
        ways = [self.way(text) for written, text in self._shown.items() if text.encode() == written]
        found = {state: ids[:at] for ids, states in ways for at, state in enumerate(states)}
        return {s: ids for s, ids in found.items() if len(self.moves(s)) + self.may_end(s) > 1}

    def way(self, text: str) -> tuple[list[int], list[bytes]]:
        """The ids that write a text, lead included, and the states on their way, `start` first."""
        ids, states = list(self._tokens[text.encode()].values()), [self.start]
        for token in ids:
            states.append(self.moves(states[-1])[token])
        return ids, states

    def offset(self, state: bytes) -> float:
        """Of what is written so far; the offset itself where one choice alone begins with it."""
        behind = [offset for written, offset in self._offsets.items() if written.startswith(state)]
        least = min(behind)
        return least - math.log(math.fsum(math.exp(least - offset) for offset in behind) / len(behind))

    def _own_tokens(self, written: bytes) -> dict[int, int]:
        """The tokenizer's own way to write it: place in bytes -> the token that begins there."""
        vocabulary = self.codec.vocabulary
        for ids in self.codec.continues("a", written.decode()):
            pieces = [vocabulary.tokens[token] or b"" for token in ids]
            if b"".join(pieces) == written and all(pieces):
                places = accumulate(map(len, pieces[:-1]), initial=0)
                return dict(zip(places, ids, strict=True))
        live, at, found = self._live_places(written), 0, dict[int, int]()
        while at < len(written):  # the longest first
            ends = range(min(len(written), at + vocabulary.longest), at, -1)
            end = next(end for end in ends if end in live and written[at:end] in vocabulary.ids)
            found[at], at = vocabulary.ids[written[at:end]][0], end
        return found


_Number = tuple[int, str]
_AFTER_DIGIT = {"": "1", "-": "1", "1": "2", "2": "3"} | {"3": "n", "n": "n", ",": "a", "a": "b", "b": "c"}
_AFTER_DIGIT |= {".": "f", "f": "f"}


class NumberAutomaton(Automaton[_Number]):
    """A decimal number. A state is how much of the lead is written, and what part of the number was last:

    "" nothing, "-" the sign, "1" "2" "3" so many digits without a comma, "n" more than three, "," a comma, "a" "b" one
    and two digits behind it, "c" three, "." the point, "f" digits behind it.

    A value may also end where a comma or a point stands that no digit follows, as at the end of a sentence.
    """

    start = (0, "")
    closing, reserve, most = 1, 16, 32

    def __init__(self, codec: Codec, lead: str, *, integer: bool, spaced: bool = False) -> None:
        super().__init__(codec)
        self._lead, self._spaced, self._integer = lead, spaced, integer
        self._raw = (" " + lead if spaced else lead).encode()
        number = _NUMBER if integer else _NUMBER + _FRACTION
        self._whole = re.compile(number)
        self.room = len(self._raw) + self.reserve + self.closing
        usable = re.compile(rb"[-0-9,." + re.escape(self._raw) + rb"]+")
        self._tokens = [(token, ids) for token, ids in codec.vocabulary.ids.items() if usable.fullmatch(token)]

    def find(self, state: _Number) -> Mapping[int, _Number]:
        found: dict[int, _Number] = {}
        for token, ids in self._tokens:
            to: _Number | None = state
            for byte in token:
                to = None if to is None else self._step(to, byte)
            if to is not None:
                found |= dict.fromkeys(ids, to)
        return found

    def complete(self, state: _Number) -> bool:
        return state[1] in {"1", "2", "3", "n", "c", "f"}

    def may_end(self, state: _Number) -> bool:
        return state[1] not in {"", "-"}

    def closed(self, written: bytes) -> str:
        text = written.decode()
        if self._spaced and text.startswith(" "):
            text = text[1:]
        value = text[len(self._lead) :]
        whole = self._whole.match(value)
        return self._lead + (whole[0] if whole else value + "0")

    def _step(self, state: _Number, byte: int) -> _Number | None:
        done, last = state
        if last == "" and done < len(self._raw):
            if byte == self._raw[done]:
                return (done + 1, "")
            if not (self._spaced and done == 0):  # the space that decoding drops may be left out
                return None
            return self._step((1, ""), byte)
        char = chr(byte)
        if byte in _DIGITS:
            return (done, _AFTER_DIGIT[last]) if last in _AFTER_DIGIT else None
        if char == "-" and last == "":
            return (done, "-")
        if char == "," and last in {"1", "2", "3", "c"}:
            return (done, ",")
        if char == "." and not self._integer and last in {"1", "2", "3", "n", "c"}:
            return (done, ".")
        return None
