"""cotune table: tasks, LMs, presets, strategies and seeds as one table with error bars, beside the paper's numbers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        "cotune table",
        allow_abbrev=False,
        description="Runs a table: strategies on tasks, LMs, presets and seeds, each run in its own process. Steps "
        "that strategies share run once. It first prints the estimated cost, and writes table.md, table.json and "
        "table.svg into its folder after each run. A stopped table resumes where it stopped.",
    )
    made.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        required=True,
        help="a file, or a shipped table's name, e.g. iris",
    )
    made.add_argument("--folder", help="of the table and its runs (default: tables/<name>)")
    made.add_argument("--jobs", type=int, default=1, help="runs at the same time; they share the cores (default: 1)")
    made.add_argument("--dry-run", action="store_true", help="print the estimated cost and stop")
    made.add_argument("--no-warm-up", action="store_true", help="do not measure the speed for the time estimate")
    made.add_argument("--retry", action="store_true", help="also repeat runs that had no traces to train on")
    made.add_argument(
        "--keep-checkpoints", action="store_true", help="also keep the checkpoints of finished runs, which are large"
    )
    made.add_argument("--submit", choices=["slurm"], help="submit the remaining runs as an array job, one task per run")
    made.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="option of sbatch, e.g. --sbatch=--gres=gpu:1"
    )
    made.add_argument("--run", metavar="NAME", help="run only this run, in this process, as a task of the array does")
    many: dict[str, Any] = {"action": "append", "default": [], "metavar": "NAME"}
    for what in ("task", "lm", "preset"):
        made.add_argument(f"--{what}", **many, help=f"only this {what} of the table; may be repeated")
    made.add_argument("--strategy", **many, help='only this strategy, any of p, w, d, k and g; e.g. "p -> w"')
    made.add_argument("--seed", action="append", default=[], type=int, metavar="N", help="only this seed")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="[TASK:]OPTION=VALUE",
        help="an option of cotune fit for all runs, or for one task, e.g. gsm8k:data.path=data/gsm8k",
    )
    return made


def main(options: argparse.Namespace) -> int:
    """Runs the command; 1 if a run did not come to its end for another reason than a lack of traces.

    Raises:
        TableError: the config or an option is wrong, or the folder holds another table's runs.
    """
    import signal
    import sys

    from cotune.experiments.command import TableCommand
    from cotune.experiments.table_config import TableError, read_table
    from cotune.fit.cli import run
    from cotune.fit.parts import parts_of
    from cotune.shipped import resolved

    if options.jobs < 1:
        raise TableError(f"--jobs {options.jobs} is below 1.")
    for name in ("dry_run", "submit", "retry"):
        if options.run and getattr(options, name):
            option = f"--{name.replace('_', '-')}"
            raise TableError(
                f'{option} is of a whole table, and --run "{options.run}" makes one run at once; leave one of them out.'
            )
    whole = read_table(Path(resolved(options.config, within="table/"))).with_options(options.set)
    config = whole.only(
        tasks=options.task,
        lms=options.lm,
        presets=options.preset,
        strategies=options.strategy,
        seeds=options.seed,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs are asked to end, and waited for
    folder = Path(options.folder or Path("tables") / config.name)
    command = TableCommand(config, folder, options, parts_of=parts_of, fit=run, whole=whole)
    return command.run_one(options.run) if options.run else command.make()
