"""What stands around every command: libraries kept quiet, the user's modules found, errors and stops in one line."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable

from cotune.callbacks.stop_signals import OutOfTime, Stopped
from cotune.errors import CotuneError, reported
from cotune.inference.local.out_of_memory import is_out_of_memory, memory_error
from cotune.programs.ranks import RankLostError


def guarded(command: Callable[[], int], *, first: bool = True) -> int:
    """Runs a command. Errors that the user can mend end with one message and their exit code.

    Set COTUNE_DEBUG=1 for the traceback of such an error as well.

    Args:
        first: of the processes of a run, the one that speaks. Others speak of errors that are theirs alone.
    """
    quiet()
    _find_own_modules()
    if first:
        return _guarded(command)
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (to the end of the process)
    try:
        return command()
    except BaseException as error:
        if getattr(error, "in_all_ranks", False) or isinstance(error, Stopped | RankLostError):
            return 0 if not isinstance(error, RankLostError) else 1
        print(f"cotune: process {os.getpid()}, one of several of this run:", file=sys.stderr)
        return _guarded(functools.partial(_raise, error))


def _raise(error: BaseException) -> int:
    raise error


def _guarded(command: Callable[[], int]) -> int:
    try:
        return command()
    except OutOfTime as stopped:
        print(
            "\ncotune: stopped: trainer.max_time is over, earlier starts of this run included. The same command "
            "with more time resumes from here.",
            file=sys.stderr,
        )
        return stopped.exit_code
    except Stopped as stopped:
        print("\ncotune: stopped. The same command resumes from here.", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("\ncotune: stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except CotuneError as error:
        return reported(error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return reported(memory_error(error))


def _find_own_modules() -> None:
    """Makes the user's modules in the working folder importable, behind all that is installed."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _retries_said_once() -> Callable[[logging.LogRecord], bool]:
    """A filter of the Hub client's log, which has two lines for each of six attempts to reach the Hub."""
    said: list[str] = []

    def passes(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if not said and "Retrying in" in text:
            said.append(text)
            record.msg, record.args = "cotune: the Hub does not answer; trying for about half a minute", ()
            return True
        return "Retrying in" not in text and "thrown while requesting" not in text

    return passes


def quiet() -> None:
    """Silences what libraries say that a user can do nothing about."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for name in ("seed", "distributed"):
        logging.getLogger(f"lightning.fabric.utilities.{name}").setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub.utils._http").addFilter(_retries_said_once())
    for pattern in (
        ".*does not have many workers.*",
        ".*`srun` command is available on your system but is not used.*",  # a run may well be one process there
        ".*sync_dist=True.*",  # scores are of all processes' rollouts already
        ".*`is_gradient_checkpointing` is deprecated.*",
        ".*isinstance.*LeafSpec.*",
        ".*You have overridden `transfer_batch_to_device`.*",
        ".*args parameter is intended to run from within Python.*",
    ):
        warnings.filterwarnings("ignore", message=pattern)
