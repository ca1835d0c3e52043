"""Memory that ran out is known as such, however it is said, and is told in one line."""

from __future__ import annotations

import pytest
import torch
from cotune.inference.local.out_of_memory import is_out_of_memory

from cotune.fit.guard import guarded

SAID = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
    # as an H200 said it whose memory other processes held
    RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com\n"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", SAID, ids=lambda error: str(error)[:40])
def test_a_command_says_it_in_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        raise error

    assert is_out_of_memory(error)
    assert guarded(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cotune: error: memory ran out (")
    assert (str(error).splitlines() or ["MemoryError"])[0] in line


def test_another_error_keeps_its_traceback() -> None:
    def command() -> int:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(RuntimeError, match="device-side"):
        guarded(command)
