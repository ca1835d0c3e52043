"""Regular expressions and JSON schemas as constraints on tokens, by way of `llguidance` (the extra `guided`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from cotune.errors import CotuneError
from cotune.inference.automata import Guide
from cotune.inference.codec import Codec
from cotune.programs.layout import Pattern, Schema
from torch import Tensor

_CLOSERS = b'"}],0'
"""Bytes that bring a JSON value to its end; tried first where a field is closed at its limit."""

_RESERVE = 32
"""Tokens that a field gets at least."""

_CLOSING = 64
"""Most bytes that are put there to close a value at its limit."""

_NEVER = 1 << 30


class GrammarError(CotuneError, ValueError):
    """A pattern or schema that cannot be used, or no library to use it with."""


class Grammar:
    """A regular expression or a JSON schema, compiled for one tokenizer.

    Args:
        spaced: decoding drops a space here, so one may be written before the lead.

    Attributes:
        room, closing, reserve, most: as in `Automaton`.

    Raises:
        GrammarError: `llguidance` is not installed, or does not take the grammar.
    """

    closing, reserve, most = _CLOSING, _RESERVE, None

    def __init__(self, codec: Codec, syntax: Pattern | Schema, lead: str, *, spaced: bool = False) -> None:
        self.codec, self.spaced = codec, spaced
        self.room = len(lead.encode()) + _RESERVE + _CLOSING
        library = _llguidance()
        self._tokenizer, self.lengths = _tokenizer(codec)
        try:
            text = _lark(library, syntax, lead, spaced=spaced)
        except ValueError as error:
            raise GrammarError(f"{_name_of(syntax)} cannot be read: {error}") from error
        self._first = library.LLMatcher(self._tokenizer, library.LLMatcher.grammar_from_lark(text), log_level=0)
        if self._first.is_error():
            why = self._first.get_error().strip().splitlines()[0]
            raise GrammarError(f"{_name_of(syntax)} cannot be used: {why}")

    def begin(self) -> Guide:
        return _Matched(self, self._first.deep_copy())


class _Matched(Guide):
    """A value that `llguidance` follows."""

    def __init__(self, grammar: Grammar, matcher: Any) -> None:
        self._grammar, self._matcher, self._written = grammar, matcher, b""

    def forbidden(self, width: int, device: torch.device) -> Tensor | None:
        if self._matcher.is_accepting():
            return None
        forbidden = ~_allowed(self._matcher)[:width]
        if len(forbidden) < width:  # a model can have more logits than its tokenizer has tokens
            forbidden = np.pad(forbidden, (0, width - len(forbidden)), constant_values=True)
        forbidden[[i for i in self._grammar.codec.ends if i < width]] = True
        return torch.from_numpy(forbidden).to(device)

    def only(self) -> int | None:
        return None

    def take(self, token: int) -> bool:
        tokens = self._grammar.codec.vocabulary.tokens
        if token >= len(tokens) or not tokens[token] or self._matcher.validate_tokens([token]) != 1:
            if not self._matcher.is_accepting():
                raise ValueError(f"token {token} may not come next, {self._written!r} is no whole value.")
            return False
        self._matcher.consume_token(token)
        self._written += tokens[token] or b""
        return True

    @property
    def finished(self) -> bool:
        return bool(self._matcher.is_stopped() or self._matcher.is_error())

    def closed(self) -> str:
        closed = self._written + self._closing()
        text = closed.decode(errors="ignore")
        return text[1:] if self._grammar.spaced and text.startswith(" ") else text

    def _closing(self) -> bytes:
        """Few bytes that make what is written a whole value; none where that takes more than a few."""
        matcher, more = self._matcher.deep_copy(), b""
        while not (matcher.is_accepting() or matcher.is_stopped()):
            token = self._closer(matcher)
            if token is None or not matcher.consume_token(token):
                return b""
            more += self._grammar.codec.vocabulary.tokens[token] or b""
            if len(more) > _CLOSING:
                return b""
        return more

    def _closer(self, matcher: Any) -> int | None:
        """A token that may come next: one that closes something if there is any, or else the shortest."""
        grammar, allowed = self._grammar, _allowed(matcher)
        for byte in _CLOSERS:
            for token in grammar.codec.vocabulary.ids.get(bytes([byte]), ()):
                if allowed[token]:
                    return token
        lengths = np.where(allowed[: len(grammar.lengths)], grammar.lengths, _NEVER)
        shortest = int(lengths.argmin())
        return shortest if lengths[shortest] < _NEVER else None


def _allowed(matcher: Any) -> Any:
    """By id, whether a token may come next."""
    bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    return np.unpackbits(bits, bitorder="little").view(bool)


class _Words:
    """A vocabulary as `llguidance` reads one."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, codec: Codec) -> None:
        words = codec.vocabulary.tokens
        # Tokens that may not be written have names that no text holds.
        self.tokens = [b"\xff" + str(i).encode() if word is None else word for i, word in enumerate(words)]
        self.special_token_ids = [i for i, word in enumerate(words) if not word]
        self.eos_token_id = codec.end_ids[0] if codec.end_ids else codec.tokenizer.eos_token_id
        self._codec = codec

    def __call__(self, text: str | bytes) -> Sequence[int]:
        """Ids that write just this, as they would in the middle of a text."""
        wanted = text.encode() if isinstance(text, str) else text
        return self._codec.continues("a", wanted.decode())[0]


def _tokenizer(codec: Codec) -> tuple[Any, Any]:
    """The tokenizer as `llguidance` reads it, and the bytes that each token writes, by id; both made once."""
    made = codec.kept.get("llguidance")
    if made is None:
        lengths = np.array([len(word) if word else _NEVER for word in codec.vocabulary.tokens])
        made = codec.kept["llguidance"] = _llguidance().LLTokenizer(_Words(codec), n_vocab=None), lengths
    return made


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise GrammarError(
            'fields with a pattern or a JSON schema need llguidance, which is not here: pip install "cotune[guided]"'
        ) from error
    return llguidance


def _lark(library: Any, syntax: Pattern | Schema, lead: str, *, spaced: bool) -> str:
    """The grammar in the form of Lark that `llguidance` reads."""
    space = '" "? ' if spaced else ""
    before = space + (f"{json.dumps(lead)} " if lead else "")
    if isinstance(syntax, Pattern):
        return f"start: {before}VALUE\nVALUE: /{library.regex_to_lark(syntax.regex, 'd')}/"
    schema = json.loads(syntax.json)
    # One way to write each value, as Python's json does: free white space would let the LM write it without end.
    options = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    schema = {**schema, "x-guidance": options} if isinstance(schema, dict) else schema
    return f"start: {before}value\nvalue: %json {json.dumps(schema)}"


def _name_of(syntax: Pattern | Schema) -> str:
    return f"the pattern {syntax.regex!r}" if isinstance(syntax, Pattern) else f"the JSON schema {syntax.json}"
