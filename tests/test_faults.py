"""A short slice of the fault suite, which stands in faults/; `make faults` runs all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults import inputs
from faults.report import page
from faults.trials import Trials

TESTS = Path(__file__).resolve().parent


@pytest.mark.slow
def test_killed_twice_at_once_and_damaged_runs_end_as_they_must(tmp_path: Path) -> None:
    # A process of its own: it forks, and a fork of one that has trained cannot train.
    results = tmp_path / "faults.json"
    options = ["--only", "kills,two_runs,corruption", "--scale", "0.005", "--results", str(results)]
    options += ["--work", str(tmp_path / "work"), "--report", str(tmp_path / "FAULTS.md")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    command = [sys.executable, "-m", "faults", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads(results.read_text())["parts"]
    assert {"SIGKILL", "two runs in one directory", "damaged files"} == set(parts)
    assert all(trial["silent"] == 0 for trials in parts.values() for trial in trials.values())


def test_a_suite_that_is_stopped_goes_on(tmp_path: Path) -> None:
    tried: list[str] = []

    def trial(name: str) -> dict[str, object]:
        tried.append(name)
        return {"ok": name != "b", "redone": 1, "silent": 0, "said": f"{name} | said"}

    for names in ("ab", "abc"):
        trials = Trials(tmp_path / "faults.json")
        for name in names:
            trials.run("SIGTERM", name, lambda name=name: trial(name))  # type: ignore[misc]
    assert tried == ["a", "b", "c"]
    text = page(trials)
    assert "| SIGTERM | at random times | 3 | 2 | 3 | 0 |" in text
    assert "| SIGTERM | b | b \\| said |" in text


def test_a_trial_that_breaks_is_a_failed_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trials = Trials(tmp_path / "faults.json")
    assert not trials.run("SIGTERM", "a", lambda: {}["nothing"])["ok"]
    assert [part for part, *_ in trials.failures()] == ["SIGTERM"]


@pytest.mark.parametrize("target", list(inputs.STRATEGIES), ids=lambda target: target.__name__)
def test_no_input_ends_in_a_traceback(target: Callable[[Any], None]) -> None:
    count = 20 if target is inputs.configs else 100
    assert inputs.check(target, count) >= count // 2
