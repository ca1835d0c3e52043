"""Inference: token ids in, token ids out, each completion filling in its layout."""

from cotune.inference.codec import Codec, canonical_share
from cotune.inference.fields import Filling, Plan
from cotune.inference.grammars import GrammarError

__all__ = ["Codec", "Filling", "GrammarError", "Plan", "canonical_share"]
