"""What Lightning does not promise and is used all the same: private methods that others are put in the place of,
and how it computes.

All of it stands here. tests/test_internals.py says from which version it was read, and fails if it goes.
"""

from __future__ import annotations

from abc import abstractmethod

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers.csv_logs import ExperimentWriter


def give_all_rows(trainer: Trainer) -> None:
    """Has every process read all rows: which of them are its own to run is decided later, and no row is run twice."""
    trainer._accelerator_connector.use_distributed_sampler = False


class PlainCLI(LightningCLI):
    """A command line that takes no option from a checkpoint, and can be told how to seed."""

    def set_seed(self) -> None:
        """Seeds the process by `seed_everything`, before anything is made."""
        super()._set_seed()

    def _set_seed(self) -> None:
        self.set_seed()

    def _parse_ckpt_path(self) -> None:
        # Lightning would let values saved in the checkpoint override those on the command line, without a word.
        pass


class DescribedBar(RichProgressBar):
    """A bar that says what is under way in words of its own, and is gone when it is over."""

    @abstractmethod
    def description(self) -> str:
        """Of the epoch under way, in rich's markup."""

    def _get_train_description(self, current_epoch: int) -> str:
        return self.description()

    def _stop_progress(self) -> None:
        if self.progress is not None:
            self.progress.live.transient = True
        super()._stop_progress()


class WholeWriter(ExperimentWriter):
    """A writer of metrics.csv that can be told how to begin and how to widen the file."""

    @abstractmethod
    def begin(self) -> None:
        """Called when the writer is made. The base class deletes the file, with a warning."""

    @abstractmethod
    def rewrite(self, names: list[str]) -> None:
        """Writes the rows anew under more columns. The base class empties the file first: a kill would lose them."""

    def _check_log_dir_exists(self) -> None:
        self.begin()

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self.rewrite(fieldnames)


class Share(float):
    """A share of an epoch's batches, of which Lightning takes one at least, and all of those that it cannot count.

    It computes `int(batches * share)`, stops the fit where that is 0, and takes a loader without a length only with a
    share that is 1: the one that a fit has when all of its training is over.
    """

    def __rmul__(self, batches: float) -> float:
        return max(batches * float(self), 1.0)

    def __eq__(self, other: object) -> bool:
        return other == 1.0 or float(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = float.__hash__
