"""cotune configs: the configs that are installed with cotune, listed and copied."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from cotune.errors import CotuneError
from cotune.shipped import FOLDER, find, shipped

_ALL = "all"


class ConfigsError(CotuneError):
    """There is no shipped config of that name, or a copy would replace a file."""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        "cotune configs",
        allow_abbrev=False,
        description="Lists the configs that come with cotune. Use one by its name: cotune fit --config iris. Those in "
        "models/ and the presets are laid over a task: --config iris --config models/qwen3-4b.",
    )
    copy = made.add_subparsers(dest="action", metavar="copy").add_parser(
        "copy", help="writes a config into a folder for you to change: cotune configs copy iris .", allow_abbrev=False
    )
    copy.add_argument("name", metavar="NAME", help='name from the list; "all" for the whole folder')
    copy.add_argument("folder", metavar="FOLDER", nargs="?", default=".", help="where to (default: this folder)")
    return made


def main(options: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ConfigsError: no such config, or a file is there already.
    """
    if options.action == "copy":
        print(f"wrote {_copied(options.name, Path(options.folder))}")
        return 0
    known = shipped()
    width = max(map(len, known))
    columns = shutil.get_terminal_size((120, 24)).columns
    for name, path in known.items():
        message = path.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")
        line = f"{name:{width}}  {message}"
        print(line if len(line) <= columns else f"{line[: columns - 1]}…")
    return 0


def _copied(name: str, folder: Path) -> Path:
    """Copies; where to."""
    found = FOLDER if name == _ALL else find(name)
    if found is None:
        raise ConfigsError(f'there is no shipped config "{name}"; cotune configs lists them.')
    if found.parent.name == "table":
        raise ConfigsError(f'"{name}" needs other configs; copy them all: cotune configs copy all {folder}')
    target = folder / found.name
    if target.exists():
        raise ConfigsError(f"{target} is there already; remove it, or copy into another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if found.is_dir():
        shutil.copytree(found, target)
    else:
        shutil.copyfile(found, target)
    return target
