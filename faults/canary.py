"""A canary key, planted in the environment: it must stand in no file that a run writes, and in nothing it says."""

from __future__ import annotations

import sqlite3
import zipfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from faults.nursery import fresh, run_to_end
from faults.small_run import Job
from faults.trials import Trial

CANARY = "sk-canary-5f0c1d7be2"
_VARIABLES = ("OPENAI_API_KEY", "WANDB_API_KEY", "HF_TOKEN", "ANTHROPIC_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_TOKEN")


def canary_trial(job: Job, *, wandb: bool) -> Trial:
    """A whole run with the key in the environment, W&B's offline logging included if asked for."""
    fresh(job.folder)
    environment = dict.fromkeys(_VARIABLES, CANARY + "0" * 22)  # W&B wants forty characters
    words = job.words
    if wandb:
        environment |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(job.folder)}
        words = (*words, "--trainer.logger", "WandbLogger", "--trainer.logger.save_dir", str(job.folder))
    child = run_to_end(replace(job, words=words, environment=environment), seconds=600)
    holding = [str(path.relative_to(job.folder)) for path in sorted(job.folder.rglob("*")) if _holds(path)]
    return {
        "ok": child.code == 0 and not holding,
        "files": sum(path.is_file() for path in job.folder.rglob("*")),
        "redone": 0,
        "silent": len(holding),
        "said": f"found in {', '.join(holding)}" if holding else child.text[-500:] if child.code else "",
    }


def _holds(path: Path) -> bool:
    if not path.is_file():
        return False
    key = CANARY.encode()
    if key in path.read_bytes():
        return True
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            return any(key in packed.read(name) for name in packed.namelist())
    return path.suffix == ".sqlite" and key in _rows(path)


def _rows(path: Path) -> bytes:
    with closing(sqlite3.connect(path)) as connection:
        return b"".join(bytes(value) for (value,) in connection.execute("SELECT value FROM entries"))
