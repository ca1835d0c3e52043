"""The run that the faults happen to: a whole `cotune fit`, small enough to be repeated hundreds of times."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from commands import ROOT, fit

NAME = "tiny"


@dataclass(frozen=True)
class Job:
    """A command line, and where it is started.

    Attributes:
        words: after `cotune`.
        folder: the working folder; the run's files are in `folder/runs/tiny`.
        environment: variables beside those of this process.
    """

    words: tuple[str, ...]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.folder / "runs" / NAME


def tiny_job(model: Path, folder: Path, *more: str, schedule: str = "p -> w -> p") -> Job:
    """A run of the tiny model: a few seconds, with every phase that a long one has."""
    return _job(folder, *fit(model, "--data.batch_size", "2", *more, schedule=schedule, name=NAME))


def embedded_job(folder: Path, *more: str) -> Job:
    """A run of the embedded SmolLM2-135M-Instruct on a handful of rows: half a minute or so."""
    sizes = {"train": 6, "dev": 3, "val": 4, "test": 2}
    return _job(
        folder,
        *("fit", "--config", str(ROOT / "configs" / "iris.yaml"), "--name", NAME),
        *(word for part, size in sizes.items() for word in (f"--data.sizes.{part}", str(size))),
        *("--data.metric", "tiny_fit.digest", "--alternate.schedule", "p -> w", "--alternate.epochs", "2"),
        *("--alternate.search", "RandomDemoSearch", "--alternate.search.num_candidates", "1"),
        *("--data.bootstrapping.attempts", "4", "--data.batch_size", "2"),
        *("--model.sampling.max_new_tokens", "10", "--model.lm.lora.r", "4", "--trainer.accelerator", "cpu"),
        *("--trainer.enable_progress_bar", "false", *more),
    )


def outcome(run: Path) -> dict[str, Any]:
    """What a finished run came to, without what the clock says; equal for equal runs.

    Raises:
        FileNotFoundError: it has not come to its end.
    """
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    history = [json.loads(line) for line in (run / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "adapter": _sum(run / "export" / "adapter" / "adapter_model.safetensors"),
        "prompts": _sum(run / "export" / "prompts.json"),
        "scores": summary["scores"],
        "best": summary["best"],
        "test_score": summary["test_score"],
        "boundaries": [(record["prefix"], record["prompts"], record["val_score"]) for record in history],
    }


def _job(folder: Path, *words: str) -> Job:
    # A store of its own: the user's would make every run after the first one a run of cache hits.
    store = () if "--model.lm.completions" in words else ("--model.lm.completions", str(folder / "completions.sqlite"))
    return Job((*words, "--runs_dir", str(folder / "runs"), *store), folder)


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
