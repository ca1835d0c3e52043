"""Approval: a person takes, refuses or edits what an LM proposes, on a terminal or in a file of the run's folder."""

from __future__ import annotations

import difflib
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import yaml
from cotune.errors import CotuneError
from cotune.programs.ranks import Ranks
from cotune.prompting.search import Review
from cotune.storage.durable import write_whole
from rich.console import Console
from rich.text import Text

_STYLES = {"+": "green", "-": "red"}
_ANSWERS = {"y": "y", "yes": "y", "true": "y", "n": "n", "no": "n", "false": "n"}  # YAML reads yes as True

_HEAD = """\
# What an LM proposes as instructions. Set each `answer` to y or n; `proposed` may be edited before a y.
# Then run the same command again: the run resumes, and asks nothing twice.
"""


class ApprovalNeededError(CotuneError, RuntimeError):
    """Proposals wait for a person's answer. The message says where to give it and how to go on."""


class Approval:
    """Asks about proposals where there is a terminal; elsewhere it writes them down and ends the run.

    All questions and answers stand in one file, so that a run that is resumed does not ask twice. Satisfies
    `cotune.prompting.search.Reviewer`.

    Args:
        path: of the file.
        paused: a context in which the terminal is free.
        waived: take all without asking, as a rehearsal does.
        terminal: whether somebody can answer; None looks.
        ranks: the run's processes, of which the first asks.
    """

    def __init__(
        self,
        path: Path,
        paused: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        waived: bool = False,
        terminal: bool | None = None,
        ranks: Ranks = Ranks(),  # noqa: B008 (without state)
    ) -> None:
        self._ranks = ranks
        self.path, self._paused, self._waived = path, paused, waived
        self._terminal = sys.stdin.isatty() and sys.stdout.isatty() if terminal is None else terminal

    def review(self, asked: Sequence[Review]) -> list[str]:
        """The text to take for each; "" where it is refused.

        Raises:
            ApprovalNeededError: some have no answer, and nobody can be asked here.
        """
        return self._ranks.once(lambda: self._review(asked))

    def _review(self, asked: Sequence[Review]) -> list[str]:
        if self._waived:
            return [one.proposed for one in asked]
        rows = self._read()
        for one in asked:
            told = {"stage": one.stage, "now": one.now, "proposed": one.proposed, "answer": ""}
            rows.setdefault(_id(one), told)
        unanswered = [row for one in asked if not (row := rows[_id(one)])["answer"]]
        if unanswered:
            self._write(rows)
        if unanswered and not self._terminal:
            raise ApprovalNeededError(self._message(len(unanswered)))
        with self._paused() if unanswered else nullcontext():
            for number, row in enumerate(unanswered, 1):
                row |= self._ask(row, f"proposal {number} of {len(unanswered)}", len(unanswered) - number + 1)
                self._write(rows)
        return [row["proposed"].strip() if (row := rows[_id(one)])["answer"] == "y" else "" for one in asked]

    def _ask(self, row: dict[str, Any], title: str, left: int) -> dict[str, str]:
        """The answer, and the text as it was edited."""
        proposed, console = row["proposed"], Console()
        while True:
            console.print(Text(f'\n{title}: the instruction of "{row["stage"]}"', "bold"))
            for line in difflib.ndiff(row["now"].splitlines(), proposed.splitlines()):
                if not line.startswith("?"):
                    console.print(Text(line, _STYLES.get(line[:1], "")))
            try:
                answer = input("take it? y, n, or e to edit: ").strip().lower()
            except EOFError:
                raise ApprovalNeededError(self._message(left)) from None
            if answer in _ANSWERS:
                return {"proposed": proposed, "answer": _ANSWERS[answer]}
            if answer in ("e", "edit"):
                if text := edited(proposed):
                    proposed = text
                else:
                    console.print("an instruction cannot be empty: it stays as it was; n refuses it")

    def _message(self, count: int) -> str:
        return (
            f"{count} proposed instruction{'s wait' if count > 1 else ' waits'} for a person's answer in "
            f'"{self.path}". Set each `answer` there to y or n (`proposed` may be edited before a y), and run the '
            "same command again; on a terminal it asks one by one."
        )

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self.path.is_file():
            return {}
        try:
            rows: dict[str, dict[str, Any]] = yaml.safe_load(self.path.read_text(encoding="utf-8")) or {}
            for name, row in rows.items():
                answer = "" if row["answer"] is None else str(row["answer"]).strip().lower()
                if answer and answer not in _ANSWERS:
                    raise ApprovalNeededError(f'"{self.path}": the answer is "{row["answer"]}"; write y or n.')
                row |= {"answer": _ANSWERS.get(answer, ""), "proposed": self._text(name, row, answer)}
        except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            raise ApprovalNeededError(f'"{self.path}" cannot be read; fix it: {error!r}') from error
        return rows

    def _text(self, name: str, row: dict[str, Any], answer: str) -> str:
        """The proposed text of an entry; of one that is refused whatever stands there."""
        text = row["proposed"]
        if _ANSWERS.get(answer) != "n" and not (isinstance(text, str) and text.strip()):
            wrong = "empty" if text is None or not str(text).strip() else f"no text but {text!r}; put it in quotes"
            raise ApprovalNeededError(
                f'"{self.path}": `proposed` of entry {name}, for the instruction of "{row["stage"]}", is {wrong}. '
                "Write the instruction there, or set its `answer` to n."
            )
        return str(text)

    def _write(self, rows: dict[str, dict[str, Any]]) -> None:
        text = yaml.dump(rows, Dumper=_Blocks, sort_keys=False, allow_unicode=True, width=120)
        write_whole(self.path, _HEAD + text)


def edited(text: str) -> str:
    """The text after a person has had it in $VISUAL or $EDITOR; as it was where that failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instruction.txt"
        path.write_text(text + "\n", encoding="utf-8")
        editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
        try:
            subprocess.run([*shlex.split(editor), str(path)], check=True)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            print(f'the editor "{editor}" failed ({error}); set EDITOR to another')
            return text
        return path.read_text(encoding="utf-8").strip()


class _Blocks(yaml.SafeDumper):  # type: ignore[misc]  # yaml has no types
    """Writes texts of several lines as blocks, which a person can edit."""


def _represented(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Blocks.add_representer(str, _represented)


def _id(one: Review) -> str:
    return hashlib.sha256("\0".join((one.stage, one.now, one.proposed)).encode(errors="replace")).hexdigest()[:12]
