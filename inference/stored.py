"""The completion store: every completion an LM has written, on disk, so that none is generated twice.

It is a cache, exact and shared by candidates, steps, runs and processes; and it is the journal of a run's LM work. Each
wave of completions is one transaction, so a run that was killed finds a wave whole or absent, and its prompt searches
and trace collections go through what they had done in moments, because they are functions of completions.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cotune.inference.engine import Engine, Generated, Prompted, Weights
from cotune.programs.layout import Layout
from cotune.programs.lm import Completion, Filled, Sampling
from cotune.programs.usage import Usage
from cotune.storage.row_store import CompletionStoreError, RowStore

__all__ = [
    "FORMAT",
    "CompletionStore",
    "CompletionStoreError",
    "StoredEngine",
    "completion_keys",
    "completion_of",
]

FORMAT = 2
"""Changes with the meaning of keys or values: what another format kept is not found."""


class CompletionStore(RowStore):
    """A file of completions by the ids that they follow from; see `RowStore`."""

    option = "model.lm.completions"

    def find(self, keys: Iterable[bytes]) -> dict[bytes, Generated]:
        """The completions that are there, by key."""
        return {key: _unpack(value) for key, value in self.read(list(dict.fromkeys(keys))).items()}

    def keep(self, found: Mapping[bytes, Generated]) -> None:
        """Writes completions in one transaction, which is on disk when this returns."""
        if found:
            self.write({key: _pack(generated) for key, generated in found.items()})

    def file_sum(self, path: Path) -> str:
        """SHA-256 of a file, remembered for as long as its size and time of change stay."""
        state = path.stat()
        key = hashlib.sha256(f"file|{path.resolve()}|{state.st_size}|{state.st_mtime_ns}".encode()).digest()
        known = self.read([key]).get(key)
        if known is None:
            with path.open("rb") as file:
                known = _digest_of(iter(lambda: file.read(1 << 20), b""))
            self.write({key: known})
        return known.hex()


class StoredEngine(Engine):
    """An engine whose completions are kept, so that none is generated twice; equal prompts of a call are one.

    They are generated wave by wave, each kept before the next begins. The waves follow from the prompts alone, so a run
    that was killed finds each whole or absent, and makes the same batches again.

    Args:
        engine: what completes the prompts that are not there.
        identity: adapter -> plain values by which the LM is known; asked only where completions are stored.

    Attributes:
        store: where completions are kept; None keeps none from one call to the next.
        before_wave: called before each wave; what it raises stops there.
        paid: what the engine made so far: completions, and the tokens that were read and written for them.
    """

    def __init__(self, engine: Engine, *, identity: Callable[[str], Mapping[str, Any]]) -> None:
        self.engine, self._identity_of = engine, identity
        self.store: CompletionStore | None = None
        self.before_wave: Callable[[], None] = lambda: None
        self.paid = Usage()

    def start(self, weights: Weights) -> None:
        self.engine.start(weights)

    def rest(self) -> None:
        self.engine.rest()

    def waves(self, prompts: Sequence[Prompted]) -> list[list[int]]:
        return self.engine.waves(prompts)

    def identity(self) -> Mapping[str, Any]:
        return self.engine.identity()

    def generate(self, prompts: Sequence[Prompted], sampling: Sampling, *, adapter: str) -> list[Generated]:
        lm = {**self._identity_of(adapter), **self.identity()} if self.store else {"adapter": adapter}
        keys = completion_keys(prompts, {**lm, **_asked(sampling)}, seeded=sampling.temperature > 0)
        known = self.store.find(keys) if self.store else {}
        if set(keys) - set(known):
            for wave in self.waves(prompts):
                missing = {keys[i]: prompts[i] for i in wave if keys[i] not in known}
                if missing:
                    known |= self._generated(missing, sampling, adapter)
        return [known[key] for key in keys]

    def _generated(self, missing: Mapping[bytes, Prompted], sampling: Sampling, adapter: str) -> dict[bytes, Generated]:
        self.before_wave()
        results = self.engine.generate(list(missing.values()), sampling, adapter=adapter)
        made = dict(zip(missing, results, strict=True))
        written = sum(len(one.ids) for one in results)
        self.paid += Usage(len(made), tokens_in=sum(len(one.ids) for one in missing.values()), tokens_out=written)
        if self.store:
            self.store.keep(made)
        return made


def completion_of(prompt_ids: Sequence[int], generated: Generated) -> Completion:
    """What an engine wrote as what an LM answers."""
    return Completion(
        generated.text,
        tuple(prompt_ids),
        tuple(generated.ids),
        generated.finished,
        generated.fields,
        generated.forced,
        generated.log_probs,
    )


def _asked(sampling: Sampling) -> dict[str, Any]:
    """What of the sampling decides a completion: where nothing is drawn, top-p does not."""
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p} if sampling.temperature > 0 else {}
    return {**drawn, "max_new_tokens": sampling.max_new_tokens, "log_probs": sampling.log_probs}


def completion_keys(prompts: Sequence[Prompted], common: Mapping[str, Any], *, seeded: bool) -> list[bytes]:
    """A key a prompt: the SHA-256 of all that its completion follows from.

    Args:
        common: what is the same for all prompts, as plain values: the LM and the sampling.
        seeded: the prompts' seeds count, as they do where completions are drawn.
    """
    shared = hashlib.sha256(json.dumps([FORMAT, common], sort_keys=True).encode())
    keys = []
    for prompt in prompts:
        own = shared.copy()
        own.update(json.dumps([list(prompt.ids), _plain(prompt.layout), prompt.seed if seeded else None]).encode())
        keys.append(own.digest())
    return keys


def _plain(layout: Layout) -> list[Any]:
    """A layout as values that JSON holds, no two layouts alike."""
    return [[type(part).__name__, *map(_plain_value, vars(part).values())] for part in layout]


def _plain_value(value: Any) -> Any:
    if not hasattr(value, "__dataclass_fields__"):
        return value
    return [type(value).__name__, *(part for part in vars(value).values() if part != ())]  # older keys have no offsets


def _pack(generated: Generated) -> bytes:
    """The ids as numbers, the rest as JSON; the text of a field that is the whole text is not written twice."""
    fields = [
        [field.name, None if field.text == generated.text else field.text, field.start, field.end, field.ended]
        for field in generated.fields
    ]
    forced = "".join("01"[mark] for mark in generated.forced)
    text = json.dumps([generated.finished, generated.text, fields, forced, generated.log_probs]).encode()
    return struct.pack(f"<I{len(generated.ids)}I", len(generated.ids), *generated.ids) + text


def _unpack(value: bytes) -> Generated:
    (count,) = struct.unpack_from("<I", value)
    finished, text, fields, forced, log_probs = json.loads(value[4 + 4 * count :])
    return Generated(
        list(struct.unpack_from(f"<{count}I", value, 4)),
        text,
        finished,
        tuple(Filled(name, text if own is None else own, *rest) for name, own, *rest in fields),
        tuple(mark == "1" for mark in forced),
        tuple(log_probs),
    )


def _digest_of(parts: Iterable[bytes]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()
