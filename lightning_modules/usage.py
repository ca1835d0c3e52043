"""Usage: what an LM has been asked, however it was answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Usage:
    """What an LM has been asked so far.

    Calls and tokens are what was asked for, generated or not; `cached` is how many of the calls were answered from the
    completion store, or from an equal call beside them; `seconds` is wall time.
    """

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    too_long: int = 0
    cached: int = 0
    seconds: float = 0.0

    def since(self, earlier: Mapping[str, float]) -> dict[str, Any]:
        return {name: value - earlier[name] for name, value in asdict(self).items()}
