"""Regular expressions and JSON schemas as constraints on tokens, by way of `llguidance` (`pip install "cotune[guided]"`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from cotune.inference.automata import Guide
from cotune.inference.codec import Codec
from cotune.programs.layout import Pattern, Schema
from torch import Tensor

_CLOSERS = b'"}]0e:1l,'
"""Bytes that bring a JSON value to its end, the likeliest first; tried where a field is closed at its limit."""

_CLOSING = 24
"""Most bytes that are put there to close a value at its limit."""


class GrammarError(ValueError):
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

    closing, most = _CLOSING, None

    def __init__(self, codec: Codec, syntax: Pattern | Schema, lead: str, *, spaced: bool = False) -> None:
        self.codec, self.spaced = codec, spaced
        self.room = len(lead.encode()) + 2 * _CLOSING
        self.reserve = self.room
        library = _llguidance()
        self._tokenizer = _tokenizer(codec)
        try:
            text = _lark(library, syntax, lead, spaced=spaced)
        except ValueError as error:
            raise GrammarError(f"{_shown(syntax)} cannot be read: {error}") from error
        self._first = library.LLMatcher(self._tokenizer, library.LLMatcher.grammar_from_lark(text), log_level=0)
        if self._first.is_error():
            why = self._first.get_error().strip().splitlines()[0]
            raise GrammarError(f"{_shown(syntax)} cannot be used: {why}")

    def begin(self) -> Guide:
        return _Matched(self, self._first.deep_copy())


class _Matched(Guide):
    """A value that `llguidance` follows."""

    def __init__(self, grammar: Grammar, matcher: Any) -> None:
        self._grammar, self._matcher, self._written = grammar, matcher, b""

    def forbidden(self, width: int, device: torch.device) -> Tensor | None:
        if self._matcher.is_accepting():
            return None
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        allowed = ((bits[:, None] >> torch.arange(8)) & 1).flatten()[:width].bool()
        mask = torch.ones(width, dtype=torch.bool)
        mask[: len(allowed)] = ~allowed
        mask[[i for i in self._grammar.codec.ends if i < width]] = True
        return mask.to(device)

    def only(self) -> int | None:
        return None

    def take(self, token: int) -> bool:
        tokens = self._grammar.codec.vocabulary.tokens
        if token >= len(tokens) or not tokens[token] or self._matcher.validate_tokens([token]) != 1:
            return False
        self._matcher.consume_token(token)
        self._written += tokens[token] or b""
        return True

    @property
    def finished(self) -> bool:
        return bool(self._matcher.is_stopped() or self._matcher.is_error())

    def closed(self) -> str:
        written, matcher = self._written, self._matcher.deep_copy()
        for _ in range(_CLOSING):
            if matcher.is_accepting() or matcher.is_stopped():
                break
            more = matcher.compute_ff_bytes() or next(
                (bytes([b]) for b in _CLOSERS if self._takes(matcher, bytes([b]))), b""
            )
            ids = self._ids(more)
            if not ids or not matcher.consume_tokens(ids):
                written = self._written  # nothing that is known closes it: it stays as it is
                break
            written += more
        text = written.decode(errors="ignore")
        return text[1:] if self._grammar.spaced and text.startswith(" ") else text

    def _takes(self, matcher: Any, more: bytes) -> bool:
        ids = self._ids(more)
        return bool(ids) and matcher.validate_tokens(ids) == len(ids)

    def _ids(self, more: bytes) -> list[int]:
        """Ids that write these bytes, one each; none where a byte has no token of its own."""
        found = [self._grammar.codec.vocabulary.ids.get(bytes([b])) for b in more]
        return [ids[0] for ids in found if ids] if all(found) else []


class _Words:
    """A vocabulary as `llguidance` reads one."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, codec: Codec) -> None:
        words = codec.vocabulary.tokens
        # Tokens that may not be written have names that no text holds.
        self.tokens = [b"\xff" + str(i).encode() if word is None else word for i, word in enumerate(words)]
        self.special_token_ids = [i for i, word in enumerate(words) if not word]
        self.eos_token_id = codec.end_ids[0]
        self._codec = codec

    def __call__(self, text: str | bytes) -> Sequence[int]:
        return self._codec.encode(text if isinstance(text, str) else text.decode())


def _tokenizer(codec: Codec) -> Any:
    made = codec.kept.get("llguidance")
    if made is None:
        made = codec.kept["llguidance"] = _llguidance().LLTokenizer(_Words(codec), n_vocab=None)
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
        return f"start: {before}VALUE\nVALUE: /{library.regex_to_lark(syntax.regex, '')}/"
    schema = json.loads(syntax.json)
    # One way to write each value, as Python's json does: free white space would let the LM write it without end.
    options = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    schema = {**schema, "x-guidance": options} if isinstance(schema, dict) else schema
    return f"start: {before}value\nvalue: %json {json.dumps(schema)}"


def _shown(syntax: Pattern | Schema) -> str:
    return f"the pattern {syntax.regex!r}" if isinstance(syntax, Pattern) else f"the JSON schema {syntax.json}"
