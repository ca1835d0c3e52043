"""Chats as token ids: the same encoding for generating and for training, with text of the data kept text."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

_SETTINGS = {"enable_thinking": False, "date_string": "26 Jul 2024"}
"""What templates may ask of their caller. Programs have reasoning as a field of their own, so Qwen3 and its like do not
think besides; and Llama 3.1 and later write the day into the prompt, with which a run continued tomorrow would be
another run: they get the date that their template itself falls back to. Other templates take no notice."""

_FIRST_SENTINEL = 0xF0000  # the private use planes: text as good as never holds these, and is hidden itself if it does
_PRIVATE = f"[{chr(_FIRST_SENTINEL)}-{chr(0x10FFFF)}]"


@dataclass(frozen=True)
class Vocabulary:
    """What token ids mean: which tokenizer they are of, and texts as ids and back.

    Attributes:
        tokenizer: SHA-256 of its tokens with their ids, and of its end of turn; "" where nobody knows.
        base: name of the LM that reads and writes them.
    """

    tokenizer: str = ""
    base: str = ""
    encode: Callable[[str], Sequence[int]] = lambda text: ()
    decode: Callable[[Sequence[int]], str] = lambda ids: ""


class ChatEncoder:
    """Renders messages with the tokenizer's chat template and tokenises them, generation prompt included.

    Special tokens written inside a message ("<|im_end|>" in a passage) stay text: their characters are tokenised as
    ordinary text, so data can neither end a turn nor open one. A template without a system role (Mistral, Gemma 2) gets
    the system text at the head of the first user turn, and one whose roles must alternate gets neighbours of one role
    as one turn; both are found out by trying. Markup that a template writes in plain text, such as Llama 2's "[INST]",
    is no token and cannot be told from the same text in the data.

    Args:
        tokenizer: a transformers tokenizer that has a chat template.

    Raises:
        ValueError: there is no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f'the tokenizer of "{tokenizer.name_or_path}" has no chat template. '
                "Take an instruct model, or put a chat_template.jinja beside its tokenizer."
            )
        self._tokenizer = tokenizer
        special = sorted((text for text in tokenizer.get_added_vocab() if text), key=len, reverse=True)
        self._hidden = re.compile("|".join([*map(re.escape, special), _PRIVATE]))
        self._has_system_role = self._renders("system", "user")
        self._repeats_roles = self._renders("user", "user")

    def __call__(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of the prompt, up to where the assistant's completion begins."""
        hidden: dict[str, str] = {}
        safe = [{"role": m["role"], "content": self._hide(m["content"], hidden)} for m in self._with_roles(messages)]
        return self._tokenise(self._text(safe), hidden)

    def text(self, text: str) -> list[int]:
        """Token ids of a completion's text; no special token's text in it becomes one."""
        hidden: dict[str, str] = {}
        return self._tokenise(self._hide(text, hidden), hidden)

    def vocabulary(self, base: str) -> Vocabulary:
        """What this tokenizer's ids mean, for the LM of that name."""
        return Vocabulary(self._digest, base, self.text, self._tokenizer.decode)

    @cached_property
    def _digest(self) -> str:
        tokens = json.dumps([sorted(self._tokenizer.get_vocab().items()), self._tokenizer.eos_token])
        return hashlib.sha256(tokens.encode()).hexdigest()

    def _text(self, messages: Sequence[Mapping[str, str]]) -> str:
        return str(
            self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **_SETTINGS)
        )

    def _with_roles(self, messages: Sequence[Mapping[str, str]]) -> Sequence[Mapping[str, str]]:
        """The messages in roles that the template takes."""
        if not self._has_system_role:
            messages = _system_folded(messages)
        return messages if self._repeats_roles else _joined(messages)

    def _hide(self, content: str, hidden: dict[str, str]) -> str:
        """Content with a sentinel, a single character, for each special token's text; `hidden` learns what it hides."""
        by_text = {text: sentinel for sentinel, text in hidden.items()}

        def sentinel(match: re.Match[str]) -> str:
            found = by_text.setdefault(match[0], chr(_FIRST_SENTINEL + len(by_text)))
            hidden[found] = match[0]
            return found

        return self._hidden.sub(sentinel, content)

    def _tokenise(self, text: str, hidden: Mapping[str, str]) -> list[int]:
        if not hidden:
            return self._ids(text)
        ids: list[int] = []
        for piece in re.split(f"({_PRIVATE})", text):
            ids += self._literal(hidden[piece]) if piece in hidden else self._ids(piece)
        return ids

    def _literal(self, text: str) -> list[int]:
        """Ids of a special token's characters. The option serves tokens marked special; parting serves the others."""
        whole = self._ids(text, split_special_tokens=True)
        if len(whole) > 1 or len(text) == 1:
            return whole
        return self._ids(text[:1]) + self._ids(text[1:], split_special_tokens=True)

    def _ids(self, text: str, **options: Any) -> list[int]:
        if not text:
            return []
        return list(self._tokenizer(text, add_special_tokens=False, **options).input_ids)

    def _renders(self, *roles: str) -> bool:
        """Whether the template takes a chat of these roles, and leaves no turn's text out."""
        probes = [f"probe-{place}" for place in range(len(roles))]
        chat = [{"role": role, "content": probe} for role, probe in zip(roles, probes, strict=True)]
        try:
            text = self._text(chat)
        except Exception:  # templates refuse a role by raise_exception(), whose class is jinja's own affair
            return False
        return all(probe in text for probe in probes)


def _system_folded(messages: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The chat with its system text at the head of the first user turn, or as a user turn where none follows it."""
    if messages[0]["role"] != "system":
        return list(messages)
    user = {"role": "user", "content": messages[0]["content"]}
    follows = len(messages) > 1 and messages[1]["role"] == "user"
    return [*_joined([user, *messages[1:2]]), *messages[2:]] if follows else [user, *messages[1:]]


def _joined(messages: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The chat with neighbours of one role as one turn, a blank line between their texts."""
    joined: list[Mapping[str, str]] = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"]:
            content = f"{joined[-1]['content']}\n\n{message['content']}"
            joined[-1] = {"role": message["role"], "content": content}
        else:
            joined.append(message)
    return joined
