"""Memory that ran out: how PyTorch says so, and what a user is told."""

from __future__ import annotations

import torch
from cotune.errors import CotuneError

_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "status_alloc_failed")
"""Of the CPU, of CUDA, and of its libraries (cuBLAS, cuDNN), which find none left for themselves."""


class MemoryRanOutError(CotuneError, MemoryError):
    """Memory ran out where less of it at a time was no way out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch says that memory ran out: CUDA has a class for most of it, all else only words."""
    message = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in message for word in _WORDS)
    )


def memory_error(error: BaseException) -> MemoryRanOutError:
    """What to tell the user of an error for which `is_out_of_memory` holds."""
    said = str(error).strip().partition("\n")[0] or type(error).__name__
    return MemoryRanOutError(
        f"memory ran out ({said}). Does another process hold the device's memory (nvidia-smi shows it)? Otherwise use "
        "--model.lm.dtype bfloat16, --model.lm.quantization nf4, --model.gradient_checkpointing true, or a smaller "
        "model. The same cotune fit resumes from its last checkpoint."
    )
