"""The command's course: parse every cell, say what is left to run and its cost, run it, write the page."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cotune.callbacks.progress import say
from cotune.callbacks.say_plan import format_duration
from cotune.experiments.content import ContentNow
from cotune.experiments.cost import Cost, Pace, cost_of, measured, totals, warm_up
from cotune.experiments.page import markdown, table_record
from cotune.experiments.parts import Parts
from cotune.experiments.results import OUTCOME, RunResult, is_finished, read_outcome, read_result
from cotune.experiments.runner import NO_TRACES, Runner
from cotune.experiments.runs import ALTERNATION, Cell, Run, cells_of, joined, needed, runs_of, shown
from cotune.experiments.slurm import merge_stores, own_store, submit, under_way
from cotune.experiments.table_config import TableConfig, TableError
from cotune.lightning_modules import LanguageModel
from cotune.lightning_modules.model_source import EMBEDDED
from cotune.reporting.plots import table_plot
from cotune.storage.durable import write_whole
from cotune.storage.run_folder import RunFolder
from cotune.storage.run_identity import RunIdentity, changed_content, changed_options, read_identity


class TableCommand:
    """One start of a table: its cost, its runs, its page.

    Args:
        parts_of: words of a command line -> what it describes.
        fit: runs such words, and gives the exit code.
        whole: the table that `config` is a part of; the page is of it.
    """

    def __init__(
        self,
        config: TableConfig,
        folder: Path,
        options: argparse.Namespace,
        *,
        parts_of: Callable[[Sequence[str]], Parts],
        fit: Callable[[Sequence[str]], int],
        whole: TableConfig | None = None,
    ) -> None:
        self.config, self.folder, self.options, self._parts_of, self._fit = config, folder, options, parts_of, fit
        self.whole = joined(whole or config, config)
        self.runs = runs_of(config)
        self.runs_folder = folder / "runs"
        self._left_out = set[Run]()

    def make(self) -> int:
        """Runs what is left, and writes the page; 1 if a run did not come to its end.

        Raises:
            TableError: a run in the folder was made otherwise, or a file of it is damaged.
        """
        parts = {cell: self._parts(cell) for cell in cells_of(self.config)}
        self.runs = needed(self.config, self.whole, self._is_finished)
        results = self._results(self.runs)
        self._refuse_others(parts)
        self._leave_out_others(parts)
        held = RunFolder(str(self.folder.parent), self.folder.name)
        held.acquire()
        try:
            self._say_cost(parts, results)
            if self.options.dry_run:
                return 0
            if self.options.retry:
                for run in self.runs:
                    (self.runs_folder / run.name / OUTCOME).unlink(missing_ok=True)
            ended = [self.runs_folder / result.run.name for result in results if result.finished]
            merge_stores(ended, own_store(self.runs_folder))
            if self.options.submit:
                return self._submit(results)
            runner = Runner(
                self.config,
                self.runs_folder,
                jobs=self.options.jobs,
                environment=_shared_threads(self.options.jobs),
                ended=self._write,
            )
            failed = runner.run(self.runs)
            self._write()
        finally:
            held.release()
        print(self.folder / "table.md")
        broken = [run for run in failed if read_outcome(self.runs_folder / run.name).get("state") != NO_TRACES]
        for run in broken:
            print(f"not finished: {run.name}; the reason is in {self.runs_folder / 'logs' / run.name}.txt")
        return 1 if broken else 0

    def run_one(self, name: str) -> int:
        """One run in this process, as a task of an array job: no page is written, and the table's folder not held."""
        runner = Runner(self.config, self.runs_folder)
        run = next((run for run in self.runs if run.name == name), None)
        if run is None:
            raise TableError(f'--run "{name}" is not a run of this table; its first is {self.runs[0].name}.')
        cell = self._parts_of(self.config.words(run.cell.task, run.cell.lm, run.cell.preset))
        return runner.run_here(run, fit=self._fit, stored=isinstance(cell.module.lm, LanguageModel))

    def _submit(self, results: list[RunResult]) -> int:
        """Writes the page of what there is, and submits what is left."""
        self._write()
        left = [r.run for r in results if not r.finished and not read_outcome(self.runs_folder / r.run.name)]
        if waiting := under_way(self.folder):
            say(f"still running: {', '.join(waiting)}; {len(left)} runs are not finished. Nothing new is submitted.")
            return 0
        if not left:
            say(f"nothing is left to submit; {self.folder / 'table.md'}")
            return 0
        words = [*_table_words(self.options), "--folder", str(self.folder.resolve())]
        jobs = submit(left, self.folder, words, name=self.config.name, options=self.options.sbatch)
        say(f"{len(left)} runs submitted: job {' and '.join(jobs)}. The same command again shows how they ended.")
        return 0

    def _parts(self, cell: Cell) -> Parts:
        """The parts of a cell: what is wrong in a config is said before anything is run."""
        try:
            return self._parts_of(self.whole.words(cell.task, cell.lm, cell.preset))
        except SystemExit:
            print(f"cotune: the error is in the config of {cell}")
            raise

    def _is_finished(self, run: Run) -> bool:
        return is_finished(self.runs_folder / run.name)

    def _results(self, runs: Sequence[Run]) -> list[RunResult]:
        return [read_result(run, self.runs_folder) for run in runs]

    def _refuse_others(self, parts: dict[Cell, Parts]) -> None:
        """Runs that have begun, finished or not, stand on the page: were they made with these options, this data and
        this base model?"""

        begun = {run: made for run in self.runs if (made := read_identity(self.runs_folder / run.name)) is not None}
        for run, made in begun.items():
            if found := _changed(run, made, parts):
                raise TableError(self._another(run, "with other options", found))
        now = ContentNow(parts, own_store(self.runs_folder))
        for run, made in begun.items():
            if found := changed_content(made, data=now.data(run), base=now.base(run.cell)):
                raise TableError(self._another(run, "of other data or another base model", found))

    def _another(self, run: Run, how: str, found: Sequence[str]) -> str:
        return (
            f"{self.runs_folder / run.name} was made {how} (then -> now): {'; '.join(found)}. Give this table another "
            "--folder, or remove that run."
        )

    def _leave_out_others(self, parts: dict[Cell, Parts]) -> None:
        """Runs that this start does not ask for are on its page only if they were made with the options of now."""

        for run in shown(self.whole, self.runs, self._is_finished):
            made = None if run in self.runs else read_identity(self.runs_folder / run.name)
            if made is None:
                continue
            if run.cell not in parts:
                parts[run.cell] = self._parts(run.cell)
            if found := _changed(run, made, parts):
                self._left_out.add(run)
                say(f"  {run.name} was made with other options, and is not on the page: {'; '.join(found)}")

    def _say_cost(self, parts: dict[Cell, Parts], results: list[RunResult]) -> None:
        left = [r.run for r in results if not r.finished]
        say(f"{self.config.name}: {len(self.runs)} runs, {len(self.runs) - len(left)} of them finished")
        known = {run: measured(run, results) for run in left}
        paces = self._paces(parts, [run for run in left if known[run] is None])
        costs = {
            run: cost_of(run, parts[run.cell], paces.get(run.cell), equals=ALTERNATION if run.equal else ())
            for run in left
        }
        for cell, cost in totals(costs).items():
            own = [run for run in left if run.cell == cell]
            say(f"  {cell}: {len(own)} runs, {_most(cost)}")
        seconds = [costs[run].seconds if known[run] is None else known[run] for run in left]
        if left and all(value is not None for value in seconds):
            total = sum(value or 0.0 for value in seconds) / self.options.jobs
            sure = "from finished runs" if all(known.values()) else "if nothing is pruned or shared; often half of it"
            say(f"  time: about {format_duration(total)} with {self.options.jobs} at a time ({sure})")

    def _paces(self, parts: dict[Cell, Parts], runs: list[Run]) -> dict[Cell, Pace]:
        """A measured pace for each cell with runs; cells that differ in nothing measured share one."""

        if self.options.no_warm_up:
            return {}
        found: dict[Cell, Pace] = {}
        for cell in dict.fromkeys(run.cell for run in runs):
            name = parts[cell].module.lm.name
            if not isinstance(parts[cell].module.lm, LanguageModel):
                say(f"  {cell}: counts only, since {name} has no weights here whose pace could be measured")
                continue
            if self.options.dry_run and not (name == EMBEDDED or Path(name).expanduser().exists()):
                say(f"  {cell}: counts only, since a dry run downloads no weights ({name})")
                continue
            say(f"  measuring the pace of {cell}")
            words = self.config.words(cell.task, cell.lm, cell.preset)
            found[cell] = warm_up(words, _shared_threads(self.options.jobs))
        return found

    def _write(self) -> None:
        """table.json, table.md and table.svg as the finished runs have it."""

        page = shown(self.whole, self.runs, self._is_finished)
        results = self._results([run for run in page if run not in self._left_out])
        record = table_record(self.whole, results)
        write_whole(self.folder / "table.json", json.dumps(record, ensure_ascii=False, indent=1) + "\n")
        write_whole(self.folder / "table.md", markdown(record))
        write_whole(self.folder / "table.svg", table_plot(record))
        if not self.options.keep_checkpoints:
            for run in filter(self._is_finished, runs_of(self.config)):
                shutil.rmtree(self.runs_folder / run.name / "checkpoints", ignore_errors=True)


def _table_words(options: argparse.Namespace) -> list[str]:
    """The words of this table's command, without what is done with it."""
    file = Path(options.config)
    words = ["table", "--config", str(file.resolve() if file.exists() else options.config)]
    for name in ("task", "lm", "preset", "strategy", "seed", "set"):
        words += [word for value in getattr(options, name) for word in (f"--{name}", str(value))]
    return words


_OF_A_RUN = {
    *("seed_everything", "model.seed", "data.init_args.seed", "alternate.seed"),
    *("alternate.schedule", "alternate.test_prefixes"),
}
"""Options that a run's name tells, or that all runs of a table have."""


def _changed(run: Run, made: RunIdentity, parts: Mapping[Cell, Parts]) -> list[str]:
    """The options that the run was made with and are others now; a control's LM calls are its own."""
    own = {"alternate.lm_calls"} if run.equal else set()
    return changed_options(made, parts[run.cell].counted, but=_OF_A_RUN | own)


def _shared_threads(jobs: int) -> dict[str, str]:
    """Threads of each of so many processes: the cores shared out, unless the user has said otherwise."""

    if "OMP_NUM_THREADS" in os.environ:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(cores // jobs, 1))}


def _most(cost: Cost) -> str:

    message = f"at most {cost.calls:,} LM calls"
    if cost.prompt_tokens is not None:
        message += f", {cost.prompt_tokens / 1e6:,.1f} million prompt tokens"
    message += f", {cost.completion_tokens / 1e6:,.1f} million completion tokens"
    message += f", {cost.pairs:,} training pairs" if cost.pairs else ""
    return message + (f", {format_duration(cost.seconds)}" if cost.seconds is not None else "")
