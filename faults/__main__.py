"""`make faults`: runs the fault suite, keeps each finished trial, and writes docs/FAULTS.md from them.

Stop it whenever you like; the same command goes on. `make faults FAULTS="--only kills,disk --scale 0.05"` runs some of
its parts, and a twentieth of their trials.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch is imported anywhere: children are forked, and a forked pool of threads has no threads.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

ROOT = Path(__file__).resolve().parents[1]


def parser() -> argparse.ArgumentParser:
    """The suite's options."""
    made = argparse.ArgumentParser("faults", description=__doc__)
    made.add_argument("--only", default="", metavar="PART,…", help=f"of {', '.join(PARTS)}; all without it")
    made.add_argument("--scale", type=float, default=1.0, help="share of the trials, e.g. 0.05 for a look")
    made.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "faults.json")
    made.add_argument("--report", type=Path, default=ROOT / "docs" / "FAULTS.md")
    made.add_argument("--work", type=Path, default=ROOT / ".faults", help="where the runs are; emptied")
    made.add_argument("--fresh", action="store_true", help="forget the results of the parts that are run")
    return made


def main() -> int:
    """Runs the chosen parts; 1 if a trial failed."""
    options = parser().parse_args()
    chosen = options.only.split(",") if options.only else list(PARTS)
    for part in chosen:
        if part not in PARTS:
            print(f'faults: error: --only "{part}"; parts are {", ".join(PARTS)}.', file=sys.stderr)
            return 2
    from faults.suite import Suite

    suite = Suite(options.results, options.work.resolve(), scale=options.scale, fresh=options.fresh)
    for part in chosen:
        print(f"\n== {part}", flush=True)
        PARTS[part](suite)
    from faults.report import write_report

    write_report(suite.trials, options.report)
    failed = list(suite.trials.failures())
    print(f"\n{len(failed)} trials failed; {options.report}")
    return int(bool(failed))


def _part(name: str) -> Callable[[Any], None]:
    return lambda suite: getattr(suite, name)()


PARTS: dict[str, Callable[[Any], None]] = {
    name: _part(name)
    for name in (
        "kills", "kills_shapes", "kills_embedded", "crash_points", "stops", "two_runs", "corruption", "disk",
        "numerics", "memory", "processes", "canary", "inputs",
    )
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
