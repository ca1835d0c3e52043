"""Two runs in one directory: one proceeds and ends as if it were alone, the other says why it does not."""

from __future__ import annotations

import random

from faults.kills import Reference
from faults.nursery import fork, fresh, last_line
from faults.small_run import Job, outcome
from faults.trials import Trial


def two_runs_trial(job: Job, expected: Reference, *, seed: str) -> Trial:
    """The same command twice: at once, or the second at a random moment of the first."""
    rng = random.Random(seed)
    fresh(job.folder)
    first = fork(job)
    first.wait_until(0.0 if rng.random() < 0.3 else rng.uniform(0, 0.8 * expected.seconds))
    other = Job(job.words, job.folder.with_name(job.folder.name + "-second"))
    fresh(other.folder)
    second = fork(other)
    codes = (first.wait(), second.wait())
    refused = second if codes[0] == 0 else first
    equal = outcome(job.run) == expected.result
    # On a busy machine one may have ended before the other begins, which then finds a finished run.
    late = next((run for run in (first, second) if "is finished" in run.text), None)
    said = last_line(refused.text) if late is None else "the run is finished"
    one_of_both = sorted(codes) == [0, 2] and "in use" in said and "Traceback" not in refused.text
    return {
        "ok": equal and (one_of_both or (late is not None and codes == (0, 0))),
        "exit codes": codes,
        "redone": 0,
        "silent": int(0 in codes and not equal) or int(codes == (0, 0) and late is None),
        "said": said,
    }
