"""Calls: LMs without ids whose completions are kept, by what was asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from typing import Any

from cotune.errors import BadValueError
from cotune.programs.budget import answers_of
from cotune.programs.lm import LM, Completion, Filled, Request, Sampling
from cotune.programs.usage import Usage
from cotune.storage.row_store import RowStore

FORMAT = 1
"""Changes with the meaning of keys or values: what another format kept is not found."""

_REFUSED = ("refused", "too_long")

_known: ContextVar[bool] = ContextVar("_known", default=False)


def is_known() -> bool:
    """Whether the LM that is being asked has answered other requests of the run: a store has these answers."""
    # A run that is resumed asks for nothing but what was refused, and that does not mean that all is refused.
    return _known.get()


class StoredLM:
    """An LM without ids whose completions are kept, so that none is paid for twice. What was refused is asked anew.

    Args:
        lm: what answers requests that are not there. One with `answers(requests, sampling)`, which yields completions
            by their places as they come, has them kept as they come.
        completions: file of the store, which other LMs may share.
        identity: plain values by which the LM is known; null takes its own `identity`.
    """

    def __init__(self, lm: LM, completions: str, identity: Mapping[str, Any] | None = None) -> None:
        self.lm = lm
        self.identity: dict[str, Any] = dict(getattr(lm, "identity", {}) if identity is None else identity)
        if not self.identity:
            raise BadValueError(f"{type(lm).__name__} has no `identity`; give one, e.g. its name and where it runs.")
        self._store, self._stored = RowStore(completions), 0

    def __repr__(self) -> str:
        return f"StoredLM({self.lm!r}, {str(self._store.path)!r})"

    @property
    def usage(self) -> Usage:
        """The LM's, and how many completions the store had."""
        own: Usage = getattr(self.lm, "usage", Usage())
        return own + Usage(stored=self._stored)

    @property
    def seconds(self) -> float:
        """Wall time that keeping has taken."""
        return self._store.seconds

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion for each request, in their order; equal requests are asked once. Raises what the LM does."""
        keys = _call_keys(requests, sampling, self.identity)
        found = self._find(keys)
        self._stored += len(found)
        asked = {key: request for key, request in zip(keys, requests, strict=True) if key not in found}
        places = list(asked)
        usage = self.usage
        with _knowing(usage.calls + usage.stored > 0):
            for come in answers_of(self.lm, list(asked.values()), sampling) if asked else ():
                new = {places[at]: one for at, one in come.items()}
                if answered := {key: _pack(one) for key, one in new.items() if one.finished not in _REFUSED}:
                    self._store.write(answered)
                found |= new
        return [found[key] for key in keys]

    def close(self) -> None:
        """Closes the store, and what the LM holds open; the next request opens both again."""
        self._store.close()
        getattr(self.lm, "close", lambda: None)()

    def _find(self, keys: Sequence[bytes]) -> dict[bytes, Completion]:
        return {key: _unpack(value) for key, value in self._store.read(list(dict.fromkeys(keys))).items()}


@contextmanager
def _knowing(known: bool) -> Iterator[None]:
    token = _known.set(known)
    try:
        yield
    finally:
        _known.reset(token)


def _call_keys(requests: Sequence[Request], sampling: Sampling, identity: Mapping[str, Any]) -> list[bytes]:
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
        layout = [[type(part).__name__, asdict(part, dict_factory=_without_offsets)] for part in request.layout]
        adapter = [] if request.adapter == "default" else [request.adapter]  # older keys name none
        asked = [[dict(message) for message in request.messages], layout, request.seed, *adapter]
        own.update(json.dumps(asked, sort_keys=True).encode())
        keys.append(own.digest())
    return keys


def _without_offsets(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in fields if (name, value) != ("offsets", ())}  # older keys have none


def _pack(one: Completion) -> bytes:
    fields = [[field.name, field.text, field.ended] for field in one.fields]
    return json.dumps([one.text, one.finished, fields]).encode()


def _unpack(value: bytes) -> Completion:
    text, finished, fields, *_ = json.loads(value)  # earlier versions kept the cost as well
    filled = tuple(Filled(name, text, 0, 0, ended) for name, text, ended in fields)
    return Completion(text, finished=finished, fields=filled)
