"""A run killed or stopped in the middle of a step ends, after the same command again, where it would have ended."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import fit
from forked import Parent, Started

_SLOW_METRIC = """
import time
from tiny_fit import digest

def slow(example, prediction):
    time.sleep(0.02)
    return digest(example, prediction)
"""


@pytest.fixture(scope="module")
def parent() -> Iterator[Parent]:
    made = Parent()
    yield made
    made.close()


def _started(parent: Parent, model: Path, folder: Path) -> Started:
    (folder / "slow_metric.py").write_text(_SLOW_METRIC)
    words = fit(model, "--data.metric", "slow_metric.slow", "--runs_dir", str(folder))
    return parent.start(words, folder)


def _until(run: Started, sign: str) -> None:
    """Waits until the run's output, or its list of files, holds the sign."""
    deadline = time.monotonic() + 120
    while sign not in run.text and not (run.log.parent / "tiny" / sign).exists():
        assert run.code is None, f"the run ended before {sign!r} was seen: {run.text}"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _result(folder: Path) -> tuple[Any, ...]:
    """What a run came to: scores by prefix, the best, the test score, and hashes of what it exports."""
    run = folder / "tiny"
    summary = json.loads((run / "summary.json").read_text())
    hashes = [
        hashlib.sha256((run / "export" / name).read_bytes()).hexdigest()
        for name in ("adapter/adapter_model.safetensors", "prompts.json")
    ]
    return summary["scores"], summary["best"], summary["test_score"], summary["lm_calls"], hashes


@pytest.fixture(scope="module")
def uninterrupted(parent: Parent, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    folder = tmp_path_factory.mktemp("whole")
    run = _started(parent, tiny_model, folder)
    assert run.ended() == 0, run.text
    return _result(folder)


def test_a_run_killed_and_stopped_in_each_step_ends_where_it_would_have_ended(
    parent: Parent, tiny_model: Path, tmp_path: Path, uninterrupted: tuple[Any, ...]
) -> None:
    for number, sign in (
        (signal.SIGTERM, "[0/3] prompt step: candidate 1"),
        (signal.SIGKILL, "[0/3] prompt step: candidate 2"),
        (signal.SIGKILL, "traces/step-2"),
        (signal.SIGTERM, "[1/3] weight step: epoch 1"),
        (signal.SIGINT, "[1/3] weight step: epoch 2"),
        (signal.SIGKILL, "[2/3] prompt step: candidate 1"),
    ):
        run = _started(parent, tiny_model, tmp_path)
        _until(run, sign)
        os.kill(run.pid, number)
        if number == signal.SIGKILL:
            assert run.ended() == -number
        else:
            assert run.ended() == 128 + number
            assert "Traceback" not in run.text
            assert "cotune: stopped. The same command resumes from here." in run.text
    assert not (tmp_path / "tiny" / "summary.json").exists()
    run = _started(parent, tiny_model, tmp_path)
    assert run.ended() == 0, run.text
    assert _result(tmp_path) == uninterrupted
