"""Inference: token ids in, token ids out, each completion filling in its layout."""

from cotune.inference.codec import Codec, canonical_share
from cotune.inference.engine import Engine, Generated, Prompted, Weights
from cotune.inference.fields import Filling, Plan
from cotune.inference.grammars import GrammarError

__all__ = [
    "Codec",
    "Engine",
    "Filling",
    "Generated",
    "GrammarError",
    "Plan",
    "Prompted",
    "Weights",
    "canonical_share",
]
