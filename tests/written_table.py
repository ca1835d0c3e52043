"""Runs of a table as files in their folders, without having been run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from cotune.experiments.runs import Run
from cotune.experiments.table_config import TableConfig, read_table
from cotune.storage.durable import write_durably


def config(folder: Path, **changes: Any) -> TableConfig:
    """A table of one cell, read from a file."""
    (folder / "task.yaml").write_text("name: task\n")
    made: dict[str, Any] = {
        "name": "small",
        "tasks": {"iris": {"configs": ["task.yaml"], "paper": "Iris"}},
        "lms": {"tiny": []},
        "presets": {"default": []},
        "strategies": "all",
        "seeds": [0, 1],
        **changes,
    }
    (folder / "table.yaml").write_text(yaml.safe_dump(made))
    return read_table(folder / "table.yaml")


def write_run(
    run: Run,
    folder: Path,
    val: Sequence[float],
    test: Sequence[Mapping[str, float]],
    *,
    keep: str = "best",
    tokens: Sequence[float] = (),
    calls: int = 10,
    cached: int = 0,
    seconds: float = 5.0,
    finished: bool = True,
) -> None:
    """A run with these val scores (and tokens of a run on val) and these scores of test examples, a boundary each."""
    own = folder / run.name
    (own / "rollouts").mkdir(parents=True)
    lines = []
    for index, (on_val, tested) in enumerate(zip(val, test, strict=True)):
        record = {
            "index": index,
            "step": run.steps[index - 1] if index else "",
            "prefix": " -> ".join(run.steps[:index]) or "vanilla",
            "val_score": on_val,
            "val_tokens": tokens[index] if tokens else 0.0,
            "lm_calls": calls,
            "cached_calls": cached,
            "seconds": seconds,
            "test_score": sum(tested.values()) / len(tested),
            "test_cost": {"seconds": 1.0},
        }
        lines.append(json.dumps(record))
        rows = [
            {"example": id_, "score": s, "error": {"kind": "format"} if s < 0.1 else None} for id_, s in tested.items()
        ]
        (own / "rollouts" / f"test-{index}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_durably(own / "history.jsonl", "\n".join(lines) + "\n")
    (own / "config.yaml").write_text(yaml.safe_dump({"alternate": {"keep": keep}}))
    if finished:
        write_durably(own / "summary.json", json.dumps({"test_score": 0.5}))


def flat(score: float, *, n: int = 4) -> dict[str, float]:
    """A test set with one score for all."""
    return {f"t{i}": score for i in range(n)}
