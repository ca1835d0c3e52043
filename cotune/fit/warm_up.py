"""The pace of a fit, measured and written to a file: `python -m cotune.fit.warm_up OUT fit ...`."""

from __future__ import annotations

import sys
from pathlib import Path

from cotune.experiments.warm_up import measure
from cotune.fit.guard import guarded
from cotune.fit.parts import parts_of


def main() -> int:
    """Runs a few rollouts and a training step of the command line; returns an exit code."""
    out, *words = sys.argv[1:]

    def run() -> int:
        Path(out).write_text(measure(parts_of(words)).write(), encoding="utf-8")
        return 0

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
