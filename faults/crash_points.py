"""Every crash point, every time it is passed: the run dies there, and the same command again ends the same."""

from __future__ import annotations

from itertools import count

from crashes import POINTS, arm

from faults.kills import Reference, continuing_line, resumed_equal
from faults.nursery import fresh, last_line, run_to_end
from faults.small_run import Job
from faults.trials import Trial, Trials
from faults.units import counting, units


def every_crash_point(trials: Trials, job: Job, expected: Reference, *, most: int) -> None:
    """Each point at its first, second, third … passing, until a run passes it less often than that."""
    for point in POINTS:
        for k in count(1):
            passed = trials.run("crash points", f"{point}:{k}", lambda p=point, n=k: crash_trial(job, expected, p, n))
            if k >= most or passed.get("end"):
                break


def crash_trial(job: Job, expected: Reference, point: str, k: int) -> Trial:
    """A run that dies at the k-th passing of a point, and then is let end. `end`: it did not come to that."""
    fresh(job.folder)
    count_units = counting(job.folder / "units")

    def doomed() -> None:
        count_units()
        arm(point, k)

    first = run_to_end(job, doomed)
    if first.code == 0:
        return {"ok": True, "end": True, "kills": 0, "redone": 0, "silent": 0, "said": ""}
    if first.code != -9:
        return {"ok": False, "kills": 0, "redone": 0, "silent": 0, "said": last_line(first.text)}
    equal, second = resumed_equal(job, expected, arm=count_units)
    redone = units(job.folder / "units") - expected.units
    return {
        "ok": equal and redone.steps <= 1 and redone.waves <= 1,
        "kills": 1,
        "redone": redone.total,
        "silent": int(second.code == 0 and not equal),
        "said": continuing_line(second.text) if equal else last_line(second.text),
    }
