"""A W&B run recorded offline, read back with W&B's own reader."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class WandbFile:
    """The folder of one offline run: an `offline-run-<time>-<id>`."""

    folder: Path

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", str(self.folder), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert not done.returncode, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    @property
    def run(self) -> dict[str, Any]:
        return dict(self._of("run")[0])

    @property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for update in [self.run["config"], *self._of("config")]:
            found |= update.get("update", {})
        return found

    @property
    def history(self) -> list[dict[str, Any]]:
        return [record["item"] for record in self._of("history")]

    @property
    def artifacts(self) -> list[dict[str, Any]]:
        """Those that were logged as such; W&B makes one of each table as well."""
        own = [artifact for artifact in self._of("artifact") if artifact["type"] != "run_table"]
        return [{**artifact, "metadata": json.loads(artifact["metadata"])} for artifact in own]

    @property
    def axes(self) -> dict[str, str]:
        return {m.get("glob_name") or m.get("name"): m.get("step_metric", "") for m in self._of("metric")}

    def tables(self, name: str) -> list[dict[str, Any]]:
        """The tables logged under a name, in order."""
        paths = [point[f"{name}.path"] for point in self.history if f"{name}.path" in point]
        return [json.loads((self.folder / "files" / path).read_text()) for path in paths]

    def _of(self, kind: str) -> list[dict[str, Any]]:
        return [record[kind] for record in self.records if record["type"] == kind]


def column(table: dict[str, Any], name: str) -> list[Any]:
    return [row[table["columns"].index(name)] for row in table["data"]]
