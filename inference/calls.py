"""Calls: the store of completions that an endpoint was paid for, by what was asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cotune.inference.rows import RowStore
from cotune.programs.lm import Completion, Filled, Request, Sampling

FORMAT = 1
"""Changes with the meaning of keys or values: what another format kept is not found."""


@dataclass(frozen=True)
class Paid:
    """A completion, the model that answered, and what it cost."""

    completion: Completion
    model: str
    tokens_in: int
    tokens_out: int
    dollars: float


class CallStore(RowStore):
    """A file of completions by the messages that they answer; see `RowStore`. It may be the file of other stores."""

    def find(self, keys: Iterable[bytes]) -> dict[bytes, Paid]:
        """The completions that are there, by key."""
        return {key: _unpack(value) for key, value in self.read(list(dict.fromkeys(keys))).items()}

    def keep(self, found: Mapping[bytes, Paid]) -> None:
        """Writes completions in one transaction, which is on disk when this returns."""
        if found:
            self.write({key: _pack(paid) for key, paid in found.items()})


def call_keys(requests: Sequence[Request], sampling: Sampling, identity: Mapping[str, Any]) -> list[bytes]:
    """A key for each request: the SHA-256 of all that its completion follows from.

    The seed counts at temperature 0 too: endpoints do not promise equal answers there, and a second one may be wanted.

    Args:
        identity: the endpoint, the model and all else that is the same for all its requests, as plain values.
    """
    common = json.dumps(["call", FORMAT, dict(identity), asdict(sampling)], sort_keys=True)
    shared = hashlib.sha256(common.encode())
    keys = []
    for request in requests:
        own = shared.copy()
        layout = [[type(part).__name__, asdict(part)] for part in request.layout]
        asked = [[dict(message) for message in request.messages], layout, request.seed]
        own.update(json.dumps(asked, sort_keys=True).encode())
        keys.append(own.digest())
    return keys


def _pack(paid: Paid) -> bytes:
    one = paid.completion
    fields = [[field.name, field.text, field.ended] for field in one.fields]
    held = [one.text, one.finished, fields, paid.model, paid.tokens_in, paid.tokens_out, paid.dollars]
    return json.dumps(held).encode()


def _unpack(value: bytes) -> Paid:
    text, finished, fields, *cost = json.loads(value)
    filled = tuple(Filled(name, text, 0, 0, ended) for name, text, ended in fields)
    return Paid(Completion(text, finished=finished, fields=filled), *cost)
