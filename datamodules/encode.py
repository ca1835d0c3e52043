"""Chats as token ids: the same encoding for generating and for training, with text of the data kept text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_FIRST_SENTINEL = 0xE000  # Unicode's private use area: no text that means anything holds these


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
        self._special = sorted({text for text in tokenizer.get_added_vocab() if text}, key=len, reverse=True)
        self._has_system_role = self._renders_system()

    def __call__(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of the prompt, up to where the assistant's completion begins."""
        hidden: list[str] = []
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

    def _hide(self, content: str, hidden: list[str]) -> str:
        """Content with each special token's text replaced by a sentinel; the texts are appended to `hidden`."""
        content = "".join(c for c in content if not 0xE000 <= ord(c) <= 0xF8FF)
        for special in self._special:
            while special in content:
                content = content.replace(special, chr(_FIRST_SENTINEL + len(hidden)), 1)
                hidden.append(special)
        return content

    def _tokenise(self, text: str, hidden: Sequence[str]) -> list[int]:
        ids: list[int] = []
        start = 0
        for position, char in enumerate(text) if hidden else ():
            number = ord(char) - _FIRST_SENTINEL
            if 0 <= number < len(hidden):
                ids += self._ids(text[start:position]) + self._ids(hidden[number], split_special_tokens=True)
                start = position + 1
        return ids + self._ids(text[start:])

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
