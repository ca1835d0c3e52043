"""Chats as token ids: the same encoding for generating and for training, with text of the data kept text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_FIRST_SENTINEL = 0xF0000  # the private use planes: text as good as never holds these, and is hidden itself if it does
_PRIVATE = f"[{chr(_FIRST_SENTINEL)}-{chr(0x10FFFF)}]"


class ChatEncoder:
    """Renders messages with the tokenizer's chat template and tokenises them, generation prompt included.

    Special tokens written inside a message ("<|im_end|>" in a passage) stay text: their characters are tokenised as
    ordinary text, so data can neither end a turn nor open one. A template without a system role (Mistral, Gemma) gets
    the system text at the head of the first user turn.

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
        self._has_system_role = self._renders_system()

    def __call__(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of the prompt, up to where the assistant's completion begins."""
        hidden: dict[str, str] = {}
        safe = [{"role": m["role"], "content": self._hide(m["content"], hidden)} for m in self._with_roles(messages)]
        text: str = self._tokenizer.apply_chat_template(safe, tokenize=False, add_generation_prompt=True)
        return self._tokenise(text, hidden)

    def _with_roles(self, messages: Sequence[Mapping[str, str]]) -> Sequence[Mapping[str, str]]:
        if self._has_system_role or messages[0]["role"] != "system":
            return messages
        if len(messages) == 1:
            return [{"role": "user", "content": messages[0]["content"]}]
        system, first, *rest = messages
        return [{"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}, *rest]

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

    def _renders_system(self) -> bool:
        probe = [{"role": "system", "content": "probe-system"}, {"role": "user", "content": "probe-user"}]
        try:
            return "probe-system" in self._tokenizer.apply_chat_template(probe, tokenize=False)
        except Exception:  # templates refuse a role by raise_exception(), whose class is jinja's own affair
            return False
