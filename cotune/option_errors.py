"""Options that parse and still cannot be: what a constructor says of them, as one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException


class OptionError(ValueError):
    """An option has a value that its owner refuses."""


@contextmanager
def refused_options() -> Iterator[None]:
    """What the trainer, the seed, jsonargparse or a class of the user's raise about options, as an OptionError.

    Their classes and arguments come from the command line, so what they raise while they are made is about that. Where
    the class is the user's own, COTUNE_DEBUG=1 shows the line.
    """
    try:
        yield
    except (MisconfigurationException, ValueError, TypeError) as error:
        if type(error).__module__.startswith("cotune."):
            raise
        raise OptionError(said(error)) from error


def said(error: Exception) -> str:
    """The heart of such an error.

    >>> said(ValueError("Does not validate against any of the Union subtypes\\nErrors:\\n  - epochs 0 is below 1"))
    'epochs 0 is below 1'
    """
    text = str(error)
    if missing := _missing_package(error):
        return missing
    if "Union subtypes" in text:  # of the types that were tried, the one that was meant said something else
        reasons = [reason for reason in re.findall(r"(?m)^\s*- (.*)$", text) if not reason.startswith("Expected a")]
        text = reasons[0] if reasons else text
    if isinstance(error, TypeError):
        text = f"TypeError: {text} (COTUNE_DEBUG=1 shows where)"
    return " ".join(text.split())


def _missing_package(error: BaseException | None) -> str:
    """The first line of what a class said of a package that it needs; "" if it is not about that."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError):
            return str(error).splitlines()[0]
        error = error.__cause__
    return ""
