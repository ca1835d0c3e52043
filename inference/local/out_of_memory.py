"""Memory that ran out: how PyTorch says so."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch says that memory ran out: CUDA has a class for it, the CPU only words."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    message = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in message for word in words)
    )
