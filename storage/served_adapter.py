"""What vLLM takes of an adapter_config.json, how it has to be started for it, and what adapters are called there."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from typing import Any

HOW_TO_INSTALL = "python3 -m venv ~/vllm && ~/vllm/bin/pip install vllm"
"""vLLM's environment; one of its own, since it asks for another transformers than cotune."""

_PREFIX = "cotune-"

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


def served_name(digest: str) -> str:
    """What an adapter is called at servers: by what it is, and whose it is, so that what a process leaves is known."""
    return f"{_PREFIX}{digest[:16]}-{os.getpid()}-{_host()}"


def left_behind(name: str) -> bool:
    """Whether a name at a server, or of a folder, is that of an adapter whose process, on this machine, has ended."""
    found = re.fullmatch(rf"{_PREFIX}\w+-(\d+)-{re.escape(_host())}", name)
    if found is None:
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's
        pass
    return False


def _host() -> str:
    return re.sub(r"\W+", "-", platform.node())[:40] or "here"


def _highest_rank(adapter: Mapping[str, Any]) -> int:
    ranks: list[int] = [adapter.get("r", 0), *(adapter.get("rank_pattern") or {}).values()]
    return max(ranks)
