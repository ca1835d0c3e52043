"""What vLLM takes of an adapter_config.json, and how it has to be started for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# vLLM takes these values of --max-lora-rank; its default is 16.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def vllm_refusals(adapter: Mapping[str, Any]) -> list[str]:
    """Why vLLM would refuse an adapter_config.json; [] where it takes it (as of vLLM 0.32)."""
    rank = _highest_rank(adapter)
    found = {
        "it is a DoRA": adapter.get("use_dora"),
        f"it trains whole modules ({', '.join(adapter.get('modules_to_save') or [])})": adapter.get("modules_to_save"),
        "it trains biases": adapter.get("bias", "none") != "none",
        f"its rank {rank} is above {_RANKS[-1]}": rank > _RANKS[-1],
    }
    return [why for why, true in found.items() if true]


def max_lora_rank(adapter: Mapping[str, Any]) -> int:
    """The --max-lora-rank of a server that takes it."""
    return next(rank for rank in _RANKS if rank >= _highest_rank(adapter))


def _highest_rank(adapter: Mapping[str, Any]) -> int:
    ranks: list[int] = [adapter.get("r", 0), *(adapter.get("rank_pattern") or {}).values()]
    return max(ranks)
