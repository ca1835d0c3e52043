"""A run killed or stopped in the middle of a step ends, after the same command again, where it would have ended."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import fit

_SLOW_METRIC = """
import time
from tiny_fit import digest

def slow(example, prediction):
    time.sleep(0.02)
    return digest(example, prediction)
"""


def _command(model: Path, folder: Path, *more: str) -> list[str]:
    words = fit(model, "--data.metric", "slow_metric.slow", "--runs_dir", str(folder), *more)
    return [sys.executable, "-m", "cotune", *words]


def _environment(folder: Path) -> dict[str, str]:
    (folder / "slow_metric.py").write_text(_SLOW_METRIC)
    path = os.pathsep.join([str(folder), str(Path(__file__).resolve().parents[1])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def _result(folder: Path) -> tuple[Any, ...]:
    """What a run came to: scores by prefix, the best, the test score, and hashes of what it exports."""
    run = folder / "tiny"
    summary = json.loads((run / "summary.json").read_text())
    hashes = [
        hashlib.sha256((run / "export" / name).read_bytes()).hexdigest()
        for name in ("adapter/adapter_model.safetensors", "prompts.json")
    ]
    return summary["scores"], summary["best"], summary["test_score"], summary["lm_calls"], hashes


def _run_to_end(model: Path, folder: Path, *more: str) -> tuple[Any, ...]:
    done = subprocess.run(
        _command(model, folder, *more),
        env=_environment(folder),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return _result(folder)


def _started(model: Path, folder: Path, sign: str, *more: str) -> subprocess.Popen[bytes]:
    """A run whose output, or whose list of files, holds the sign by now."""
    log = folder / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            _command(model, folder, *more), env=_environment(folder), cwd=folder, stdout=out, stderr=subprocess.STDOUT
        )
    deadline = time.monotonic() + 400
    while sign not in log.read_text() and not (folder / "tiny" / sign).exists():
        assert process.poll() is None, f"the run ended before {sign!r} was seen: {log.read_text()}"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    return _run_to_end(tiny_model, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    "sign",
    [
        pytest.param("[0/3] prompt step: candidate 2", id="first prompt step"),
        pytest.param("traces/step-2", id="weight step"),
        pytest.param("[2/3] prompt step: candidate 1", id="last prompt step"),
    ],
)
def test_a_killed_run_ends_where_it_would_have_ended(
    sign: str, tiny_model: Path, tmp_path: Path, uninterrupted: tuple[Any, ...]
) -> None:
    process = _started(tiny_model, tmp_path, sign)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "tiny" / "summary.json").exists()
    assert _run_to_end(tiny_model, tmp_path) == uninterrupted


@pytest.mark.parametrize(
    ("number", "sign"),
    [
        pytest.param(
            signal.SIGTERM, "[0/3] prompt step: candidate 1", id="SIGTERM while generating", marks=pytest.mark.slow
        ),
        pytest.param(signal.SIGTERM, "[1/3] weight step: epoch 1", id="SIGTERM while training"),
        pytest.param(signal.SIGINT, "[1/3] weight step: epoch 1", id="Ctrl-C", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_says_so_and_goes_on(
    number: signal.Signals, sign: str, tiny_model: Path, tmp_path: Path, uninterrupted: tuple[Any, ...]
) -> None:
    process = _started(tiny_model, tmp_path, sign)
    process.send_signal(number)
    assert process.wait(timeout=300) == 128 + number
    said = (tmp_path / "log.txt").read_text()
    assert "Traceback" not in said
    assert "cotune: stopped. The same command goes on from here." in said
    assert _run_to_end(tiny_model, tmp_path) == uninterrupted
