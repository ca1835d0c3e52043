"""A whole table on the tiny model: killed in the middle, continued, and read."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import yaml
from commands import ROOT, cotune
from waiting import until

from cotune.__main__ import main


def write_table(folder: Path, model: Path) -> None:
    configs = ROOT / "configs"
    made = {
        "name": "tiny",
        "tasks": {"iris": {"configs": [str(configs / "iris.yaml")], "paper": "Iris"}},
        "lms": {
            "tiny": {"options": {"model.lm": "tiny_fit.CurtLM", "model.lm.model": str(model), "model.lm.device": "cpu"}}
        },
        "presets": {"default": [str(configs / "default.yaml"), str(configs / "demos.yaml")]},
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
def test_a_table_that_is_killed_goes_on_and_ends_with_its_page(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))  # for the runs, which are processes of their own
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_table(tmp_path, tiny_model)
    words = ["table", "--config", "table.yaml"]

    dry = cotune([*words, "--dry-run"], capsys)
    assert dry.code == 0, dry.err
    assert "3 runs, at most" in dry.out
    assert "time: about" in dry.out
    assert not (tmp_path / "tables" / "tiny" / "runs").exists()

    runs = tmp_path / "tables" / "tiny" / "runs"
    first = runs / "iris_tiny_default_p-w-p_0"
    if not (table := os.fork()):  # it trains nothing itself, so it need not import anything anew
        main([*words, "--no-warm-up"])
        os._exit(1)
    until((runs / "logs" / "iris_tiny_default_p-p_0.txt").exists, seconds=300)  # the second has been started
    os.kill(table, signal.SIGKILL)
    os.waitpid(table, 0)
    before = (first / "summary.json").stat().st_mtime_ns

    again = cotune([*words, "--no-warm-up"], capsys)
    assert again.code == 0, again.err
    assert "3 runs, 1 of them finished" in again.out
    assert (first / "summary.json").stat().st_mtime_ns == before
    record = json.loads((tmp_path / "tables" / "tiny" / "table.json").read_text())
    rows = {row["strategy"]: row for row in record["cells"][0]["rows"]}
    assert record["finished"] == record["runs"] == 3
    assert [row["seeds"] for row in rows.values()] == [1] * 4
    equal, alternation = rows["p -> p, equal calls"]["lm_calls"], rows["p -> w -> p"]["lm_calls"]
    assert 0 <= equal - alternation < 6
    assert not (first / "checkpoints").exists()

    other = cotune([*words, "--set", "alternate.epochs=3"], capsys)
    assert other.code == 2
    assert "was made with other options (then -> now): alternate.epochs: 2 -> 3" in other.err
