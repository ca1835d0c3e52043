"""The nursery: a process that has imported everything, and forks a child for each run, which saves ten seconds a trial.

The child is a process like any other: it has its own session, its output goes to a file, it holds no descriptor of the
nursery's but that file, and it is the child that is killed. What it does not do again is import; a kill during imports
finds no state of a run.
"""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

from faults.small_run import Job

_PHASES = (
    ("export", ("in export_program",)),
    ("test", ("in _run_test", "in test_step", "in after_fit")),
    ("checkpoint", ("in _save\n", "in save_checkpoint")),
    ("boundary", ("in _arrive", "in on_boundary")),
    ("val in a weight step", ("in validation_step",)),
    ("collection", ("in collect\n", "in _collect", "in save_traces")),
    ("prompt search", ("in _prompt_step",)),
    ("val at a boundary", ("in _score",)),
    ("weight step", ("in fit_loop", "training_epoch_loop.py", "in on_train_")),
    ("start", ("in ",)),
)
PHASES = tuple(name for name, _ in _PHASES)
"""Where a run may be when it is stopped; decided by the functions on its stack."""


class StuckError(RuntimeError):
    """A run did not end in the time it may take."""


@dataclass
class Child:
    """A run under way, or behind."""

    pid: int
    job: Job
    log: Path
    started: float
    status: int | None = None

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def code(self) -> int | None:
        """Exit code, minus the signal for one that killed it; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def wait(self, seconds: float = 300.0) -> int:
        """Its exit code.

        Raises:
            StuckError: it has not ended in that time; it is killed.
        """
        deadline = time.monotonic() + seconds
        while (code := self.code) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise StuckError(f"no end after {seconds:g} s:\n{self.text[-2000:]}")
            time.sleep(0.002)
        return code

    def wait_until(self, moment: float) -> bool:
        """Sleeps until so many seconds after the start; False if it has ended by then."""
        while self.code is None and (left := self.started + moment - time.monotonic()) > 0:
            time.sleep(min(left, 0.02))
        return self.code is None

    def phase(self) -> str:
        """Where the run is, by the stack that it writes when it is asked, between two bytecodes."""
        dump = self.job.folder / "stack.txt"
        size = dump.stat().st_size
        os.kill(self.pid, signal.SIGUSR1)
        deadline = time.monotonic() + 1.0
        while dump.stat().st_size == size and time.monotonic() < deadline and self.code is None:
            time.sleep(0.0005)
        with dump.open() as file:
            file.seek(size)
            stack = file.read()
        return next((name for name, marks in _PHASES if any(mark in stack for mark in marks)), "start")

    def kill(self) -> None:
        """SIGKILL, to the child and whatever it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(10)


def imported() -> None:
    """Imports what a run imports, once, and keeps the collector from touching it: children share the pages."""
    for name in (
        "torch",
        "torch._dynamo",
        "cotune.fit.cli",
        "cotune.commands.predict",
        "cotune.reporting.closing_table",
        "datasets",
        "peft",
    ):
        import_module(name)
    for name in ("bm25s", "tiny_fit", "transformers.models.llama.modeling_llama"):
        import_module(name)
    import_module("cotune.fit.guard").quiet()
    _parse_once()
    gc.freeze()


def fork(job: Job, arm: Callable[[], None] | None = None, *, stopped: bool = False) -> Child:
    """Starts `cotune` with the job's words in a child.

    Args:
        arm: called in the child before anything else.
        stopped: the child waits for SIGCONT before it begins, so that it can be traced from its first call on.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "stack.txt").write_text("")
    log = job.folder / f"log-{len(list(job.folder.glob('log-*.txt')))}.txt"
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # until the child knows what to do with it
    pid = os.fork()
    if pid == 0:
        _run(job, log, arm, stopped)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    with suppress(OSError):  # the child was faster, or is gone
        os.setpgid(pid, pid)  # here too, so that a kill right away finds the group
    if stopped:
        os.waitpid(pid, os.WUNTRACED)
    return Child(pid, job, log, time.monotonic())


def in_child(work: Callable[[], Any]) -> Any:
    """The result of `work`, which must fit JSON, from a child: the nursery itself stays without threads.

    Raises:
        RuntimeError: the child raised, or ended without a result.
    """
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log.txt")
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _redirect(log)
                result.write_text(json.dumps(work()))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                _flush()
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        if status != 0:
            raise RuntimeError(f"the child ended with {status}: {log.read_text(errors='replace')[-2000:]}")
        return json.loads(result.read_text())


def run_to_end(job: Job, arm: Callable[[], None] | None = None, *, seconds: float = 300.0) -> Child:
    """A child's whole life."""
    child = fork(job, arm)
    child.wait(seconds)
    return child


def fresh(folder: Path) -> Path:
    """The folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def last_line(text: str) -> str:
    """What a run said last: its message, if it ended badly."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("cotune:")]
    return (said or lines or [""])[-1]


def start_process(job: Job, before: Sequence[str] = ()) -> subprocess.Popen[str]:
    """The same as a process of its own, imports included, as a user starts it."""
    tests = str(Path(__file__).resolve().parents[1] / "tests")
    environment = {**os.environ, **job.environment, "PYTHONPATH": os.pathsep.join([str(job.folder), tests])}
    with (job.folder / "log.txt").open("w") as log:
        return subprocess.Popen(
            [*before, sys.executable, "-m", "cotune", *job.words],
            cwd=job.folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )


def _parse_once() -> None:
    """Fills the parser's caches, which is half of a small run's time."""
    from commands import ROOT

    from cotune.__main__ import main

    with suppress(SystemExit), redirect_stdout(io.StringIO()):
        main(["fit", "--config", str(ROOT / "configs" / "iris.yaml"), "--print_config"])


def _run(job: Job, log: Path, arm: Callable[[], None] | None, stopped: bool) -> None:
    """The child: never returns."""
    code = 70
    try:
        os.setpgid(0, 0)
        os.chdir(job.folder)
        os.environ.update(job.environment)
        _redirect(log)
        _answer_with_stack(job.folder / "stack.txt")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        sys.argv = ["cotune", *job.words]
        sys.path.insert(0, str(job.folder))
        if stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        if arm is not None:
            arm()
        from cotune.__main__ import main

        code = main(list(job.words))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        _flush()
        os._exit(code)


def _answer_with_stack(dump: Path) -> None:
    """Has SIGUSR1 write the stack, whoever puts back the handler that he found: Lightning does, for all signals.

    Not by faulthandler, which reads the stack at any instruction, and now and then one that is half made.
    """
    file, set_handler = os.open(dump, os.O_WRONLY | os.O_APPEND), signal.signal

    def answer(number: int, frame: FrameType | None) -> None:
        os.write(file, "".join(f"{one.f_code.co_filename} in {one.f_code.co_name}\n" for one in _above(frame)).encode())

    def others(number: int, handler: Any) -> Any:
        return None if number == signal.SIGUSR1 else set_handler(number, handler)

    signal.signal(signal.SIGUSR1, answer)
    signal.signal = others  # type: ignore[assignment]
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def _above(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _redirect(log: Path) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    # New objects: the nursery may have been started with its output captured.
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
