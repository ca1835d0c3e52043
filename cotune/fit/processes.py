"""Processes: whether this one was started alone, by Lightning beside others, by srun or by torchrun; and its place."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from typing import Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Trainer

from cotune.fit.option_errors import OptionError

_PR_SET_PDEATHSIG = 1  # as Linux's prctl.h has it
_FIRST = "_COTUNE_FIRST_PROCESS"
"""Variable by which the first process tells those that it starts its number."""


def environment() -> ClusterEnvironment:
    """Who has started the processes of this run: srun where it has started several, torchrun, or else Lightning will.

    What a scheduler's variables say in an interactive shell, or in a batch script around this command, is no matter.

    Raises:
        OptionError: srun was asked for them in a way that Lightning cannot count them by.
    """
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if not by_srun():
        return LightningEnvironment()
    try:
        # Requeueing is the batch script's: the run has been saved, and says by its exit code that it is to go on.
        return SLURMEnvironment(auto_requeue=False)
    except RuntimeError as error:
        raise OptionError(str(error)) from error


def by_srun() -> bool:
    """Whether srun has started this command several times."""
    return "SLURM_STEP_ID" in os.environ and _number("SLURM_STEP_NUM_TASKS", 1) > 1


def check_started(devices: Any, nodes: Any) -> None:
    """Refuses a run of one process that srun or torchrun has started several times.

    Raises:
        OptionError
    """
    one = str(devices) == str(nodes) == "1"
    if TorchElasticEnvironment.detect():
        by, times, stray = "torchrun", os.environ.get("WORLD_SIZE", ""), one and _number("WORLD_SIZE", 1) > 1
    else:
        by, times = "srun", os.environ.get("SLURM_NTASKS", "several")
        stray = _number("SLURM_PROCID") > 0 and (one or not by_srun())
    if stray:
        raise OptionError(
            f"{by} has started this command {times} times, but this run has one process. Set --trainer.devices to the "
            f"number that {by} starts on each machine (docs/scaling.md), or let it start only one."
        )


def is_first() -> bool:
    """Whether this is the process that writes the run's files and speaks."""
    if TorchElasticEnvironment.detect():
        return _number("RANK") == 0
    if by_srun():
        return _number("SLURM_PROCID") == 0
    return _number("NODE_RANK") == _number("LOCAL_RANK") == 0


def start_all(trainer: Trainer) -> None:
    """Starts the other processes, where they are still to be started, and joins them."""
    if trainer.world_size > 1:
        os.environ[_FIRST] = str(os.getpid())
        trainer.strategy.launcher.launch(trainer.strategy.setup_environment)  # type: ignore[union-attr]


def end_others(trainer: Trainer, *, seconds: float) -> None:
    """Waits so long for the processes that this one has started, and kills those that do not end: they wait for it."""
    started = getattr(trainer.strategy.launcher, "procs", [])
    left = list(started)
    started.clear()  # Lightning watches them, and would kill this process where one of them ends badly
    for process in left:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()


def end_with_first() -> None:
    """Has the system end this process when the one that started it is gone: it may be waiting for it just then."""
    if sys.platform == "linux" and isinstance(environment(), LightningEnvironment) and _number("LOCAL_RANK"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        # It may have gone before: this process has spent seconds on its imports.
        if os.getppid() != _number(_FIRST, os.getppid()):
            os.kill(os.getpid(), signal.SIGKILL)


def _number(name: str, default: int = 0) -> int:
    return int(os.environ.get(name) or default)
