"""Saver: makes a run's checkpoints when its policy says so and Lightning's own state is there to be saved."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from cotune.callbacks.checkpoint import Checkpoints
from cotune.callbacks.save_policy import SavePolicy
from cotune.callbacks.setup_checks import ours
from cotune.programs.ranks import Ranks
from lightning.pytorch import Trainer


class Stopping(Protocol):
    """Who knows whether the process has been asked to end."""

    @property
    def wanted(self) -> bool:
        """Whether it has."""
        ...

    def check(self) -> None:
        """Raises if it has."""
        ...


class Saver:
    """Saves a run.

    Lightning restores loops and optimiser of a resumed run only after `on_fit_start`: what is saved earlier would lose
    them. What comes to be saved until then is saved once they are there; a kill before leads back to the checkpoint
    that the run was resumed from.

    Args:
        folder: of the checkpoints; null takes `checkpoints` in the trainer's default_root_dir.

    Attributes:
        stopping: asked after each optimiser step. If it wants the process to end, the state is saved, and the next step
            does not begin.
    """

    def __init__(self, policy: SavePolicy, folder: str | None) -> None:
        self.policy, self._folder = policy, folder
        self.stopping: Stopping | None = None
        self._checkpoints: Checkpoints | None = None
        self._waits = self._owed = self._ends = False
        self._scratch: TemporaryDirectory[str] | None = None

    def run_folder(self, trainer: Trainer) -> Path:
        """Where checkpoints and traces are; of a `fast_dev_run` a folder that goes with it."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._scratch = self._scratch or TemporaryDirectory(prefix="cotune-")
            return Path(self._scratch.name)
        return Path(self._folder or trainer.default_root_dir)

    def close(self) -> None:
        """Takes a `fast_dev_run`'s folder away."""
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def wait(self) -> None:
        """From now on Lightning's state is not there, until `restored`."""
        self._waits = True

    def restored(self, trainer: Trainer) -> None:
        """Lightning's state is there: what was to be saved meanwhile is saved now."""
        self._waits = False
        self.policy.began(trainer.global_step)
        if self._owed:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Saves, now or as soon as Lightning's state is there. `fast_dev_run` saves nothing.

        Raises:
            NotWrittenError: the disk is full, read-only or broken; the checkpoints that were there still are.
        """
        self._owed = self._waits
        if self._waits or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        started = time.perf_counter()
        if self._checkpoints is None:
            self._checkpoints = Checkpoints(self.run_folder(trainer) / "checkpoints")
        self._checkpoints.save(trainer, _ranks(trainer))
        self.policy.saved(trainer.global_step, time.perf_counter() - started)

    def step_ended(self, trainer: Trainer) -> None:
        """Saves if so many steps, or so much time, have passed, or the process is to end."""
        due, self._ends = self._agreed(trainer, due=self.policy.due(trainer.global_step))
        if due or self._ends:
            self.save(trainer)

    def step_begins(self, trainer: Trainer) -> None:
        """Raises if the process was to end at the step before: Lightning logs a step only after its `step_ended`."""
        if self._ends:
            _ranks(trainer).together(self._check)

    def epoch_ended(self, trainer: Trainer, *, stored: bool) -> None:
        """Saves as `save_unless_too_soon`; saves and raises if the process is to end."""
        if self._agreed(trainer)[1]:
            self.save(trainer)
            _ranks(trainer).together(self._check)
        self.save_unless_too_soon(trainer, stored=stored)

    def save_unless_too_soon(self, trainer: Trainer, *, stored: bool) -> None:
        """Saves where a search, a collection or a score has ended; see `SavePolicy.due_at_boundary`."""
        if _ranks(trainer).gather(self.policy.due_at_boundary(trainer.global_step, stored=stored))[0]:
            self.save(trainer)

    def _agreed(self, trainer: Trainer, *, due: bool = False) -> tuple[bool, bool]:
        """Whether to save, by the first process's clock; and whether any process is to end, and so all are."""
        said = _ranks(trainer).gather((due, self.stopping is not None and self.stopping.wanted))
        return bool(said[0][0]), any(wanted for _, wanted in said)

    def _check(self) -> None:
        if self.stopping is not None:
            self.stopping.check()


def _ranks(trainer: Trainer) -> Ranks:
    return ours(trainer)[0].ranks
