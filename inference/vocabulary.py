"""What each token of a tokenizer writes, as bytes: what constraints on text need to become constraints on tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

_SAMPLE = 200
"""Tokens whose bytes are compared with what the tokenizer decodes."""

_LONGEST = 32

_MARK = "\u2581"  # SentencePiece's sign for a space


class Vocabulary:
    """The bytes that each token adds to a text.

    They are read off the tokens by the kind of the tokenizer's decoder, and compared with what it decodes; where the
    two differ, or the kind is unknown, every token is decoded behind another one.

    Args:
        tokenizer: a transformers tokenizer.
        decode: ids -> text.

    Attributes:
        tokens: by id, the bytes; None for special and other added tokens, and where they are not known.
        ids: the ids of all tokens that write these bytes.
        longest: most bytes of a token that constraints take notice of; longer ones are hardly ever anything but spaces.
        strips_start: decoding drops a space at the beginning of a text (SentencePiece's dummy prefix).
    """

    def __init__(self, tokenizer: Any, decode: Callable[[Sequence[int]], str]) -> None:
        by_text = tokenizer.get_vocab()
        added = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
        self._decode = decode
        self.tokens: list[bytes | None] = [None] * (max(by_text.values()) + 1)
        self.ids: dict[bytes, list[int]] = {}
        read = _reader(tokenizer)
        plain = {text: i for text, i in by_text.items() if i not in added}
        for text, i in plain.items():
            self.tokens[i] = read(text)
        anchor = next((i for i, b in enumerate(self.tokens) if b is not None and re.fullmatch(rb"[A-Za-z]+", b)), None)
        if anchor is None or not self._agrees(anchor, sorted(plain.values())):
            self._decode_all(sorted(plain.values()))
        for i, found in enumerate(self.tokens):
            if found:
                self.ids.setdefault(found, []).append(i)
        self.longest = min(_LONGEST, max(map(len, self.ids), default=0))
        self.strips_start = self._strips_start()

    def _agrees(self, anchor: int, ids: Sequence[int]) -> bool:
        """Whether the bytes are those that decoding gives, for tokens that are whole characters."""
        head = self._decode([anchor])
        for i in ids[:: max(1, len(ids) // _SAMPLE)]:
            found = self.tokens[i]
            if found is None:
                continue
            try:
                text = found.decode()
            except UnicodeDecodeError:
                continue
            if self._decode([anchor, i]) != head + text:
                return False
        return True

    def _decode_all(self, ids: Sequence[int]) -> None:
        self.tokens = [None] * len(self.tokens)
        anchor = next((i for i in ids if self._decode([i]).isalpha()), ids[0])
        head = self._decode([anchor])
        for i in ids:
            text = self._decode([anchor, i])
            if text.startswith(head) and "\ufffd" not in text:
                self.tokens[i] = text[len(head) :].encode()

    def _strips_start(self) -> bool:
        spaced = next((i for i, b in enumerate(self.tokens) if b and re.fullmatch(rb" [A-Za-z]+", b)), None)
        return spaced is not None and not self._decode([spaced]).startswith(" ")


def _reader(tokenizer: Any) -> Callable[[str], bytes | None]:
    """How the text of a token, as the vocabulary lists it, becomes bytes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    if decoder is None:
        return lambda text: None
    state = json.loads(decoder.__getstate__())
    parts = state.get("decoders", [state])
    kinds = {part["type"] for part in parts}
    if "ByteLevel" in kinds:
        byte_of = _byte_level()
        return lambda text: text.translate(byte_of).encode("latin-1", "ignore") or None
    if "Metaspace" in kinds or any(part.get("pattern") == {"String": _MARK} for part in parts):
        falls_back = "ByteFallback" in kinds

        def read(text: str) -> bytes:
            if falls_back and re.fullmatch(r"<0x[0-9A-F]{2}>", text):
                return bytes([int(text[3:5], 16)])
            return text.replace(_MARK, " ").encode()

        return read
    return lambda text: None


def _byte_level() -> dict[int, int]:
    """The byte that each character of a byte-level vocabulary stands for: where it can be printed, the one of its own
    number; for the others, in order, stand the characters from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(0x100) if b not in set(printed)]
    return {b: b for b in printed} | {0x100 + n: b for n, b in enumerate(others)}
