"""Runs as processes: their order, what is started again, and how each end is written down. The processes are fakes."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from cotune.experiments.results import read_outcome
from cotune.experiments.runner import NO_TRACES, Runner
from cotune.experiments.runs import Run, runs_of
from waiting import until
from written_table import config

from cotune.commands.table import parser

# Writes its start into a log, then does what the file named after its run says, a line a start.
FAKE = """
import hashlib, json, os, signal, sys, time
from pathlib import Path
words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
own = Path(words["--runs_dir"], words["--name"])
own.mkdir(parents=True, exist_ok=True)
log = own.parent.parent / "starts.jsonl"
with log.open("a") as file:
    file.write(json.dumps([own.name, words.get("--alternate.lm_calls"), os.environ.get("OMP_NUM_THREADS")]) + "\\n")
plan = own.parent.parent / f"{own.name}.plan"
todo = plan.read_text().splitlines() if plan.exists() else []
now, rest = (todo or ["finish"])[0], todo[1:]
plan.write_text("\\n".join(rest))
if now.startswith("kill"):
    if now == "kill, saved":
        (own / "history.jsonl").write_text("x" * len(rest))
    os.kill(os.getpid(), signal.SIGKILL)
if now.startswith("error"):
    print("some words")
    print("cotune: error: " + now.partition(": ")[2])
    sys.exit(3 if now.startswith("error 3") else 2)
if now == "raise":
    raise RuntimeError("a tensor is odd\\nConsider another one.")
if now == "sleep":
    time.sleep(60)
record = {"index": 0, "lm_calls": 7, "seconds": 1, "val_score": 0.5, "prefix": "vanilla"}
files = {
    "history.jsonl": "\\n".join(json.dumps({**record, "index": i}) for i in range(4)) + "\\n",
    "summary.json": json.dumps({"test_score": 0.5}),
}
sums = [f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\\n" for name, text in files.items()]
(own / "SHA256SUMS").write_text("".join(sums))
for name, text in files.items():
    (own / name).write_text(text)
"""


class Fakes:
    """A runner of fake processes in a folder, and what they were started with."""

    def __init__(self, folder: Path, **changes: object) -> None:
        self.folder = folder
        (folder / "fake.py").write_text(FAKE)
        self.config = config(folder, **{"strategies": ["p -> p", "p -> w -> p"], "seeds": [0], **changes})
        self.runs = runs_of(self.config)

    def plan(self, run: Run, *steps: str) -> None:
        (self.folder / f"{run.name}.plan").write_text("\n".join(steps))

    def run(self, *, jobs: int = 1) -> list[Run]:
        command = (sys.executable, str(self.folder / "fake.py"))
        return Runner(self.config, self.folder / "runs", jobs=jobs, command=command).run(self.runs)

    @property
    def starts(self) -> list[tuple[str, str | None]]:
        path = self.folder / "starts.jsonl"
        return [tuple(json.loads(line)[:2]) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(tmp_path)


def test_the_control_is_started_after_the_run_that_it_equals_and_told_its_calls(fakes: Fakes) -> None:
    assert fakes.run() == []
    pwp, pp, equal = fakes.runs
    assert fakes.starts == [(pwp.name, None), (pp.name, None), (equal.name, "28")]


def test_several_at_a_time_keep_that_order(fakes: Fakes) -> None:
    assert fakes.run(jobs=3) == []
    assert {name for name, _ in fakes.starts[:2]} == {run.name for run in fakes.runs[:2]}
    assert fakes.starts[2] == (fakes.runs[2].name, "28")


def test_runs_that_begin_with_the_same_step_do_not_start_together(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path, strategies=["p -> p", "p -> w -> p", "w -> w"], seeds=[0, 1])
    assert fakes.run(jobs=2) == []
    begins = [run.steps[0] for name, _ in fakes.starts[:2] for run in fakes.runs if run.name == name]
    assert sorted(begins) == ["p", "w"]


def test_what_is_finished_is_not_run_again(fakes: Fakes) -> None:
    fakes.run()
    before = fakes.starts
    assert fakes.run() == []
    assert fakes.starts == before


def test_a_killed_run_goes_on_until_it_is_finished(fakes: Fakes) -> None:
    fakes.plan(fakes.runs[1], *["kill, saved"] * 6)
    assert fakes.run() == []
    assert [name for name, _ in fakes.starts].count(fakes.runs[1].name) == 7


def test_a_run_that_is_killed_over_and_over_without_saving_is_given_up_and_the_others_go_on(fakes: Fakes) -> None:
    fakes.plan(fakes.runs[1], *["kill"] * 9)
    assert fakes.run() == [fakes.runs[1]]
    outcome = read_outcome(fakes.folder / "runs" / fakes.runs[1].name)
    assert outcome["state"] == "failed"
    assert "killed (signal 9) 4 times" in outcome["message"]
    assert fakes.starts[-1][0] == fakes.runs[2].name


def test_an_error_is_written_down_and_tried_again_at_the_next_start(fakes: Fakes) -> None:
    fakes.plan(fakes.runs[1], "error: the disk is full.")
    assert fakes.run() == [fakes.runs[1]]
    own = fakes.folder / "runs" / fakes.runs[1].name
    assert read_outcome(own) == {"state": "failed", "message": "the disk is full."}
    assert fakes.run() == []
    assert read_outcome(own) == {}


def test_a_traceback_is_written_down_by_the_line_of_its_error_and_not_by_the_hints_behind_it(fakes: Fakes) -> None:
    fakes.plan(fakes.runs[1], "raise")
    assert fakes.run() == [fakes.runs[1]]
    assert read_outcome(fakes.folder / "runs" / fakes.runs[1].name)["message"] == "RuntimeError: a tensor is odd"


def test_a_run_without_traces_is_a_dash_for_good_and_so_is_what_should_equal_it(fakes: Fakes) -> None:
    fakes.plan(fakes.runs[0], "error 3: there is nothing to train on.")
    assert fakes.run() == [fakes.runs[0], fakes.runs[2]]
    assert read_outcome(fakes.folder / "runs" / fakes.runs[0].name)["state"] == NO_TRACES
    assert "did not come to its end" in read_outcome(fakes.folder / "runs" / fakes.runs[2].name)["message"]
    before = len(fakes.starts)
    assert fakes.run() == [fakes.runs[2]]
    assert len(fakes.starts) == before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with the one that started it")
def test_runs_end_with_the_table_even_if_that_is_killed(fakes: Fakes) -> None:
    fakes.plan(fakes.runs[0], "sleep")
    table = os.fork()
    if table == 0:
        try:
            fakes.run()
        finally:
            os._exit(1)
    until(lambda: bool(fakes.starts))
    (child,) = children(table)
    os.kill(table, signal.SIGKILL)
    os.waitpid(table, 0)
    until(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text())


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_command_answers_help_and_needs_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args([])
    options = parser().parse_args(["--config", "t.yaml", "--seed", "1", "--seed", "2", "--set", "a=b"])
    assert (options.seed, options.set, options.jobs) == ([1, 2], ["a=b"], 1)
    assert "--config" in capsys.readouterr().err
