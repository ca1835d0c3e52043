"""RecordRun: what a run did, as files in its folder: history.jsonl and summary.json; and its faults, as they appear."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cotune.callbacks.alternate import Alternate
from cotune.callbacks.boundary import Boundary, BoundaryListener, judge_noise
from cotune.callbacks.progress import say
from cotune.callbacks.say_plan import learning_rates
from cotune.lightning_modules import ProgramModule
from cotune.programs import Ledger, faults_of, mean_score
from cotune.programs.faults import Faults, faults_from_dict, faults_to_dict, merged
from cotune.programs.set_metrics import measured
from cotune.storage.durable import clock, read_durably, write_durably
from cotune.storage.redact import redacted_text
from lightning.pytorch import Callback, LightningModule, Trainer

_COUNTED = ("lm_calls", "prompt_tokens", "completion_tokens", "cached_calls")
_LIBRARIES = ("cotune", "torch", "lightning", "transformers", "peft", "datasets")


class RecordRun(Callback, BoundaryListener):
    """Writes history.jsonl at each boundary, and summary.json at the schedule's end and when it has been tested.

    A kind of fault of the user's code (program, retriever, metric) is printed at the first boundary after it occurred;
    how often it occurred in all stands in summary.json.

    Args:
        folder: the run's folder; null takes the trainer's default_root_dir.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._alternate: Alternate | None = None
        self._began = self._writing_before = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._began, self._writing_before = time.perf_counter(), clock.seconds
            found = [c for c in trainer.callbacks if isinstance(c, Alternate)]  # type: ignore[attr-defined]
            self._alternate = found[0] if found else None

    def on_boundary(self, trainer: Trainer, module: LightningModule, boundary: Boundary) -> None:
        assert self._alternate is not None
        if not trainer.is_global_zero:
            return
        # All of it, not one line more: after a resume the file must not hold a boundary that was never saved.
        lines = [json.dumps(record, ensure_ascii=False) for record in self._alternate.history]
        write_durably(self._path(trainer, "history.jsonl"), "\n".join(lines) + "\n")
        known = _history_faults(self._alternate.history[:-1])
        for kind, fault in boundary.faults.items():
            if kind not in known:
                say(f"the {kind} failed {fault}. Such runs score 0; history.jsonl counts them.")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self._alternate is not None and self._alternate.finished:
            self.write_summary(trainer, pl_module)

    def write_summary(self, trainer: Trainer, module: LightningModule, *, ended: str = "", found: str = "") -> None:
        """Writes what has come of the run so far.

        Args:
            ended: the bound of its budget that ended it early.
            found: what the export holds then, where that is a candidate of a search that was broken off.
        """
        assert self._alternate is not None
        assert isinstance(module, ProgramModule)
        made = summary(self._alternate, seed=module.seed)
        made |= {"ended": ended, "found": found, "adapter": str(module.lm.attached)}
        made["learning_rates"] = learning_rates(module, self._alternate)
        more = {**_spent_and_judged(trainer, module), "durability": self._durability(module)}
        self._write(trainer, module, {**made, **more})

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = self._path(trainer, "summary.json")
        if trainer.is_global_zero and self._alternate is not None and path.is_file():
            known = json.loads(read_durably(path))
            # Not the logged metric: loggers hold float32, and 23 of 50 would read 0.46000000834465027.
            score = mean_score(pl_module.evaluated)  # type: ignore[arg-type]
            faults = faults_to_dict(faults_of(pl_module.evaluated))  # type: ignore[arg-type]
            tested = {"test_score": score, "test_faults": faults}
            if names := trainer.datamodule.set_metrics:  # type: ignore[attr-defined]
                pairs = [(rollout.example, rollout.prediction) for rollout in pl_module.evaluated]  # type: ignore[union-attr]
                tested["test_set_metrics"] = measured(names, pairs)
            self._write(trainer, pl_module, {**known, **tested, **_spent_and_judged(trainer, pl_module)})

    def _write(self, trainer: Trainer, module: LightningModule, data: dict[str, Any]) -> None:
        write_durably(self._path(trainer, "summary.json"), json.dumps(data, indent=2, ensure_ascii=False) + "\n")

    def _durability(self, module: LightningModule) -> dict[str, float]:
        """Seconds that keeping the run safe took in this process, and their share of its time."""
        store = getattr(getattr(module, "lm", None), "store", None)
        storing, writing = (store.seconds if store else 0.0), clock.seconds - self._writing_before
        share = (storing + writing) / max(time.perf_counter() - self._began, 1e-9)
        return {"storing": round(storing, 3), "writing": round(writing, 3), "share": round(share, 4)}

    def _path(self, trainer: Trainer, name: str) -> Path:
        return Path(self.folder or trainer.default_root_dir) / name


def summary(alternate: Alternate, *, seed: int) -> dict[str, Any]:
    """The run in one record: scores by prefix on val, the best of them, and what it all cost."""
    history = alternate.history
    seconds: dict[str, float] = {"vanilla": 0.0, "p": 0.0, "w": 0.0}
    for record in history:
        seconds[record["step"] or "vanilla"] += record["seconds"]
    return {
        "schedule": " -> ".join(alternate.schedule),
        "scores": {record["prefix"]: record["val_score"] for record in history},
        "best": alternate.best["prefix"],
        "test_score": None,
        "faults": faults_to_dict(_history_faults(history)),
        "test_faults": {},
        **{name: sum(r[name] for r in history) for name in _COUNTED},
        "seconds": {**{k: round(v, 1) for k, v in seconds.items()}, "total": round(sum(seconds.values()), 1)},
        "seed": seed,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
        "command": redacted_text(" ".join(sys.argv)),
    }


def _spent_and_judged(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """What was paid, by role, where LMs are charged to a ledger; and how far a judge agreed with itself."""
    roles = getattr(module, "ledger", Ledger()).roles
    metric = getattr(getattr(trainer, "datamodule", None), "metric", None)
    return {"costs": {role: asdict(usage) for role, usage in roles.items()}, "judge": judge_noise(metric)}


def _history_faults(history: Sequence[Mapping[str, Any]]) -> Faults:
    """The faults of several boundaries' records together."""
    return merged(*(faults_from_dict(record.get("faults", {})) for record in history))
