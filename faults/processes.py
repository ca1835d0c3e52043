"""Runs of several processes: one of them, or all, killed at random times, and continued by another number."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from faults.kills import Reference
from faults.nursery import fresh, last_line, start_process
from faults.small_run import Job, outcome
from faults.trials import Trial

WORLDS = (1, 2, 4)
PATIENCE = 60.0
"""Seconds that the processes left behind by a kill may take to notice it."""


def processes_trial(job: Job, expected: Reference, *, seed: str, kills: int = 2) -> Trial:
    """A run that is killed so many times: its first process, one of the others, or all of them; each time another
    number of processes goes on. The result must be that of one process."""
    rng = random.Random(seed)
    fresh(job.folder)
    done: list[str] = []
    lingered, seconds = 0.0, 30.0
    for _ in range(kills):
        world = rng.choice(WORLDS)
        process = _started(job, world)
        began = time.monotonic()
        with suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(5.0, seconds))
        if process.poll() is not None:
            done.append(f"{world}: ended by itself with {process.returncode}")
            break
        whom = rng.choice(("first", "other", "all"))
        others = _others(process)
        victims = others[:1] if whom == "other" and others else [process.pid, *(others if whom == "all" else [])]
        for victim in victims:
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        done.append(f"{world}: {whom} after {time.monotonic() - began:.0f} s")
        lingered = max(lingered, _gone(process))
    world = rng.choice(WORLDS)
    code = _started(job, world).wait(600)
    said = last_line((job.folder / "log.txt").read_text(errors="replace"))
    finished = code == 0 and "is finished" in (job.folder / "log.txt").read_text(errors="replace")
    equal = code == 0 and outcome(job.run) == expected.result
    return {
        "ok": equal and lingered < PATIENCE,
        "kills": len(done),
        "phases": [*done, f"{world}: to the end"],
        "finished before": finished,
        "seconds that others lingered": round(lingered, 1),
        "redone": 0,
        "silent": int(code == 0 and not equal),
        "said": "" if code == 0 else said,
    }


def _started(job: Job, world: int) -> subprocess.Popen[str]:
    words = ("--trainer.devices", str(world), *(("--trainer.strategy", "ddp") if world > 1 else ()))
    return start_process(Job((*job.words, *words), job.folder, job.environment))


def _others(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the session's other processes that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if int(session) == process.pid and int(path.parent.name) != process.pid and state != "Z":
                found.append(int(path.parent.name))
    return sorted(found)


def _gone(process: subprocess.Popen[str]) -> float:
    """Seconds until all of the session are gone; those that stay are killed."""
    began = time.monotonic()
    while process.poll() is None or _others(process):
        if time.monotonic() - began > PATIENCE:
            for pid in [process.pid, *_others(process)]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.2)
    return time.monotonic() - began
