"""cotune report: a run as one self-contained HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        "cotune report",
        allow_abbrev=False,
        description="Writes a run as one HTML file that needs no network: scores by prefix, prompts before and after, "
        "candidates, examples won and lost with their traces, training curves, cost, settings. It also works while a "
        "run is in progress.",
    )
    made.add_argument("run", metavar="RUN_FOLDER", help="a run's folder, e.g. runs/iris")
    made.add_argument("--out", metavar="FILE", help="where to write (default: RUN_FOLDER/report.html)")
    made.add_argument(
        "--examples",
        type=int,
        default=60,
        help="show at most this many examples of a group with their traces (default: 60)",
    )
    return made


def main(options: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ReportError: the folder is no run, or it has nothing to show yet.
    """
    from cotune.reporting.page import render_report
    from cotune.reporting.run_record import ReportError, read_run
    from cotune.storage.durable import write_whole

    if options.examples < 0:
        raise ReportError(f"--examples {options.examples} is below 0.")
    run = read_run(Path(options.run))
    out = Path(options.out) if options.out else run.folder / "report.html"
    if out.is_dir():
        raise ReportError(f'"{out}" is a folder; give --out a file, e.g. --out {out / "report.html"}.')
    page = render_report(run, examples=options.examples)
    write_whole(out, page)
    print(f"{out} ({len(page.encode()) / 1000:,.0f} kB)")
    for line in run.missing:
        print(f"note: {line}")
    return 0
