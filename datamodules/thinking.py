"""Thinking: what a reasoning model writes before its answer, and how the two are told apart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from cotune.programs.layout import Field, Layout
from cotune.programs.lm import Completion, Filled

Tags = tuple[str, str]
"""What opens thinking, and what closes it."""

_NAMED = re.compile(
    r"[<\[]\|?(?:\w+:)?(?:THINK|THINKING|THOUGHT|REASONING|REASON|START_THINKING)\|?[>\]]", re.IGNORECASE
)
_CHANNELS: Tags = ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>")  # gpt-oss


@dataclass(frozen=True)
class Thinking:
    """How a model thinks, as far as its chat template and its tokenizer tell.

    Attributes:
        tags: what may open and close it.
        opened: the tags that the prompt leaves open, so that a completion begins inside; None where it does not.
    """

    tags: tuple[Tags, ...] = (("<think>", "</think>"),)
    opened: Tags | None = None

    def split(self, text: str, *, ended: bool = True) -> tuple[str, str]:
        """(thinking, answer) of a completion's text, the tags in neither.

        Text that a model ended itself without closing what the prompt had opened is an answer: it was taught to give
        one at once. Cut off at a limit, it is thinking.

        >>> Thinking().split("<think>so it is</think>\\n\\nred"), Thinking().split("red")
        (('so it is', 'red'), ('', 'red'))
        >>> Thinking(opened=("<think>", "</think>")).split("so it", ended=False)
        ('so it', '')
        """
        opens = next((tags for tags in self.tags if text.lstrip().startswith(tags[0])), None)
        for opening, closing in [opens] if opens else [self.opened] if self.opened else self.tags:
            thought, closed, answer = text.partition(closing)
            thought = thought.strip().removeprefix(opening).strip()
            if closed:
                return thought, answer.lstrip()
            if opens or (self.opened and not ended):
                return thought, ""
        return "", text

    def special(self, tokens: Iterable[str]) -> frozenset[str]:
        """Those of a tokenizer's special tokens that tags are made of: without them nothing could be told apart."""
        return frozenset(token for token in tokens if any(token in tag for tags in self.tags for tag in tags))


def thinking_of(template: str, tokens: Iterable[str], opening: str) -> Thinking:
    """How the model of a chat template thinks.

    Args:
        template: its source.
        tokens: the tokenizer's added tokens.
        opening: what the template writes behind the last user's turn for the assistant to go on from.
    """
    named = [*_NAMED.findall(template), *(token for token in tokens if _NAMED.fullmatch(token))]
    pairs = dict.fromkeys([*map(_pair, named), *Thinking().tags])
    if all(part in template for part in ("<|channel|>", "final")):
        pairs[_CHANNELS] = None
    return Thinking(tuple(pairs), _left_open(opening, tuple(pairs)))


def _pair(opening: str) -> Tags:
    if "START_THINKING" in opening:
        return opening, opening.replace("START_THINKING", "END_THINKING")
    return opening, opening[0] + ("|/" if opening[1] == "|" else "/") + opening[1:].lstrip("|")


def _left_open(opening: str, pairs: Sequence[Tags]) -> Tags | None:
    """The tags of which the opening one stands there last, and nothing closes it."""
    return next((tags for tags in pairs if opening.rfind(tags[0]) > opening.rfind(tags[1])), None)


def told_apart(done: Completion, layout: Layout, thinking: Thinking) -> Completion:
    """A completion whose thinking stands in `thinking`, and neither in its text nor in its fields' texts.

    A model may think at the beginning of any field that takes any text; what the prompt leaves open is the first one's.
    """
    parts = [part for part in layout if isinstance(part, Field)]
    fields, thoughts, text, place = list[Filled](), list[str](), done.text, 0
    for part, field in zip(parts, done.fields, strict=False):  # a completion can end before its last field
        thought, answer = "", field.text
        if part.syntax is None:
            way = replace(thinking, opened=None) if fields else thinking
            thought, answer = way.split(field.text, ended=field.ended != "length")
        place = max(text.find(field.text, place), place)
        text = text[:place] + text[place:].replace(field.text, answer, 1)
        place += len(answer)
        thoughts += [thought] if thought else []
        fields.append(replace(field, text=answer))
    return replace(done, text=text, fields=tuple(fields), thinking="\n\n".join(thoughts))
