"""SIGKILL at random times in every phase: the same command again until it ends, and it must end the same."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.nursery import PHASES, Child, fork, fresh, last_line, run_to_end
from faults.small_run import Job, outcome
from faults.trials import Trial
from faults.units import Units, counting, units


@dataclass(frozen=True)
class Reference:
    """A run that nobody disturbed.

    Attributes:
        result: see `outcome`.
        units: it took.
        seconds: it took.
        timeline: phase -> moments, in seconds from the start, at which a run was found there.
    """

    result: Mapping[str, Any]
    units: Units
    seconds: float
    timeline: Mapping[str, Sequence[float]]


def reference(job: Job) -> Reference:
    """Runs the job to its end once for the result and once more for the timeline.

    Raises:
        RuntimeError: it does not end well, or two runs do not come to the same.
    """
    results, timeline = [], defaultdict[str, list[float]](list)
    for watched in (False, True):
        fresh(job.folder)
        child = fork(job, counting(job.folder / "units"))
        while watched and child.wait_until(time.monotonic() - child.started + 0.02):
            moment = time.monotonic() - child.started
            timeline[child.phase()].append(moment)
        if child.wait(600) != 0:
            raise RuntimeError(f"the undisturbed run ended with {child.code}:\n{child.text[-3000:]}")
        results.append((outcome(job.run), units(job.folder / "units"), time.monotonic() - child.started))
    if results[0][:2] != results[1][:2]:
        raise RuntimeError(f"two undisturbed runs differ: {results}")
    return Reference(*results[0], timeline)


def kill_trial(
    job: Job, expected: Reference, *, seed: str, kills: int = 1, stored: bool = True, each_step: bool = True
) -> Trial:
    """A run killed so many times, and then let end.

    Args:
        job: the run.
        expected: the same, undisturbed.
        seed: of the moments.
        kills: how many.
        stored: completions are kept, so that few are generated again.
        each_step: it saves behind each optimiser step, so that few are done again; by time there is no such bound.
    """
    bounds = _Bounds(stored, each_step)
    rng = random.Random(seed)
    fresh(job.folder)
    count = counting(job.folder / "units")
    phases: list[str] = []
    moment = _moment(expected, rng)
    for _ in range(20 * kills):
        if len(phases) == kills:
            break
        child = fork(job, count)
        if child.wait_until(moment):
            phases.append(child.phase())
            time.sleep(rng.uniform(0, 0.02))  # it answers between two bytecodes, and is to be killed anywhere
            child.kill()
        elif child.wait() != 0:
            return _judged(job, expected, child, phases, bounds)
        else:
            fresh(job.folder)  # it was faster this time; a kill after the end would show nothing
            phases = []
        moment = _moment(expected, rng) * rng.random()  # a run that is continued gets everywhere sooner
    return _judged(job, expected, run_to_end(job, count, seconds=600), phases, bounds)


def _moment(expected: Reference, rng: random.Random) -> float:
    """Seconds after the start: in each phase equally often, however short it is."""
    wanted = rng.choice([phase for phase in PHASES if expected.timeline.get(phase)])
    return max(0.0, rng.choice(expected.timeline[wanted]) + rng.uniform(-0.02, 0.02))


@dataclass(frozen=True)
class _Bounds:
    """Which units may be done again once a kill at most; see `kill_trial`."""

    waves: bool
    steps: bool


def _judged(job: Job, expected: Reference, child: Child, phases: Sequence[str], bounds: _Bounds) -> Trial:
    ended = child.code == 0
    equal = ended and outcome(job.run) == expected.result
    done = units(job.folder / "units")
    redone = done - expected.units
    return {
        # The wave under way, and one step: that under way, or an epoch's last, behind which nothing can be saved.
        "ok": bool(
            equal
            and (not bounds.steps or redone.steps <= len(phases))
            and (not bounds.waves or redone.waves <= len(phases))
        ),
        "equal": bool(equal),
        "kills": len(phases),
        "phases": list(phases),
        "redone": redone.total,
        "waves redone": redone.waves,
        "steps redone": redone.steps,
        "silent": int(ended and not equal),
        "said": last_line(child.text) if not ended else continuing_line(child.text),
    }


def continuing_line(text: str) -> str:
    """What a continued run says about it."""
    return next((line for line in reversed(text.splitlines()) if "ontinu" in line or "goes on" in line), "")


def resumed_equal(job: Job, expected: Reference, *, arm: Callable[[], None] | None = None) -> tuple[bool, Child]:
    """The same command again: whether it ends, and as the undisturbed run did."""
    child = run_to_end(job, arm, seconds=600)
    return child.code == 0 and outcome(job.run) == expected.result, child


def work(folder: Path, name: str) -> Path:
    """One folder for all trials of a kind: paths stand in messages and in strace's filter."""
    return folder / name
