"""SIGTERM and Ctrl-C, once and twice, at random times: how long it takes, what it says, and what it costs."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress

from faults.kills import Reference, resumed_equal
from faults.nursery import fork, fresh, last_line
from faults.small_run import Job
from faults.trials import Trial
from faults.units import counting, units

KINDS = {
    "SIGTERM": (signal.SIGTERM,),
    "Ctrl-C": (signal.SIGINT,),
    "SIGTERM twice": (signal.SIGTERM, signal.SIGTERM),
    "Ctrl-C twice": (signal.SIGINT, signal.SIGINT),
}
_CODES = {signal.SIGTERM: (143, -15), signal.SIGINT: (130, -2)}


def stop_trial(job: Job, expected: Reference, *, kind: str, seed: str) -> Trial:
    """A run that is asked to stop at a random moment, and then continued."""
    rng = random.Random(seed)
    arm = counting(job.folder / "units")
    for _ in range(20):
        fresh(job.folder)
        child = fork(job, arm)
        if not child.wait_until(rng.uniform(0, expected.seconds)):
            continue  # it was faster this time
        phase, signals, asked = child.phase(), KINDS[kind], time.monotonic()
        with suppress(ProcessLookupError):  # it has just ended, by itself or after the first signal
            for number in signals:
                os.kill(child.pid, number)
                time.sleep(0.01 if len(signals) > 1 else 0)
        code, seconds = child.wait(60), time.monotonic() - asked
        if code == 0:
            continue  # it was at its very end
        said = last_line(child.text)
        equal, second = resumed_equal(job, expected, arm=arm)
        redone = units(job.folder / "units") - expected.units
        clean = "Traceback" not in child.text
        # One signal waits for the unit under way; two are as a kill, behind an epoch's last step too.
        within = max(redone.waves, redone.steps) <= len(signals) - 1
        return {
            "ok": equal and clean and code in _CODES[signals[0]] and within,
            "phases": [phase],
            "exit code": code,
            "seconds to exit": round(seconds, 3),
            "redone": redone.total,
            "silent": int(second.code == 0 and not equal),
            "said": said if clean else child.text[-500:],
        }
    return {"ok": False, "redone": 0, "silent": 0, "said": "the run always ended before the signal came"}
