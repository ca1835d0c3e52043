"""Completions from vLLM servers: one or a pool, with the adapter that is trained, which every server has to prove."""

from cotune.inference.vllm.engine import VLLMServer
from cotune.inference.vllm.server import VLLMError

__all__ = ["VLLMError", "VLLMServer"]
