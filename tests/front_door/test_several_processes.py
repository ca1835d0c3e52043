"""`--trainer.devices 2`: the same run as with one process, and one that is lost ends them all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT, cotune, fit

from cotune.fit.option_errors import OptionError
from cotune.fit.processes import check_started, end_with_first, environment, is_first

SAME_BITS = ("--model.gradient_slices", "8", "--model.lm.lora.dropout", "0.1")


def came_to(run: Path) -> dict[str, Any]:
    """All that must not depend on how many processes there were, or when they were stopped."""
    kept = ("step", "prefix", "prompts", "val_score", "scores", "lm_calls", "prompt_tokens", "completion_tokens")
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return {
        "history": [{name: record[name] for name in kept} for record in history],
        "test": json.loads((run / "summary.json").read_text())["test_score"],
        "adapter": {name: tensor.tolist() for name, tensor in checkpoint["state_dict"].items()},
    }


def test_two_processes_begin_one_is_lost_and_one_goes_on_to_the_result_of_one(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = fit(tiny_model, *SAME_BITS, "--alternate.save_every", "1", schedule="p -> w", name="alone")
    assert cotune(words, capsys).code == 0
    several = [word.replace("alone", "several") for word in words]
    two = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.callbacks=tiny_fit.BreakInOneRank")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    first = subprocess.run(
        [sys.executable, "-m", "cotune", *several, *two], env=environment, capture_output=True, text=True, timeout=300
    )
    assert first.returncode == 2, first.stderr
    assert "this process is broken" in first.stderr
    assert "another process of this run has ended" in first.stderr
    assert "Traceback" not in first.stderr
    assert first.stdout.count("vanilla: val score") == 1  # one of them speaks
    second = cotune([*several, "--trainer.callbacks=tiny_fit.BreakInOneRank"], capsys)
    assert second.code == 0, second.err
    assert "continuing runs/several/checkpoints/last.ckpt" in second.out
    assert came_to(Path("runs/several")) == came_to(Path("runs/alone"))


SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}
PER_NODE = {**SRUN, "SLURM_NTASKS_PER_NODE": "4"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "a", "RANK": "2", "GROUP_RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("variables", "by", "first"),
    [
        ({}, "LightningEnvironment", True),
        ({"LOCAL_RANK": "1"}, "LightningEnvironment", False),
        ({"NODE_RANK": "1"}, "LightningEnvironment", False),
        ({**BATCH, "SLURM_JOB_NAME": "sh"}, "LightningEnvironment", True),
        ({**PER_NODE, "SLURM_PROCID": "0"}, "SLURMEnvironment", True),
        ({**PER_NODE, "SLURM_PROCID": "3"}, "SLURMEnvironment", False),
        ({**TORCHRUN, "WORLD_SIZE": "4", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "TorchElasticEnvironment", False),
    ],
)
def test_who_started_the_processes_is_known_by_what_they_set(
    variables: dict[str, str], by: str, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert type(environment()).__name__ == by
    assert is_first() is first


def test_tasks_that_are_not_counted_by_node_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match="Use `--ntasks-per-node=4` instead"):
        environment()


def test_a_run_of_one_process_that_torchrun_starts_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**TORCHRUN, "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    check_started(2, 1)
    check_started("1", 2)  # a process on each of two machines
    with pytest.raises(OptionError, match="torchrun has started this command 2 times, but this run has one process"):
        check_started(1, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_a_process_whose_first_has_gone_while_it_imported_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    for first, ends in ((os.getpid(), False), (2**22 + 1, True)):  # no process has so high a number
        monkeypatch.setenv("_COTUNE_FIRST_PROCESS", str(first))
        if not (child := os.fork()):
            end_with_first()
            os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]) == ends
