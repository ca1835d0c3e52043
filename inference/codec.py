"""A tokenizer as engines use it: text to ids and back, the ids that end a turn, and what each token writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from cotune.inference.vocabulary import Vocabulary
from torch import Tensor


class Codec:
    """Text to ids and back.

    Args:
        tokenizer: a transformers tokenizer.
        end_ids: ids that end a turn. The first is the one that is put where a completion has nothing more to say.
        encode: text of a completion -> ids; None for the tokenizer's own, without special tokens.
        decode: ids -> text; None for the tokenizer's own, special tokens left out. It is the same at the end of a text
            as in its middle.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        end_ids: Sequence[int],
        encode: Callable[[str], list[int]] | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        self.tokenizer, self.end_ids = tokenizer, tuple(end_ids)
        self.ends = frozenset(end_ids)
        self._encode, self._decode = encode, decode
        self._masks: dict[tuple[tuple[str, ...], int, torch.device], Tensor] = {}
        self.kept: dict[str, Any] = {}  # what constraints make of this tokenizer once

    def encode(self, text: str) -> list[int]:
        if self._encode is not None:
            return self._encode(text)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        if self._decode is not None:
            return self._decode(ids)
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What each token writes; made at first use, which takes up to a second."""
        return Vocabulary(self.tokenizer, self.decode)

    def continues(self, context: str, text: str) -> list[list[int]]:
        """Ids that may write `text` behind `context`, best first.

        The best are those that the tokenizer itself has there: encode(context + text) less encode(context). Where a
        token would reach across the seam there are none such, and the text gets the ids it has behind a letter.
        """
        found = []
        for before in (context, "a", "\n"):
            head, whole = self.encode(before) if before else [], self.encode(before + text)
            if whole[: len(head)] == head:
                found.append(whole[len(head) :])
        return [*found, self.encode(text)]

    def behind(self, written: Sequence[int], text: str) -> list[list[int]]:
        """Those of `continues` that do write the text behind these ids; all of them where none does."""
        context = self.decode(written) if written else ""
        found = self.continues(context, text)
        return [ids for ids in found if self.decode([*written, *ids]) == context + text] or found

    def empties(self, stops: tuple[str, ...], width: int, device: torch.device) -> Tensor:
        """(width,) True for tokens that would leave a field empty: ends of the turn, its stops behind white space."""
        key = (stops, width, device)
        if key not in self._masks:
            ids = list(self.ends)
            starts = [stop.encode() for stop in stops]
            for i, token in enumerate(self.vocabulary.tokens if stops else []):
                if token and any(start in token and not token.partition(start)[0].strip() for start in starts):
                    ids.append(i)
            self._masks[key] = mask_of(ids, width, device)
        return self._masks[key]


def mask_of(ids: Iterable[int], width: int, device: torch.device, *, but: bool = False) -> Tensor:
    """(width,) True for these ids; with `but`, for all others."""
    mask = torch.full((width,), but, dtype=torch.bool)
    mask[torch.tensor([i for i in ids if i < width], dtype=torch.long)] = not but
    return mask.to(device)


def canonical_share(codec: Codec, completions: Sequence[Sequence[int]]) -> float:
    """The share of completions whose ids are those that the tokenizer gives their text (ends of the turn apart)."""
    bare = [[i for i in ids if i not in codec.ends] for ids in completions]
    return sum(codec.encode(codec.decode(ids)) == ids for ids in bare) / len(bare) if bare else 1.0
