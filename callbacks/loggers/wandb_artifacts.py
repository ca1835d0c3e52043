"""ProgramArtifacts: data, traces, adapter, prompts, config and export as W&B artifacts that name their origins."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from cotune.callbacks.boundary import Boundary
from cotune.callbacks.export_program import describe_base, describe_data, name_base
from cotune.callbacks.progress import say
from cotune.datamodules import TraceDataModule
from cotune.datamodules.splits import NAMES
from cotune.lightning_modules import ProgramModule
from cotune.programs import prompts_to_dict
from cotune.storage.durable import write_whole
from cotune.storage.redact import redacted

_TYPES = {
    "config": "config",
    "data": "dataset",
    "traces": "dataset",
    "prompts": "prompts",
    "adapter": "model",
    "export": "model",
}
_WAIT = 120
"""Seconds to wait for an upload, where what comes next names it as its origin."""


class ProgramArtifacts:
    """Logs `<run>-data`, `-config`, `-prompts`, `-traces`, `-adapter` and `-export`.

    Each has the alias `step-<boundary>` where there are several, and `made_from` in its metadata: the artifacts it came
    from, by name, alias and digest. Online they are also marked as used, so that W&B draws the graph
    data -> traces -> adapter -> export; offline W&B has no such marks. Content that W&B has already makes no new
    version, so a resumed run may log again.

    Args:
        run: the W&B run.
        folder: the cotune run's. What is not a file there already is written to its `wandb/artifacts/`.
    """

    def __init__(self, run: Any, folder: Path) -> None:
        self.run, self.folder = run, folder.resolve()
        self.name = re.sub(r"[^\w.-]", "-", self.folder.name)
        self.own = self.folder / "wandb" / "artifacts"
        self._logged: dict[str, Any] = {}  # by this process

    def begin(self, data: TraceDataModule) -> None:
        """Logs what a run begins with: its config and the ids of its four sets."""
        config = read_config(self.folder)
        if config:
            self._write("config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
            self._log("config", [self.own / "config.yaml"])
        sets = {name: [example.id for example in getattr(data.splits, name)] for name in NAMES}
        described = {**describe_data(data), "examples": sets}
        self._write("data.json", json.dumps(described, ensure_ascii=False, indent=1))
        self._log("data", [self.own / "data.json"], metadata=describe_data(data))

    def boundary(self, module: ProgramModule, boundary: Boundary) -> None:
        """Logs the prompts of a boundary and, after a weight step, its traces and its adapter."""
        alias = f"step-{boundary.index}"
        facts = {"prefix": boundary.prefix, "val_score": boundary.val_score}
        if boundary.step == "w":
            traces = self.folder / "traces" / alias
            if traces.is_dir():  # there is none where the traces of another run are used
                origins = ["data", f"prompts:step-{boundary.index - 1}"]
                self._log("traces", _files(traces), alias=alias, origins=origins, root=traces, metadata=facts)
            adapter = self.own / f"adapter-{alias}"
            module.weights.save_adapter(adapter)
            base = describe_base(module.weights)
            name_base(adapter, base["name"], base["revision"])
            self._log(
                "adapter", _files(adapter), alias=alias, origins=[f"traces:{alias}"], root=adapter, metadata=facts
            )
        prompts = json.dumps(prompts_to_dict(boundary.prompts), ensure_ascii=False, indent=1)
        self._write(f"prompts-{alias}.json", prompts)
        self._log("prompts", [self.own / f"prompts-{alias}.json"], alias=alias, origins=["data"], metadata=facts)

    def end(self, history: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> None:
        """Logs the export, made from the best prefix's prompts and, if it trained any, its last adapter."""
        export = self.folder / "export"
        if not export.is_dir():
            return
        trained = [r["index"] for r in history if r["step"] == "w" and r["index"] <= best["index"]]
        origins = [f"prompts:step-{best['index']}", *(f"adapter:step-{index}" for index in trained[-1:])]
        facts = {"prefix": best["prefix"], "val_score": best["val_score"]}
        self._log("export", _files(export), alias="best", origins=origins, root=export, metadata=facts)

    def _log(
        self,
        kind: str,
        files: Sequence[Path],
        *,
        alias: str = "",
        origins: Sequence[str] = (),
        root: Path | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        import wandb

        self._use(origins)
        made_from = [self._known().get(origin, f"{self.name}-{origin}") for origin in origins]
        artifact = wandb.Artifact(
            f"{self.name}-{kind}", _TYPES[kind], metadata={**(metadata or {}), "made_from": made_from}
        )
        for path in files:
            # Immutable: no second copy in W&B's cache outside the run's folder, where the file stays as it is.
            name = path.relative_to(root or path.parent).as_posix()
            artifact.add_file(str(path), name=name, policy="immutable", skip_cache=True)
        key = f"{kind}:{alias}" if alias else kind
        self._logged[key] = self.run.log_artifact(artifact, aliases=["latest", *([alias] if alias else [])])
        self._remember(key, f"{self.name}-{key}@{artifact.digest}")

    def _use(self, origins: Sequence[str]) -> None:
        """Online, marks the origins as inputs of the run; offline W&B refuses that."""
        if self.run.offline:
            return
        import wandb

        for origin in origins:
            artifact = self._logged.get(origin)
            if artifact is None:  # logged by the process before this one, which has marked it
                continue
            try:
                self.run.use_artifact(artifact.wait(timeout=_WAIT))
            except wandb.Error as error:  # the network; a run of hours goes on without an edge in a graph
                say(f"W&B did not mark {artifact.name} as used ({error}); its metadata still names it.")

    def _write(self, name: str, text: str) -> None:
        write_whole(self.own / name, text)

    def _known(self) -> dict[str, str]:
        path = self.own / "logged.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    def _remember(self, key: str, name: str) -> None:
        self._write("logged.json", json.dumps({**self._known(), key: name}, indent=1))


def read_config(folder: Path) -> dict[str, Any]:
    """config.yaml of a run without its secrets; {} where the run was not started by a command."""
    path = folder / "config.yaml"
    return dict(redacted(yaml.safe_load(path.read_text(encoding="utf-8")))) if path.is_file() else {}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
