"""Stopping: signals end a fit at the next wave of completions or optimiser step, with everything saved."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from cotune.callbacks.alternate import Alternate
from cotune.programs import BudgetSpentError
from lightning.pytorch import Callback, LightningModule, Trainer

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""The last one is what schedulers are asked to send before a job's time is over."""


class Stopped(BaseException):
    """A signal asked the process to end. Not an `Exception`: nobody is to take it for a failed rollout.

    Attributes:
        exit_code: 130 for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1, as shells count.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class OutOfTime(Stopped):
    """The time that the run was given is over."""

    def __init__(self) -> None:
        super().__init__(signal.SIGTERM)


class StopSignals:
    """Signal handlers, inside a `with`. The first signal waits for the end of a unit of work; a second one does not.

    Where nothing is under way that could be lost (`patient` is off) the first one ends the process at once as well.
    Time that is over is like a first signal.

    Args:
        first: this is the first of the run's processes. Another one leaves it to that one when to stop at once.

    Attributes:
        relay: passes a signal on to the processes that this one has started.
        max_seconds: that the run may take, from here on and in `seconds_before` together; None: as long as it takes.
        seconds_before: that earlier processes of the run have taken.
        late: says whether the minutes of the run's budget are over.
    """

    def __init__(self, max_seconds: float | None = None, *, first: bool = True) -> None:
        self.patient, self.first = False, first
        self.relay: Callable[[int], None] = lambda number: None
        self.requested: int | None = None
        self.max_seconds, self.seconds_before, self._began = max_seconds, 0.0, time.monotonic()
        self.late: Callable[[], BudgetSpentError | None] = lambda: None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other
            self._before = {number: signal.getsignal(number) for number in _SIGNALS}
            self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def install(self) -> None:
        """Puts the handlers in place, again where somebody has put in others meanwhile."""
        for number in self._before:
            signal.signal(number, self._handle)

    @property
    def wanted(self) -> bool:
        """Whether a signal has come, or time is over."""
        return self.requested is not None or self._out_of_time or self.late() is not None

    def check(self) -> None:
        """Raises Stopped if a signal has come or time is over, or BudgetSpentError. For between two units of work."""
        if self.requested is not None:
            raise Stopped(self.requested)
        if self._out_of_time:
            raise OutOfTime
        if error := self.late():
            raise error

    @property
    def _out_of_time(self) -> bool:
        taken = self.seconds_before + time.monotonic() - self._began
        return self.max_seconds is not None and taken >= self.max_seconds

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and not self.first:
            return
        if self.requested is not None:
            self.relay(signal.SIGKILL)
            # Whatever is under way, the files are as after a kill: whole.
            _say("stopped at once.")
            os._exit(128 + number)
        self.requested = number
        if number != signal.SIGINT:  # which a terminal sends to all
            self.relay(number)
        if not self.patient:
            raise Stopped(number)
        if self.first:
            _say("stopping after this batch; a second Ctrl-C or signal stops at once.")


class StopOnSignal(Callback):
    """Ends a fit, and the test after it, between two units of work once a signal has come.

    Args:
        signals: whose handlers are in place.
    """

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.lm.before_wave = pl_module.ledger.between = self.signals.check  # type: ignore[union-attr]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Alternate):
                callback.saver.stopping = self.signals
                self.signals.seconds_before = callback.work.seconds_before
        if (launcher := trainer.strategy.launcher) is not None:
            self.signals.relay = launcher.kill
        self.signals.late = pl_module.ledger.late  # type: ignore[union-attr, assignment]
        self.signals.patient = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning has wrapped the SIGTERM handler by now, and would end the loop before anything is saved.
        self.signals.install()


def _say(what: str) -> None:
    # No print: it may hold the very lock that the interrupted code holds.
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hides it
    os.write(2, f"{show_cursor}\ncotune: {what}\n".encode())
