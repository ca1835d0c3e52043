"""The configs that are installed with cotune, found by their names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).with_name("configs")


def shipped() -> dict[str, Path]:
    """Name -> file, e.g. "iris" and "models/qwen3-4b"; the tasks and presets first."""
    files = sorted(FOLDER.rglob("*.yaml"), key=lambda path: (len(path.relative_to(FOLDER).parts), path))
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in files}


def find(given: str, *, within: str = "") -> Path | None:
    """The shipped config that a word means: its name, with or without "configs/" and ".yaml"; None for no such.

    Args:
        within: folder of the shipped ones that is looked at first, e.g. "table/".
    """
    name = given.removeprefix("./").removeprefix("configs/")
    name = name.removesuffix(".yaml").removesuffix(".yml")
    known = shipped()
    return known.get(f"{within}{name}") or known.get(name)


def resolved(given: str, *, within: str = "") -> str:
    """The file that a value of --config means. One in the working folder comes first, and that is said where the name
    is also a shipped config's."""
    beside = [path for path in (Path(given), Path(f"{given}.yaml"), Path(f"{given}.yml")) if path.is_file()]
    found = find(given, within=within)
    if not beside:
        return given if found is None else str(found)
    if found is not None and not given.endswith((".yaml", ".yml")):
        print(f"cotune: --config {given} is {beside[0]} in this folder, not the shipped config", file=sys.stderr)
    return str(beside[0])


def with_files(words: Sequence[str]) -> list[str]:
    """A command line in which every --config names a file, where there is one."""
    made = list(words)
    for at, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name not in ("--config", "-c"):
            continue
        if equals:
            made[at] = f"{name}={resolved(value)}"
        elif at + 1 < len(words):
            made[at + 1] = resolved(words[at + 1])
    return made
