"""Errors that a user can mend: the message names the value, what is allowed and the fix."""

from __future__ import annotations

import os
import sys


class CotuneError(Exception):
    """What all errors of cotune's derive from that are about what the user gave: options, data, files, a machine.

    The command line shows the message alone.

    Those that are also an error of Python's are caught as that, too.

    Attributes:
        exit_code: of a command that ends with it.
    """

    exit_code = 2


class BadValueError(CotuneError, ValueError):
    """An argument or a file has a value that is not allowed."""


class WrongTypeError(CotuneError, TypeError):
    """Something is of another kind than what is needed there."""


class MissingFileError(CotuneError, FileNotFoundError):
    """A file or folder is not there."""


class MissingPackageError(CotuneError, ImportError):
    """A library is not installed; the message has the command that installs it."""


def reported(error: CotuneError) -> int:
    """Prints the message in one line, for a command that ends with it; with COTUNE_DEBUG set, raises it instead.

    Returns:
        The exit code.
    """
    if os.environ.get("COTUNE_DEBUG"):
        raise error
    print(f"cotune: error: {' '.join(str(error).split())}", file=sys.stderr)
    return error.exit_code
