"""A tokenizer that knows its added tokens by other names, so that their texts in the data are text like any other."""

from __future__ import annotations

import json
from typing import Any

_FIRST = 0x100000  # the last private use plane
_MAX = 0xFFFE


class DisguisedTokenizer:
    """A copy of a tokenizer in which each added token is called by a character of its own: its stand-in.

    What is to be a token is written as its stand-in; what is text is written as it is, a special token's text too. So a
    text is tokenised as a whole: cut into pieces, each would get what tokenizers put before the first word of a text.

    Args:
        tokenizer: a transformers tokenizer.

    Raises:
        ValueError: it cannot be copied so: it is none of the tokenizers library, or its model needs those names.
    """

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError("no tokenizer of the tokenizers library")
        described = json.loads(backend.to_str())
        added = described["added_tokens"]
        if len(added) > _MAX:
            raise ValueError(f"{len(added)} added tokens, more than there are stand-ins")
        self.stand_ins = {token["content"]: chr(_FIRST + place) for place, token in enumerate(added)}
        ids = {self.stand_ins[token["content"]]: token["id"] for token in added}
        try:
            self._backend = Tokenizer.from_str(json.dumps(_renamed(described, self.stand_ins)))
        except Exception as error:  # the library's errors are plain Exceptions
            raise ValueError(str(error)) from error
        self._ids = {self._backend.token_to_id(name): number for name, number in ids.items()}

    def __call__(self, text: str) -> list[int]:
        """The ids, stand-ins as the tokens they stand for."""
        return [self._ids.get(number, number) for number in self._backend.encode(text, add_special_tokens=False).ids]


def _renamed(described: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A tokenizer's description with other names for its added tokens, in its model's vocabulary as well."""
    model = described["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        vocabulary = {names.get(piece, piece): number for piece, number in vocabulary.items()}
    else:
        vocabulary = [[names.get(piece, piece), score] for piece, score in vocabulary]
    unknown = model.get("unk_token")
    return {
        **described,
        "added_tokens": [{**token, "content": names[token["content"]]} for token in described["added_tokens"]],
        "model": {
            **model,
            "vocab": vocabulary,
            **({} if unknown is None else {"unk_token": names.get(unknown, unknown)}),
        },
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
