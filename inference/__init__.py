"""Inference: completions, from token ids in this process or from endpoints, and the stores that keep them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cotune.inference.calls import StoredLM
from cotune.inference.endpoint import EndpointError
from cotune.inference.openai import OpenAILM

if TYPE_CHECKING:
    from cotune.inference.codec import Codec, canonical_share
    from cotune.inference.engine import Engine, Generated, Prompted, Weights
    from cotune.inference.fields import Filling, Plan
    from cotune.inference.grammars import GrammarError

__all__ = [
    "Codec",
    "EndpointError",
    "Engine",
    "Filling",
    "Generated",
    "GrammarError",
    "OpenAILM",
    "Plan",
    "Prompted",
    "StoredLM",
    "Weights",
    "canonical_share",
]

_HOMES = {
    "codec": ("Codec", "canonical_share"),
    "engine": ("Engine", "Generated", "Prompted", "Weights"),
    "fields": ("Filling", "Plan"),
    "grammars": ("GrammarError",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    # On first use, so that an endpoint does not wait for torch.
    if name not in _HOME:
        raise AttributeError(f"module 'cotune.inference' has no attribute {name!r}")
    return getattr(importlib.import_module(f"cotune.inference.{_HOME[name]}"), name)
