"""Checkpoints that are whole or absent: the two newest of a run, known by their SHA-256 and checked before use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from cotune.errors import CotuneError, MissingFileError
from cotune.programs.ranks import Ranks
from cotune.storage.durable import (
    as_not_written,
    clock,
    file_sum,
    find_whole,
    put_in_place,
    read_sums,
    record_sums,
    write_beside,
)
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer

LAST, PREVIOUS, COMING = "last.ckpt", "previous.ckpt", "last.ckpt.partial"

_MARK = "cotune"
"""Key in a checkpoint of those that `Checkpoints` has saved."""


class CheckpointError(CotuneError):
    """A checkpoint is not as it was written, is none, or is not one that a fit can be continued from."""


class Checkpoints:
    """`last.ckpt` and `previous.ckpt` in a folder.

    A new one is written beside them and flushed, and `SHA256SUMS` lists it; then the last becomes the previous, and the
    new one the last. Wherever that is cut short, the newest that is listed is there under one of the names.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._last_is_whole: bool | None = None  # nobody has looked yet

    def save(self, trainer: Trainer, ranks: Ranks = Ranks()) -> None:  # noqa: B008 (without state)
        """Saves the trainer's state, which all processes have alike: the first one writes it.

        Raises:
            NotWrittenError: the disk is full, read-only or broken; the checkpoints that were there still are.
        """
        with clock.running():
            writer = _write(trainer, self.folder / COMING)
            ranks.once(lambda: self._put_in_place(writer))

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint, if there is any at all; and what is wrong with a newer one.

        Raises:
            CheckpointError: there are some, and none is whole.
        """
        known = read_sums(self.folder)
        wrong: list[str] = []
        for path in (self.folder / COMING, self.folder / LAST, self.folder / PREVIOUS):
            if not path.is_file():
                continue
            # Until the three have their places, a listed one may stand under another's name.
            if file_sum(path) in ({known.get(LAST)} if path.name == COMING else set(known.values())):
                return path, wrong
            if path.name != COMING:
                wrong.append(f"{path} is not what was written (its SHA-256 is not in {self.folder / 'SHA256SUMS'})")
        if wrong:
            raise CheckpointError(
                f"no checkpoint is intact: {'; '.join(wrong)}. Start over with --fresh, which archives this run; "
                "stored completions are not generated again."
            )
        return None, []

    def _put_in_place(self, writer: _DurableIO) -> None:
        last = self.folder / LAST
        with as_not_written(last):
            if writer.error is not None:
                raise writer.error
            known = read_sums(self.folder)
            if self._last_is_whole is None:
                self._last_is_whole = last.is_file() and file_sum(last) == known.get(LAST)
            record_sums(self.folder, {LAST: writer.digest, **({PREVIOUS: known[LAST]} if self._last_is_whole else {})})
            if self._last_is_whole:
                os.replace(last, self.folder / PREVIOUS)
            put_in_place(self.folder / COMING, last)
            self._last_is_whole = True


def _write(trainer: Trainer, path: Path) -> _DurableIO:
    """Has the trainer write its state to this very file; returns what has written it.

    Lightning's own writer stages the file in $TMPDIR and copies it, unflushed.
    """
    writer = _DurableIO()
    own, trainer.strategy.checkpoint_io = trainer.strategy.checkpoint_io, writer
    try:
        trainer.save_checkpoint(path, weights_only=False)
    finally:
        trainer.strategy.checkpoint_io = own
    return writer


class _DurableIO(TorchCheckpointIO):
    """What has been written, by its SHA-256; or why it could not be, for other processes wait for this one's end."""

    digest = ""
    error: Exception | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        try:
            marked = {**checkpoint, _MARK: True}
            _, self.digest = write_beside(Path(path).with_suffix(""), lambda file: torch.save(marked, file))
        except Exception as error:
            self.error = error


def whole_checkpoint(checkpoint: str) -> Path:
    """Where a checkpoint is, if it is as its folder's SHA256SUMS says; one of a folder without is taken as it is.

    Raises:
        MissingFileError: it is not there.
        CheckpointError: it is not what was written, or no checkpoint of cotune.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise MissingFileError(
            f"--ckpt_path {checkpoint}: there is no such file. Give the path of a checkpoint, or --ckpt_path last for "
            "the newest of the run that --name says."
        )
    if (path.parent / "SHA256SUMS").is_file() and not path.name.endswith(".partial"):
        whole, why = find_whole(path)
        if whole is None and file_sum(path) not in read_sums(path.parent).values():
            raise CheckpointError(f"{path} {why}.")
    if not _is_checkpoint(path):
        raise CheckpointError(
            f"--ckpt_path {checkpoint}: this file is no checkpoint of cotune. Give one that a run or its "
            "ModelCheckpoint wrote, or --ckpt_path last for the newest of the run that --name says."
        )
    return path


def _is_checkpoint(path: Path) -> bool:
    """Whether a file holds what is needed of a checkpoint; its tensors are not read."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # there is no end to what torch and pickle raise about other files
        return False
    return isinstance(saved, Mapping) and {"state_dict", "prompts"} <= saved.keys()


def check_own(checkpoint: Mapping[str, Any], path: str) -> None:
    """Refuses to continue a fit from a checkpoint that others than `Checkpoints` saved.

    ModelCheckpoint saves before the schedule has counted the epoch that has ended: it would be trained once more. Older
    versions of cotune left no mark, but listed what they saved.

    Args:
        checkpoint: as loaded from the file at `path`.

    Raises:
        CheckpointError: others saved it.
    """
    file = Path(path)
    if _MARK in checkpoint or (file.is_file() and file_sum(file) in read_sums(file.parent).values()):
        return
    raise CheckpointError(
        f"{path} is not one of the run's own checkpoints, which alone a fit can be continued from: continue from "
        "<run>/checkpoints (on the command line without --ckpt_path). ModelCheckpoint's files are for cotune test."
    )
