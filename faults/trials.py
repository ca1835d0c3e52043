"""Trials: what was tried and what came of it, kept in a file as they end, so that a suite that is stopped goes on."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Trial = dict[str, Any]
"""One trial. `ok`: it ended as it must. `redone`: units of work done twice. `silent`: 1 for a loss that nobody was told
of. `said`: what the user was told. Anything else is for those who look closer."""


class Trials:
    """The results file: part -> key -> trial.

    Args:
        path: of the JSON file; what it holds already is kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: dict[str, dict[str, Trial]] = {}
        self.machine: dict[str, Any] = {}
        if path.is_file():
            data = json.loads(path.read_text(encoding="utf-8"))
            self.parts, self.machine = data["parts"], data["machine"]

    def forget(self, part: str) -> None:
        self.parts.pop(part, None)

    def of(self, part: str) -> dict[str, Trial]:
        return self.parts.setdefault(part, {})

    def run(self, part: str, key: str, trial: Callable[[], Trial]) -> Trial:
        """The trial's result: the one that is there, or else of trying it now."""
        known = self.of(part)
        if key not in known:
            started = time.monotonic()
            try:
                result = trial()
            except Exception as error:  # a trial that breaks is a failed trial, and the others go on
                result = {"ok": False, "said": f"{type(error).__name__}: {error}"[:2000]}
            result = _without_places(result)
            result["seconds"] = round(time.monotonic() - started, 2)
            known[key] = result
            self.save()
            mark = "." if result["ok"] else "F"
            print(mark, end="" if result["ok"] else f" {part} {key}: {result.get('said', '')[:300]}\n", flush=True)
        return known[key]

    def save(self) -> None:
        self.machine = {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.system()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        text = json.dumps({"machine": self.machine, "parts": self.parts}, indent=1, sort_keys=True, ensure_ascii=False)
        partial.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        partial.replace(self.path)

    def failures(self) -> Iterator[tuple[str, str, Trial]]:
        for part, trials in self.parts.items():
            for key, trial in trials.items():
                if not trial["ok"]:
                    yield part, key, trial


_PLACES = re.compile(r"(?<![\w>])/[^\s\"'():,<>]*?/(?=runs/|completions\.sqlite|[\w-]+\.py\b)")
"""What stands before a run's own path, or before a module's name."""


def _without_places(value: Any) -> Any:
    """Without the folders of this machine in what was said: they mean nothing elsewhere."""
    if isinstance(value, dict):
        return {name: _without_places(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    return _PLACES.sub("", value) if isinstance(value, str) else value
