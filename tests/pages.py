"""The pages of docs/ as a reader uses them: blocks of code, files to save, commands to type."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the file it is to be saved as, if the page says so before it."""

    language: str
    text: str
    file: str = ""


def blocks(page: Path) -> list[Block]:
    """The blocks of a page in order. "ave this as `x`" names the file of the next block; a sentence may end in it."""
    text = page.read_text(encoding="utf-8")
    found, behind = [], 0
    for block in _BLOCK.finditer(text):
        named = re.findall(r"ave (?:this|it)\s+as\s+`([\w.]+)`", text[behind : block.start()])
        found.append(Block(block[1], block[2], named[-1] if named else ""))
        behind = block.end()
    return found


def shown(page: Path, line: str) -> Block:
    """The one block of a page that holds this line."""
    (found,) = [block for block in blocks(page) if line in block.text.splitlines()]
    return found


def commands(page: Path) -> list[list[str]]:
    """The words of each `cotune` command in bash blocks, without variables before it and comments behind it."""
    lines = [line for block in blocks(page) if block.language == "bash" for line in block.text.splitlines()]
    found = []
    for line in lines:
        for part in re.split(r" (?:&&|[|>]) ", line):
            words = shlex.split(part, comments=True)
            words = words[next((at for at, word in enumerate(words) if "=" not in word), 0) :]
            if words[:1] == ["cotune"]:
                found.append(words[1:])
    return found
