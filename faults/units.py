"""Units of work: how many LM waves and optimiser steps a run began, counted in a file that survives a kill."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAVE, STEP = b"w", b"s"


def counting(path: Path) -> Callable[[], None]:
    """What a child calls to have its units counted: a byte appended as each begins."""

    def arm() -> None:
        from cotune.inference.local.decoder import Decoder
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        generate = Decoder.generate

        def counted(self: Any, prompts: Any, *rest: Any, **more: Any) -> Any:
            if len(prompts):
                os.write(file, WAVE)
            return generate(self, prompts, *rest, **more)

        Decoder.generate = counted  # type: ignore[method-assign]
        register_optimizer_step_pre_hook(lambda *_: os.write(file, STEP) and None)

    return arm


@dataclass(frozen=True)
class Units:
    """Units begun, or begun again."""

    waves: int
    steps: int

    def __sub__(self, other: Units) -> Units:
        return Units(self.waves - other.waves, self.steps - other.steps)

    @property
    def total(self) -> int:
        return self.waves + self.steps


def units(path: Path) -> Units:
    """Those begun so far, by all processes that counted there."""
    data = path.read_bytes() if path.exists() else b""
    return Units(data.count(WAVE), data.count(STEP))
