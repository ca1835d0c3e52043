"""Processes: whether this one was started alone, by Lightning beside others, by srun or by torchrun; and its place."""

from __future__ import annotations

import os

from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch import Trainer


def environment() -> ClusterEnvironment:
    """Who has started the processes of this run: srun where it has started several, torchrun, or else Lightning will.

    What a scheduler's variables say in an interactive shell, or in a batch script around this command, is no matter.
    """
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    # Requeueing is the batch script's: the run has been saved, and says by its exit code that it is to go on.
    return SLURMEnvironment(auto_requeue=False) if by_srun() else LightningEnvironment()


def by_srun() -> bool:
    """Whether srun has started this command several times."""
    return "SLURM_STEP_ID" in os.environ and _number("SLURM_STEP_NUM_TASKS", 1) > 1


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
        trainer.strategy.launcher.launch(trainer.strategy.setup_environment)  # type: ignore[union-attr]


def end_others(trainer: Trainer, *, seconds: float = 10.0) -> None:
    """Waits for the processes that this one has started, and kills those that do not end: they would wait forever."""
    launcher = trainer.strategy.launcher
    for process in getattr(launcher, "procs", ()):
        try:
            process.wait(seconds)
        except Exception:
            process.kill()


def _number(name: str, default: int = 0) -> int:
    return int(os.environ.get(name) or default)
