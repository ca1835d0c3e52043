"""Runner: a table's runs as processes of their own, some at a time, continued when they are killed."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from cotune.callbacks.progress import say
from cotune.callbacks.say_plan import format_duration
from cotune.datamodules import NoTracesError
from cotune.experiments.results import OUTCOME, calls_of, is_finished, read_outcome, read_result
from cotune.experiments.runs import Run, source_of, words_of
from cotune.experiments.slurm import own_store
from cotune.experiments.table_config import TableConfig
from cotune.storage.durable import write_whole

NO_TRACES = "no traces"
"""State of a run that could not go on, because no run of the program gave anything to train on: the paper's dash."""

_MAX_RESTARTS = 3
"""Restarts of a killed run that has saved nothing new since the one before."""

_POLL = 0.3
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


@dataclass
class _Process:
    """A run under way."""

    run: Run
    popen: subprocess.Popen[bytes]
    log: IO[bytes]
    began: float


@dataclass
class Runner:
    """Runs what of a table is not finished. What is finished is left as it is, and so is a run without traces.

    A run that was killed, by the kernel for its memory say, is started again and goes on from its last save; one that
    ends with an error is not, and the others go on. When this process ends, so do its runs (on Linux even if it is
    killed); the next start continues them.

    Args:
        folder: of the runs; beside them are `logs/`.
        jobs: runs at a time.
        environment: of the runs, beside this process's own.
        ended: called after each run that has ended.
        command: what `fit` and its options stand behind.
    """

    config: TableConfig
    folder: Path
    jobs: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    ended: Callable[[], None] = lambda: None
    command: Sequence[str] = (sys.executable, "-m", "cotune")

    def run(self, runs: Sequence[Run]) -> list[Run]:
        """Runs all that is left; returns those that did not come to their end."""
        waiting = [run for run in runs if not self._is_over(run)]
        total, failed, under_way, restarts = len(waiting), list[Run](), list[_Process](), dict[str, tuple[int, str]]()
        began = time.monotonic()
        try:
            while waiting or under_way:
                while (run := self._next(waiting, [process.run for process in under_way])) is not None:
                    waiting.remove(run)
                    if why := self._cannot_start(run):
                        self._put_outcome(run, "failed", why)
                        say(f"{run.name}: {why}")
                        failed.append(run)
                    else:
                        under_way.append(self._start(run))
                time.sleep(_POLL)
                for process in [p for p in under_way if p.popen.poll() is not None]:
                    under_way.remove(process)
                    process.log.close()
                    if self._is_to_start_again(process, restarts):
                        waiting.insert(0, process.run)
                        continue
                    if not is_finished(self.folder / process.run.name):
                        failed.append(process.run)
                    self._say_end(process, total - len(waiting) - len(under_way), total, time.monotonic() - began)
                    self.ended()
        finally:
            _end(under_way)
        return failed

    def run_here(self, run: Run, *, fit: Callable[[Sequence[str]], int], stored: bool = True) -> int:
        """One run in this process and its peers; returns the exit code.

        Args:
            fit: runs the words of a command line.
            stored: its LM keeps completions where it is told to: in a store of the run's own.
        """
        if why := self._cannot_start(run):
            self._put_outcome(run, "failed", why)
            say(f"{run.name}: {why}")
            return 1
        own = ["--model.lm.completions", str(own_store(self.folder / run.name))] if stored else []
        code = fit([*self._words(run), *own])
        if code == NoTracesError.exit_code:
            self._put_outcome(run, NO_TRACES, "there was nothing to train on")
        return code

    def _words(self, run: Run) -> list[str]:
        """The words behind `cotune` that make the run."""
        source = source_of(run, self.config)
        calls = 0 if source is None else calls_of(read_result(source, self.folder))
        (self.folder / run.name / OUTCOME).unlink(missing_ok=True)
        return words_of(run, self.config, self.folder, lm_calls=calls)

    def _is_over(self, run: Run) -> bool:
        own = self.folder / run.name
        return is_finished(own) or read_outcome(own).get("state") == NO_TRACES

    def _next(self, waiting: Sequence[Run], under_way: Sequence[Run]) -> Run | None:
        """The run to start now, if there is room for one; a control waits for the run that it equals.

        Runs that begin with the same step would answer the same calls side by side; one after the other, the second
        finds them answered. So within a seed one that begins otherwise is preferred.
        """
        if len(under_way) >= self.jobs:
            return None
        still_waiting = {run.name for run in waiting}
        ready = []
        for run in waiting:
            source = source_of(run, self.config)
            blocked = source is not None and not self._is_over(source) and self._will_run(source, still_waiting)
            if not blocked:
                ready.append(run)
        begun = {(run.cell, run.seed, run.steps[0]) for run in under_way}
        first = ready[0] if ready else None
        apart = (run for run in ready if first and run.seed == first.seed)
        return next((run for run in apart if (run.cell, run.seed, run.steps[0]) not in begun), first)

    def _will_run(self, source: Run, waiting: set[str]) -> bool:
        return source.name in waiting or not read_outcome(self.folder / source.name)

    def _cannot_start(self, run: Run) -> str:
        source = source_of(run, self.config)
        if source is not None and not is_finished(self.folder / source.name):
            return f"{source.name} did not come to its end, so its number of LM calls is not known"
        return ""

    def _start(self, run: Run) -> _Process:
        words = self._words(run)
        log_path = self.folder / "logs" / f"{run.name}.txt"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log = log_path.open("ab")
        log.write(f"$ cotune {' '.join(words)}\n".encode())
        log.flush()
        say(f"{run.name}: started; {log_path}")
        popen = subprocess.Popen(
            [*self.command, *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **self.environment},
            start_new_session=True,  # Ctrl-C is for this process, which passes it on once
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        return _Process(run, popen, log, time.monotonic())

    def _is_to_start_again(self, process: _Process, restarts: dict[str, tuple[int, str]]) -> bool:
        """Whether a run has ended by a kill, and is to go on; otherwise how it ended is written down."""
        code, run = process.popen.returncode, process.run
        if is_finished(self.folder / run.name):
            return False
        if code >= 0 and code not in _STOPPED:
            message = _last_error(self.folder / "logs" / f"{run.name}.txt") or f"it ended with exit code {code}"
            state = NO_TRACES if code == NoTracesError.exit_code else "failed"
            self._put_outcome(run, state, message)
            return False
        saved = _progress(self.folder / run.name)
        count, before = restarts.get(run.name, (0, ""))
        count = count + 1 if saved == before else 1
        restarts[run.name] = (count, saved)
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if count > _MAX_RESTARTS:
            self._put_outcome(run, "failed", f"it was killed ({how}) {count} times without saving anything new")
            return False
        say(f"{run.name}: killed ({how}); it resumes from its last checkpoint")
        return True

    def _put_outcome(self, run: Run, state: str, message: str) -> None:
        text = json.dumps({"state": state, "message": message}, ensure_ascii=False, indent=1)
        write_whole(self.folder / run.name / OUTCOME, text + "\n")

    def _say_end(self, process: _Process, done: int, total: int, elapsed: float) -> None:
        own = self.folder / process.run.name
        took = format_duration(time.monotonic() - process.began)
        outcome = read_outcome(own)
        said = f"{outcome['state']}: {outcome['message']}" if outcome else "finished"
        left = f"; about {format_duration(elapsed / done * (total - done))} left" if done < total else ""
        say(f"[{done}/{total}] {process.run.name}: {said} ({took}){left}")


def _end(under_way: Sequence[_Process]) -> None:
    """Asks runs to end, which they do with all saved, and waits for them."""
    for process in under_way:
        process.popen.terminate()
    for process in under_way:
        with suppress(subprocess.TimeoutExpired):
            process.popen.wait(timeout=120)
        if process.popen.poll() is None:
            process.popen.kill()
        process.log.close()


def _end_with_parent() -> None:
    """Linux: this process gets SIGTERM when the one that started it ends, however that happens."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _progress(own: Path) -> str:
    """A text that changes whenever a run has saved something."""
    found = [own / "history.jsonl", *sorted((own / "checkpoints").glob("*"))]
    store = own.parent / "completions.sqlite-wal"
    return "|".join(f"{p.name}:{p.stat().st_mtime_ns}:{p.stat().st_size}" for p in [*found, store] if p.is_file())


def _last_error(log: Path) -> str:
    """The message that a run ended with."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    started = max((n for n, line in enumerate(lines) if line.startswith("$ cotune ")), default=0)
    told = [line.removeprefix("cotune: error: ") for line in lines[started:] if line.startswith("cotune: error: ")]
    filled = [line for line in lines[started + 1 :] if line.strip()]
    traced = max((n for n, line in enumerate(filled) if line.startswith("Traceback (")), default=None)
    if traced is not None and not told:  # the error stands behind the indented frames, and can have lines of hints
        filled = [line for line in filled[traced + 1 :] if not line.startswith(" ")][:1] or filled
    return told[-1] if told else filled[-1] if filled else ""
