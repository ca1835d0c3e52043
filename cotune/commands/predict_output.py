"""The output of cotune predict: lines beside their file until all are there, and an endpoint's answers as they come."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, NoReturn

from cotune.errors import CotuneError

if TYPE_CHECKING:  # the command line is parsed before anything heavy is imported
    from cotune.inference.calls import StoredLM
    from cotune.programs import Example, Rollout
    from cotune.tuned import Tuned


class OutputError(CotuneError, ValueError):
    """--output is no file that can be written. The message says why, and what to give."""


class StoppedError(CotuneError):
    """The LM cannot be asked any more. The message is the LM's."""


def check_output(output: str, data: str) -> None:
    """Refuses what cannot be written to, before anything is loaded.

    Args:
        output, data: the options.

    Raises:
        OutputError: it is a folder, the file of the rows, or in a place that cannot be written.
    """
    path, rows = Path(output), Path(data).expanduser()
    try:
        if path.is_dir() or output.endswith(("/", os.sep)):
            raise OutputError(f'--output "{output}" is a folder; give a file, e.g. "{path / "answers.jsonl"}".')
        if rows.exists() and any(one.exists() and one.samefile(rows) for one in (path, _beside(path))):
            raise OutputError(f'--output "{output}" is the file of --data, whose rows it would replace; give another.')
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            path.open("ab").close()
        if not path.exists() or path.is_file():
            partial = _beside(path)
            there = partial.exists()
            partial.open("ab").close()
            if not there:
                partial.unlink()
    except OSError as error:
        why = os.strerror(errno.ENOTDIR) if isinstance(error, FileExistsError) else error.strerror
        raise OutputError(
            f'--output "{output}" cannot be written: {why}. Give a file in a folder that you can write to.'
        ) from error


class Lines:
    """Writes lines to standard output, or beside the file, whose place they take at the end of the `with`.

    Where that is left by an error they stay beside it, and standard error says where. A device or a pipe is written to
    as it is.

    Args:
        output: the file; None for standard output, as it is now.

    Attributes:
        store: where an endpoint's answers are to be kept until the end; None for nowhere.
        resumes: whether they are.
    """

    def __init__(self, output: str | None) -> None:
        given = Path(output) if output is not None else None
        self._whole = given if given and (given.is_file() or not given.exists()) else None
        self._to = _beside(self._whole) if self._whole else given
        self.store = self._to.with_name(self._to.name + ".sqlite") if self._whole and self._to else None
        self.resumes = False
        self._file: IO[str] | None = None
        self._stdout = sys.stdout
        self._count = 0

    def __enter__(self) -> Lines:
        return self

    def write(self, line: str) -> None:
        """Adds a line. Raises NotWrittenError where the disk is full or broken."""
        from cotune.storage.durable import as_not_written

        self._count += 1
        if self._to is None:
            print(line, file=self._stdout)
            return
        with as_not_written(self._whole or self._to):
            if self._file is None:  # not before: what an earlier start has left there is worth more than nothing
                self._file = self._to.open("w", encoding="utf-8")
            self._file.write(line + "\n")

    def flush(self) -> None:
        """Shows what was written so far to whoever reads along."""
        (self._file or self._stdout).flush()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        from cotune.storage.durable import as_not_written, put_in_place

        if self._file is None or self._to is None:
            if kind is not None and self.resumes:
                print(
                    "cotune: what was answered is kept, and the same command asks only for the rest.", file=sys.stderr
                )
            return
        with as_not_written(self._whole or self._to), self._file:
            self._file.flush()
            if self._whole and kind is None:
                os.fsync(self._file.fileno())
                put_in_place(self._to, self._to.with_name(self._to.name.removesuffix(".partial")))
        if self._whole and kind is not None:
            rest = "asks only for the rest" if self.resumes else "begins anew"
            print(
                f"cotune: answers so far, {self._count} rows, are in {self._to}; {self._whole} is as it was. The same "
                f"command {rest}.",
                file=sys.stderr,
            )


@contextmanager
def answers_kept(tuned: Tuned, lines: Lines) -> Iterator[StoredLM | None]:
    """Inside, completions of an LM without weights here are kept as they come, and are not paid for twice.

    The store stands beside the output until that is whole. None for other LMs, and for those without an `identity`.
    """
    from cotune.inference.calls import StoredLM
    from cotune.lightning_modules.text_lm import TextLM

    lm = tuned.module.lm
    if not isinstance(lm, TextLM) or not lm.identity or not getattr(lm.lm, "identity", None):
        yield None
        return
    if isinstance(lm.lm, StoredLM):  # it has a store of its own
        lines.resumes = True
        yield lm.lm
        return
    with tempfile.TemporaryDirectory() as folder:
        path = lines.store or Path(folder, "completions.sqlite")
        stored = StoredLM(lm.lm, str(path))
        tuned.module.lm = TextLM(stored)
        lines.resumes = lines.store is not None
        try:
            yield stored
        finally:
            stored.close()
    path.unlink(missing_ok=True)


def finished(tuned: Tuned, stored: StoredLM, examples: Sequence[Example], error: CotuneError) -> list[Rollout | None]:
    """The rollouts of a batch that an error cut short, by what was answered before; None for those that lack more."""
    stored.lm = _Gone(error)
    found: list[Rollout | None] = []
    for example in examples:
        try:
            found += tuned.rollouts([example])
        except type(error):
            found.append(None)
    return found


class _Gone:
    """An LM that answers nothing more."""

    def __init__(self, error: CotuneError) -> None:
        self.error = error

    def complete(self, requests: Any, sampling: Any) -> NoReturn:
        raise self.error


def _beside(path: Path) -> Path:
    real = Path(os.path.realpath(path)) if path.is_symlink() else path
    return real.with_name(real.name + ".partial")
