"""The command `cotune`: answers --help at once, and imports the heavy libraries only to do something."""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence

from cotune.errors import CotuneError, reported
from cotune.fit.help_page import first_screen
from cotune.fit.parse_errors import LIGHTNINGS, OWN_COMMANDS, unknown_command

_HELP = """\
usage: cotune COMMAND [options]

Tunes the prompts and the weights of multi-stage LM programs, by turns.

before a run
  doctor     what this machine can do, what to set   cotune doctor
  new        a task to start from: program, data     cotune new my-task
  configs    what comes with cotune, by name         cotune configs
the run
  fit        a schedule of prompt and weight steps   cotune fit --config iris
  validate   score the program on val                (with --ckpt_path last: a run's program)
  test       score the program on test
  table      many runs as one table with error bars  cotune table --config iris
what came of it
  report     the run as one HTML page                cotune report runs/iris
  compare    runs side by side                       cotune compare runs/iris runs/iris-2
  preview    training pairs as they are trained on   cotune preview runs/iris
  ask        one question, shown stage by stage      cotune ask --export runs/iris (or --config iris: as it comes)
  predict    answer the rows of a file or of stdin   cotune predict --export runs/iris --data rows.csv
  serve      answers over HTTP, on vLLM or here      cotune serve runs/iris
  export     adapter, merged weights, model card     cotune export runs/iris --what all

cotune COMMAND --help lists a command's options; fit --print_config prints a config to start from.
Exit codes: 0 done, 1 no row answered or something broken (predict, ask, doctor) or an error nobody foresaw, with its
traceback, 2 an error that the message explains, 3 no traces to train on, 4 the budget is spent (fit has written the
best so far); a stopped fit ends with 130 (Ctrl-C), 143 (SIGTERM, trainer.max_time) or 138 (SIGUSR1), and the same
command resumes it. COTUNE_DEBUG=1 shows the traceback of a message.
"""


_VARIABLES = ("COTUNE_CACHE", "COTUNE_DEBUG", "COTUNE_SMOLLM2_WHEEL")
_LIGHT = ("configs", "doctor", "new")
_OF_TESTS = ("COTUNE_DATA", "COTUNE_VLLM")


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code: 0, 1 when `predict` could answer no row, 2 for an error that the user
    can mend, 3 for a lack of traces, 4 for a spent budget, 130 when stopped by Ctrl-C."""
    try:
        return _run(list(sys.argv[1:] if args is None else args))
    except KeyboardInterrupt:  # during the heavy imports: what stands around a command is not there yet
        print("\ncotune: stopped.", file=sys.stderr)
        return 130


def _run(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if words[0] == "--version":
        from cotune.versions import version_line

        print(version_line())
        return 0
    if words[0] in LIGHTNINGS and {"-h", "--help"} & set(words):
        print(first_screen(words[0]), end="")
        return 0
    if unread := sorted({name for name in os.environ if name.startswith("COTUNE_")} - {*_VARIABLES, *_OF_TESTS}):
        print(
            f"cotune: {', '.join(unread)}: cotune reads no such environment variable, only "
            f"{', '.join(_VARIABLES)}. Put options into YAML files or on the command line.",
            file=sys.stderr,
        )
    if words[0] not in (*LIGHTNINGS, *OWN_COMMANDS):
        return reported(CotuneError(unknown_command(words[0])))
    _share_cores()
    _keep_freed_memory()
    # It warns at import, which is too early for the other loggers' settings, of a kernel that cotune does not use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if words[0] in OWN_COMMANDS:
        return _run_small(words[0], words[1:])
    from cotune.fit.cli import run

    return run(words)


def _share_cores() -> None:
    """Lets OpenMP's threads sleep soon when they wait, which torch's copy of it reads when it is first imported.

    By default they spin, and beside a busy neighbour on the same cores a step takes ten to twenty times as long
    (docs/design-notes.md). What the user has set stands.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # as glibc's malloc.h has them

_KEPT = 1 << 30
"""Most freed bytes at the end of the heap that stay with the process."""

_ANEW = 1 << 28
"""Bytes from which a tensor gets memory of its own, given back when it is freed."""


def _keep_freed_memory() -> None:
    """Lets glibc keep freed memory for the next tensor; other C libraries are left alone.

    By default tensors of some megabytes are given back when they are freed, and the next ones are made of new pages.
    The kernel fills those with zeros, which takes several times as long as an elementwise operation on them
    (docs/design-notes.md). What the user has set, or another allocator in its place, stands.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)
        libc.mallopt(_M_MMAP_THRESHOLD, _ANEW)


def _run_small(name: str, words: Sequence[str]) -> int:
    """A command with a parser of its own: --help and typos are answered before the heavy imports."""
    command = importlib.import_module(f"cotune.commands.{name}")
    # Most commands know all their options; `ask` takes the inputs of the program too.
    options = command.parse(words) if hasattr(command, "parse") else command.parser().parse_args(words)
    if name in _LIGHT:  # they answer at once, and doctor where the imports of the others fail
        try:
            code = int(command.main(options))
            sys.stdout.flush()
            return code
        except CotuneError as error:
            return reported(error)
        except BrokenPipeError:  # whoever read it, `head` say, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
            return 128 + signal.SIGPIPE
    from cotune.fit.guard import guarded

    return guarded(lambda: command.main(options))


if __name__ == "__main__":
    sys.exit(main())
