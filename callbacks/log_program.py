"""LogProgram: prompts, scores and rollouts in whatever loggers the trainer has."""

from __future__ import annotations

from cotune.callbacks.boundary import Boundary, BoundaryListener
from lightning.pytorch import Callback, LightningModule, Trainer


class LogProgram(Callback, BoundaryListener):
    """Logs each boundary."""

    def on_boundary(self, trainer: Trainer, module: LightningModule, boundary: Boundary) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({"boundary/val_score": boundary.val_score}, step=trainer.global_step)
