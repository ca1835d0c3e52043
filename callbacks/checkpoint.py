"""Checkpoints that are whole or absent: written beside the old one, flushed to disk, then put in its place."""

from __future__ import annotations

import os
from pathlib import Path

from lightning.pytorch import Trainer


def save_checkpoint(trainer: Trainer, path: Path) -> None:
    """Saves the trainer's state at `path`; a kill at any moment leaves the old file or the new one.

    The temporary file stands in the same folder (Lightning's own stands in $TMPDIR, and is copied), and both file and
    folder are flushed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    trainer.save_checkpoint(partial, weights_only=False)
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
