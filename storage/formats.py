"""Format numbers: every kind of file that a run leaves says how it is written, so that none is misread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cotune.errors import CotuneError


class FormatError(CotuneError, ValueError):
    """A file is of a format that this version of cotune does not read."""


def check_format(where: str | Path, found: Any, known: int, *, oldest: int = 1, fix: str) -> None:
    """Refuses a file of a format that is not known.

    Args:
        where: the file or folder.
        found: its number.
        oldest, known: the formats from and up to which this version reads.
        fix: what to do, as a sentence.

    Raises:
        FormatError: in one line.
    """
    if found not in range(oldest, known + 1):
        reads = f"{known}" if oldest == known else f"{oldest} to {known}"
        raise FormatError(f'"{where}" has format {found}, and this version of cotune reads {reads}. {fix}')
