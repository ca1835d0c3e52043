"""A prompt whose completion a server writes, field by field: what to ask for next, and what to make of the answer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from cotune.inference.engine import Generated, Prompted
from cotune.inference.fields import Filling, Plan
from cotune.inference.vllm.server import Server, VLLMError, Written
from cotune.programs.lm import Sampling
from torch import Tensor

_CPU = torch.device("cpu")
_FEW = 256
"""Tokens that may come next, up to which the server is told them at once instead of tried without."""
_MOST_STOPS = 4
"""In one request; a server refuses more, unless its VLLM_MAX_STOP_STRINGS says otherwise."""
_FIRST_PIECE, _LONGEST_PIECE = 4, 64
"""Tokens of a guided field that are asked for at once: more each time while they are as they have to be."""


class Row:
    """A completion under way, which any server may go on with.

    Where any token may come, the server writes until the field ends. Where a field's syntax rules tokens out, it first
    writes as it likes: a token that is allowed is what it would have written with the others ruled out (drawn ones have
    the same probabilities, as those that are rejected are drawn again among the allowed). Where one is not allowed, the
    server is asked for that token alone, among those that are; so it is where choices have offsets. Fixed texts are
    put there here, as ids.

    Attributes:
        servers: which have written in it.
        fault: why a server did not go on with it, when one last did not; "" where none has failed.
    """

    def __init__(self, place: int, prompt: Prompted, plan: Plan, sampling: Sampling, *, room: int, width: int) -> None:
        self.place, self.prompt, self._plan, self._sampling = place, prompt, plan, sampling
        self._room, self._width = room, width
        self.fault = ""
        self.begin()

    def begin(self) -> None:
        """Forgets what was written."""
        self._filling = Filling(self._plan, max_new_tokens=self._sampling.max_new_tokens, room=self._room)
        self.servers: set[Server] = set()
        self._masked, self._rejected = False, False
        self._piece = _FIRST_PIECE

    @property
    def ended(self) -> bool:
        return self._filling.finished is not None

    @property
    def result(self) -> Generated:
        return self._filling.result(log_probs=self._sampling.log_probs)

    def request(self) -> dict[str, Any]:
        """What is to be written next."""
        filling, sampling = self._filling, self._sampling
        forbidden_V = filling.forbidden(self._width, _CPU)
        added = filling.offsets(_CPU)
        self._masked = forbidden_V is not None and (
            added is not None
            or sampling.log_probs
            or self._rejected
            or (not self._masked and int((~forbidden_V).sum()) <= _FEW)
        )
        most = min(filling.left, self._piece) if filling.guided else filling.left
        body: dict[str, Any] = {
            "prompt": [*self.prompt.ids, *filling.written],
            "max_tokens": 1 if self._masked or added is not None else most,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop_token_ids": sorted(self._plan.codec.ends),
        }
        if sampling.temperature > 0:
            body["seed"] = self._seed()
        if sampling.log_probs:
            body["logprobs"] = 0
        if self._masked and forbidden_V is not None:
            body |= _among(forbidden_V)
        elif filling.stops and not filling.guided:
            body["stop"] = _fewest(filling.stops)  # it may stop early or late: what ends the field is decided here
        if added is not None:
            tokens, nats = (of.tolist() for of in added)
            body["logit_bias"] = body.get("logit_bias", {}) | dict(zip(map(str, tokens), nats, strict=True))
        return body

    def take(self, written: Written) -> None:
        """Goes on with what was written, up to where it could not know what follows.

        Raises:
            VLLMError: a token that it was told not to write, or that the LM does not have.
        """
        filling, fields = self._filling, len(self._filling.fields)
        start, self._rejected = len(filling.written), False
        expected = [*filling.written, *written.ids]
        while (
            not self.ended
            and start <= (at := len(filling.written)) < len(expected)
            and (filling.written == expected[:at])
        ):
            token = expected[at]
            forbidden_V = filling.forbidden(self._width, _CPU)
            if not 0 <= token < self._width or (self._masked and forbidden_V is not None and forbidden_V[token]):
                raise VLLMError(f"a vLLM server wrote the token {token}, which was excluded or does not exist.")
            if forbidden_V is not None and not self._masked and (self._sampling.log_probs or forbidden_V[token]):
                self._rejected = True
                break
            filling.take(token, written.log_probs[at - start] if written.log_probs else 0.0)
        same = len(filling.fields) == fields and not self._rejected
        self._piece = min(2 * self._piece, _LONGEST_PIECE) if same and not self._masked else _FIRST_PIECE

    def _seed(self) -> int:
        """Of the next draws: they follow from the prompt's seed and their place alone."""
        name = f"{self.prompt.seed}|{self._filling.free}|{self._masked}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1


def _fewest(stops: Sequence[str]) -> list[str]:
    """Texts at one of which each of the stops is noticed, perhaps with others: as many as vLLM takes.

    >>> _fewest(["\\n\\na:", "\\na:", "b"])
    ['\\na:', 'b']
    """
    least = [stop for stop in stops if not any(other != stop and other in stop for other in stops)]
    common = os.path.commonprefix(least)  # noqa: RUF071 (of any strings)
    return least if len(least) <= _MOST_STOPS else [common] if common else least[:_MOST_STOPS]


def _among(forbidden_V: Tensor) -> dict[str, Any]:
    """A request's parameter that rules tokens out, the shorter of the two there are."""
    allowed, ruled_out = _places(~forbidden_V), _places(forbidden_V)
    if len(allowed) <= len(ruled_out):
        return {"allowed_token_ids": allowed}
    return {"logit_bias": {str(token): -100.0 for token in ruled_out}}


def _places(mask_V: Tensor) -> Sequence[int]:
    found: list[int] = mask_V.nonzero()[:, 0].tolist()
    return found
