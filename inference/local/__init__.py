"""The engine in this process: prompts decoded together, what they share computed once."""

from cotune.inference.local.decoder import GenerationMemoryError
from cotune.inference.local.engine import LocalEngine

__all__ = ["GenerationMemoryError", "LocalEngine"]
