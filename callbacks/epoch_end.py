"""EpochEnd: the end of a training epoch, after all that other callbacks do there."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint


class EpochEnd(Checkpoint):
    """Calls a function when every other callback has had its say about an epoch, EarlyStopping included.

    Lightning calls callbacks of this class after all others, in their order; so it is to be the last of them.
    """

    def __init__(self, then: Callable[[Trainer], None]) -> None:
        self._then = then

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._then(trainer)
