"""A whole table on the tiny model: killed in the middle, continued, and read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import ROOT
from waiting import until


def write_table(folder: Path, model: Path) -> None:
    configs = ROOT / "configs"
    made = {
        "name": "tiny",
        "tasks": {"iris": {"configs": [str(configs / "iris.yaml")], "paper": "Iris"}},
        "lms": {
            "tiny": {"options": {"model.lm": "tiny_fit.CurtLM", "model.lm.model": str(model), "model.lm.device": "cpu"}}
        },
        "presets": {"default": [str(configs / "default.yaml")]},
        "strategies": ["vanilla", "p -> p", "p -> w -> p"],
        "seeds": [0],
        "options": {
            "data.metric": "tiny_fit.digest",
            "trainer.accelerator": "cpu",
            "data.sizes": {"train": 12, "dev": 6, "val": 8, "test": 6},
            "data.init_args.bootstrapping.attempts": 2,
            "alternate.epochs": 2,
            "model.sampling.max_new_tokens": 6,
        },
    }
    (folder / "table.yaml").write_text(yaml.safe_dump(made))


@pytest.mark.slow
def test_a_table_that_is_killed_goes_on_and_ends_with_its_page(tiny_model: Path, tmp_path: Path) -> None:
    write_table(tmp_path, tiny_model)
    words = [sys.executable, "-m", "cotune", "table", "--config", "table.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}

    def start(*more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*words, *more], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    dry = start("--dry-run")
    said, _ = dry.communicate(timeout=300)
    assert dry.returncode == 0, said
    assert "3 runs, at most" in said
    assert "time: about" in said
    assert not (tmp_path / "tables" / "tiny" / "runs").exists()

    runs = tmp_path / "tables" / "tiny" / "runs"
    first = runs / "iris_tiny_default_p-w-p_0"
    killed = start("--no-warm-up")
    until(lambda: (runs / "iris_tiny_default_p-p_0" / "run.json").exists(), seconds=300)
    killed.kill()
    killed.communicate()
    before = (first / "summary.json").stat().st_mtime_ns

    again = start("--no-warm-up")
    said, _ = again.communicate(timeout=400)
    assert again.returncode == 0, said
    assert "3 runs, 1 of them finished" in said
    assert (first / "summary.json").stat().st_mtime_ns == before
    record = json.loads((tmp_path / "tables" / "tiny" / "table.json").read_text())
    rows = {row["strategy"]: row for row in record["cells"][0]["rows"]}
    assert record["finished"] == record["runs"] == 3
    assert [row["seeds"] for row in rows.values()] == [1] * 4
    equal, alternation = rows["p -> p, equal calls"]["lm_calls"], rows["p -> w -> p"]["lm_calls"]
    assert 0 <= equal - alternation < 6
    assert not (first / "checkpoints").exists()

    other = start("--set", "alternate.epochs=3")
    said, _ = other.communicate(timeout=300)
    assert other.returncode == 2
    assert "was made with other options (then -> now): alternate.epochs: 2 -> 3" in said
