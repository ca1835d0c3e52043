"""What a model's fast paths were found to be fit for: tried once for a config and the versions of the libraries."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from cotune.inference.local.transformers_internals import NAMES_OF_CONFIGS, random_like

Build = Callable[[Any], Any]
"""Config -> a random model of it, of the class that the weights would be read into."""

_READ_WITH = ("findings", "probe", "training/loss", "training/packed_attention", "training/packing", "training/plain")
_NO_COMPUTATION = (*NAMES_OF_CONFIGS, "dtype", "torch_dtype", "quantization_config")
"""Of a config what changes no computation that is tried."""

_READ_WITH_TOO = ("cascade", "decoder", "plain", "prefixes", "torch_internals", "transformers_internals")
"""Modules of this folder, and of inference/local, on which the findings depend."""


@dataclass(frozen=True)
class Way:
    """One fast path.

    Attributes:
        why: why it cannot be gone at all; "" where it can.
        up_to: the longest text, in tokens, that it can be gone with; None for any.
    """

    why: str = ""
    up_to: int | None = None

    def fits(self, length: int) -> bool:
        return not self.why and (self.up_to is None or length <= self.up_to)


@dataclass(frozen=True)
class Findings:
    """What a model is fit for. As it is made without arguments, everything.

    Attributes:
        decodes: prompts decoded together, what they share computed once (`cascade`); else one at a time (`plain`).
        packs: training rows packed into one sequence (`packing`).
        pads: training rows padded behind what they share; else one at a time.
        drops: attention drops weights while training, for which packed rows have no way.
        wrong: why the model cannot be used at all; "" where it can.
    """

    decodes: Way = Way()
    packs: Way = Way()
    pads: Way = Way()
    drops: bool = False
    wrong: str = ""

    @property
    def remarks(self) -> list[str]:
        """What is slower than it might be and why, in words."""
        rows = "training rows are computed one at a time: equal, but slower"
        padded = "training rows are padded: equal, but slower"
        said = [
            *_way_text(self.decodes, "prompts are completed one at a time: equal, but slower"),
            *_way_text(self.packs, padded if self.pads != self.packs else rows),
        ]
        return said + (_way_text(self.pads, rows) if self.pads not in (self.packs, Way()) else [])


def _way_text(way: Way, what: str) -> list[str]:
    if way.why:
        return [f"{what} ({way.why})"]
    return [] if way.up_to is None else [f"over {way.up_to:,} tokens {what}"]


def findings(model: Any) -> Findings:
    """What is known of a model, or found out now."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base not in _known:
        remember(base, find(base.config, random_like(base)))
    return _known[base]


def remember(model: Any, found: Findings) -> None:
    """Takes it for granted of this model from now on."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    _known[base] = found


_known: WeakKeyDictionary[Any, Findings] = WeakKeyDictionary()


def find(config: Any, build: Build) -> Findings:
    """Tries a config's models, unless one of the same config was tried here before with the same libraries."""
    key = _key(config)
    if key not in _tried:
        path = _kept_at(key)
        _tried[key] = (path and _read(path)) or _probed(config, build, path)
    return _tried[key]


_tried: dict[str, Findings] = {}


def _probed(config: Any, build: Build, path: Path | None) -> Findings:
    import torch
    from cotune.lightning_modules.probe import probe

    with (
        torch.inference_mode(False),
        torch.enable_grad(),
    ):  # the asker may be generating; gradients are tried, too
        found = probe(config, build)
    if path is not None:
        with contextlib.suppress(OSError):  # what is not kept is tried again
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(asdict(found), indent=2), encoding="utf-8")
            os.replace(partial, path)
    return found


def _read(path: Path) -> Findings | None:
    try:
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        ways: dict[str, Any] = {name: Way(**kept.pop(name)) for name in ("decodes", "packs", "pads")}
        return Findings(**ways, **kept)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _kept_at(key: str) -> Path | None:
    from cotune.lightning_modules.embedded import EmbeddedModelError, cache_folder

    try:
        return cache_folder() / "probes" / f"{key[:24]}.json"
    except EmbeddedModelError:
        return None


def _key(config: Any) -> str:
    settings = {name: value for name, value in config.to_dict().items() if name not in _NO_COMPUTATION}
    return hashlib.sha256(json.dumps([settings, _made_with()], sort_keys=True, default=str).encode()).hexdigest()


@functools.cache
def _made_with() -> list[str]:
    import torch
    import transformers
    from cotune.inference import local

    here, there = Path(__file__).parent, Path(str(local.__file__)).parent
    files = [*(here / f"{name}.py" for name in _READ_WITH), *(there / f"{name}.py" for name in _READ_WITH_TOO)]
    sums = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return [torch.__version__, transformers.__version__, *sums]
