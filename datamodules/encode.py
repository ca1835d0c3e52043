"""Chats as token ids: the same encoding for generating and for training, with text of the data kept text."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cotune.datamodules.disguise import DisguisedTokenizer
from cotune.datamodules.thinking import Thinking, thinking_of
from cotune.errors import CotuneError

_DAY = datetime.datetime(2024, 7, 26)
_SETTINGS = {"enable_thinking": False, "date_string": f"{_DAY:%d %b %Y}"}
"""What templates may ask of their caller. Programs have reasoning as a field of their own, so Qwen3 and its like do not
think besides; and Llama 3.1 and later write the day into the prompt, with which a run continued tomorrow would be
another run: they get the date that their template itself falls back to. Other templates take no notice."""

_FIRST_SENTINEL = 0xF0000  # private use planes: almost no text has these characters; text that does is hidden too
_PRIVATE = f"[{chr(_FIRST_SENTINEL)}-{chr(0x10FFFF)}]"


@dataclass(frozen=True)
class Vocabulary:
    """What token ids mean: which tokenizer they are of, and texts as ids and back.

    Attributes:
        tokenizer: SHA-256 of its tokens with their ids, and of its end of turn; "" where nobody knows.
        base: name of the LM that reads and writes them.
        canonical: whether ids of a completion are those that the tokenizer gives their text.
    """

    tokenizer: str = ""
    base: str = ""
    encode: Callable[[str], Sequence[int]] = lambda text: ()
    decode: Callable[[Sequence[int]], str] = lambda ids: ""
    canonical: Callable[[Sequence[int]], bool] = lambda ids: False

    def canonical_share(self, completions: Sequence[Sequence[int]]) -> float | None:
        """The share of completions that is canonical; None without any, or where nobody knows whose ids they are."""
        if not self.tokenizer or not completions:
            return None
        return sum(map(self.canonical, completions)) / len(completions)


class ChatTemplateError(CotuneError, ValueError):
    """A tokenizer's chat template cannot say what a program says. The message says why, and what to do."""


class ChatEncoder:
    """Renders messages with the tokenizer's chat template and tokenises them, generation prompt included.

    Special tokens written inside a message ("<|im_end|>" in a passage) stay text: their characters are tokenised as
    ordinary text, together with what stands around them, so data can neither end a turn nor open one. What a template
    takes is found out by trying: content as text or as parts; a system role, or else (Mistral, Gemma 2) the system text
    at the head of the first user turn; neighbours of one role, or else as one turn. That every text comes through is
    checked once, here. A template that asks for the time is always told the same day. Markup that a template writes in
    plain text, such as Llama 2's "[INST]", is no token and cannot be told from the same text in the data.

    Args:
        tokenizer: a transformers tokenizer that has a chat template.

    Attributes:
        thinking: how the model thinks before it answers, and how to tell the two apart.
        turn_end: id of the token with which the template ends an assistant's turn; None where it shows none.

    Raises:
        ChatTemplateError: there is no chat template, it is no valid Jinja, or it leaves texts out.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._template = _with_fixed_day(_template(tokenizer))
        self._added: Mapping[str, int] = tokenizer.get_added_vocab()
        tokens = [text for text in self._added if text]
        tags = [tag for pair in thinking_of(self._template, tokens, "").tags for tag in pair]
        longest = sorted({*tokens, *tags}, key=len, reverse=True)
        self._hidden = re.compile("|".join([*map(re.escape, longest), _PRIVATE]))
        self._tokens = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
        self._parts = False
        self._has_system_role, self._repeats_roles = self._abilities()
        self._opening = self._text([{"role": "user", "content": "x"}])
        self.thinking: Thinking = thinking_of(self._template, tokens, self._prompted())
        self.turn_end = self._turn_end()

    def __call__(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of the prompt, up to where the assistant's completion begins."""
        hidden: dict[str, str] = {}
        safe = [{"role": m["role"], "content": self._hide(m["content"], hidden)} for m in self._with_roles(messages)]
        return self._tokenise(self._text(safe), hidden)

    def text(self, text: str, *, closes_thinking: bool = True) -> list[int]:
        """Token ids of an answer as they follow a prompt; no special token's text in it becomes one.

        Args:
            closes_thinking: where the prompt leaves thinking open, they close it first.
        """
        hidden: dict[str, str] = {}
        opened = self.thinking.opened if closes_thinking else None
        safe = (f"\n{opened[1]}\n\n" if opened else "") + self._hide(text, hidden)
        before, whole = self._opening_ids, self._tokenise(self._opening + safe, hidden)
        return whole[len(before) :] if whole[: len(before)] == before else self._tokenise(safe, hidden)

    @functools.cached_property
    def _opening_ids(self) -> list[int]:
        return self._ids(self._opening)

    def vocabulary(self, base: str) -> Vocabulary:
        """What this tokenizer's ids mean, for the LM of that name."""
        return Vocabulary(self._digest, base, self.text, self._tokenizer.decode, self._canonical)

    def _canonical(self, ids: Sequence[int]) -> bool:
        ends = (self.turn_end, self._tokenizer.eos_token_id)
        runs = [[i for i in part if i not in ends] for part, plain in self._runs(ids) if plain]
        return all(self.text(self.decode(run), closes_thinking=False) == run for run in runs)

    @functools.cached_property
    def _digest(self) -> str:
        tokens = json.dumps([sorted(self._tokenizer.get_vocab().items()), self._tokenizer.eos_token])
        return hashlib.sha256(tokens.encode()).hexdigest()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of written ids, without special tokens other than those that thinking is told by."""
        options = {"clean_up_tokenization_spaces": False}
        runs = self._runs(ids)
        return "".join(self._tokenizer.decode(part, skip_special_tokens=skip, **options) for part, skip in runs)

    def _runs(self, ids: Sequence[int]) -> list[tuple[list[int], bool]]:
        """The ids in order, cut around those of thinking's tokens, and whether special tokens are left out of each."""
        if not self._telling:
            return [(list(ids), True)]
        runs: list[tuple[list[int], bool]] = [([], True)]
        for token in ids:
            runs += [([token], False), ([], True)] if token in self._telling else []
            if token not in self._telling:
                runs[-1][0].append(token)
        return [run for run in runs if run[0]]

    @functools.cached_property
    def _telling(self) -> frozenset[int]:
        special = self.thinking.special(self._tokenizer.all_special_tokens)
        return frozenset(self._added[token] for token in special if token in self._added)

    def _text(self, messages: Sequence[Mapping[str, str]], *, prompt: bool = True) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                [{**m, "content": self._content(m["content"])} for m in messages],
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=prompt,
                **_SETTINGS,
            )
        )

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self._parts else text

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
        whole = self._as_a_whole(text, hidden)
        if whole is not None:
            return whole
        ids: list[int] = []
        for piece in re.split(f"({_PRIVATE})", text):
            ids += self._literal(hidden[piece]) if piece in hidden else self._ids(piece)
        return ids

    def _as_a_whole(self, text: str, hidden: Mapping[str, str]) -> list[int] | None:
        """The ids by a tokenizer that knows special tokens by other names; None where there is none that can serve."""
        disguised = self._disguised
        if disguised is None or set("".join(hidden.values())) & set(disguised.stand_ins.values()):
            return None
        text = self._tokens.sub(lambda match: disguised.stand_ins.get(match[0], match[0]), text)
        names = set(disguised.stand_ins.values())
        meant = sum(character in names for character in text)
        ids = disguised(re.sub(_PRIVATE, lambda match: hidden.get(match[0], match[0]), text))
        return ids if sum(token in self._numbers for token in ids) == meant else None

    @functools.cached_property
    def _disguised(self) -> DisguisedTokenizer | None:
        """Made at the first need, as it takes a second where the vocabulary is large."""
        try:
            disguised = DisguisedTokenizer(self._tokenizer)
        except ValueError:
            return None
        probe = self._text(self._with_roles(_PROBES))
        renamed = self._tokens.sub(lambda match: disguised.stand_ins.get(match[0], match[0]), probe)
        return disguised if disguised(renamed) == self._ids(probe) else None

    @functools.cached_property
    def _numbers(self) -> frozenset[int]:
        return frozenset(self._added.values())

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

    # What the template takes, found out by trying

    def _abilities(self) -> tuple[bool, bool]:
        """(has a system role, takes neighbours of one role); sets how content is given.

        Raises:
            ChatTemplateError: however it is asked, texts are left out.
        """
        why = ""
        for self._parts in (False, True):
            has_system = not self._refusal(_PROBES[:2])
            plain = "" if has_system else self._refusal(_PROBES[1:2])
            why = why or plain
            if not plain:
                break
        else:
            raise ChatTemplateError(f"{self._named} cannot be used: {why}. {_WAY_OUT}")
        repeats = not self._refusal([_PROBES[1], {**_PROBES[3], "role": "user"}])
        self._has_system_role, self._repeats_roles = has_system, repeats
        if why := self._refusal(self._with_roles(_PROBES), [probe["content"] for probe in _PROBES]):
            raise ChatTemplateError(f"{self._named} cannot show a demo: {why}. {_WAY_OUT}")
        return has_system, repeats

    def _refusal(self, chat: Sequence[Mapping[str, str]], texts: Sequence[str] | None = None) -> str:
        """Why the template does not take this chat, or which turn's text it leaves out; "" where it takes it."""
        try:
            rendered = self._text(chat)
        except Exception as error:  # templates refuse by raise_exception(), and fail in any way that Python has
            return f"it does not take {_roles(chat)} ({' '.join(str(error).split()) or type(error).__name__})"
        missing = [text for text in texts or [message["content"] for message in chat] if text not in rendered]
        return f"of {_roles(chat)} it leaves a text out" if missing else ""

    @property
    def _named(self) -> str:
        return f'the chat template of "{self._tokenizer.name_or_path}"'

    def _prompted(self) -> str:
        """What the template writes behind the last turn for the assistant to go on from."""
        bare = self._text([{"role": "user", "content": "x"}], prompt=False)
        return self._opening[len(bare) :] if self._opening.startswith(bare) else self._opening.rpartition("x")[2]

    def _turn_end(self) -> int | None:
        """The token behind an assistant's text, at the chat's end or else before the next turn."""
        for chat in (_PROBES[1:3], _PROBES[1:]):
            try:
                text = self._text(chat, prompt=False)
            except Exception:
                continue
            found = self._tokens.match(text.partition(_PROBES[2]["content"])[2].lstrip())
            if found:
                return self._added[found[0]]
        return None


_PROBES: Sequence[Mapping[str, str]] = [
    {"role": "system", "content": "probe-0"},
    {"role": "user", "content": "probe-1"},
    {"role": "assistant", "content": "probe-2"},
    {"role": "user", "content": "probe-3"},
]
_WAY_OUT = "Put one that takes plain chats into chat_template.jinja beside the tokenizer, or take another model"


def _template(tokenizer: Any) -> str:
    """The source of the template for plain chats.

    Raises:
        ChatTemplateError: there is none, several and none of them the default, or it is no valid Jinja.
    """
    name, template = tokenizer.name_or_path, tokenizer.chat_template
    if not template:
        raise ChatTemplateError(
            f'the tokenizer of "{name}" has no chat template. '
            "Use an instruct model, or put a chat_template.jinja next to its tokenizer."
        )
    if not isinstance(template, str) and "default" not in template:
        raise ChatTemplateError(
            f'the tokenizer of "{name}" has chat templates named {", ".join(sorted(template))}, and none named '
            '"default". Put the one to use into chat_template.jinja next to it.'
        )
    source = template if isinstance(template, str) else template["default"]
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template=source, tokenize=False)
    except TemplateSyntaxError as error:
        raise ChatTemplateError(
            f'the chat template of "{name}" is no valid Jinja (line {error.lineno}: {error.message}). Fix '
            "chat_template.jinja (or tokenizer_config.json) beside the tokenizer, or copy that of the base model."
        ) from error
    except Exception:
        pass
    return str(source)


def _with_fixed_day(template: str) -> str:
    """The template with a clock of its own, which stands still, where it asks for the time."""
    if "strftime_now" not in template:
        return template
    said = "format"
    for directive in "aAbBcdeDFhHIjklmMnpPrRsSTuUVwWxXyYzZ":
        value = _DAY.strftime(f"%{directive}")
        unpadded = value.lstrip("0") or "0"
        said += f"|replace('%-{directive}', {unpadded!r})|replace('%{directive}', {value!r})"
    # The line break behind the block is Jinja's to trim, so that the template begins as it did.
    return f"{{% macro strftime_now(format) %}}{{{{ {said}|replace('%%', '%') }}}}{{% endmacro %}}\n{template}"


def _roles(chat: Sequence[Mapping[str, str]]) -> str:
    return "a chat of " + ", ".join(message["role"] for message in chat)


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
