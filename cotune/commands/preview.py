"""cotune preview: the training pairs of a run as they are trained on, the trained tokens marked."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.text import Text

from cotune.errors import CotuneError

if TYPE_CHECKING:  # the command line is parsed before anything heavy is imported
    from cotune.callbacks.schedule import WeightStep
    from cotune.datamodules import EpochBatches, Pair, Trace, TraceDataModule
    from cotune.lightning_modules import LanguageModel, ProgramModule

_MAX_VALUES = 12
"""Outputs with more different values than this are text, and are not counted by value."""


class PreviewError(CotuneError, ValueError):
    """There is nothing to show. The message says what is missing."""


@dataclass(frozen=True)
class TrainedRow:
    """One row of a training batch, and which of its completion's ids were put there by the engine."""

    trace: Trace
    batch: int
    pair: Pair
    forced: Sequence[bool]

    @property
    def ids(self) -> list[int]:
        """All ids of the row."""
        return [*self.pair.prompt_ids, *self.pair.completion_ids]

    @property
    def trained(self) -> int:
        """How many of its completion's tokens bear weight."""
        return len(self.pair.bearing)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        "cotune preview",
        allow_abbrev=False,
        description="Shows the training pairs of a weight step exactly as the LM is trained on them. Tokens with a "
        "loss are in colour in a terminal, and between ⟦ and ⟧ elsewhere; tokens that the engine inserted are between "
        "⟨ and ⟩.",
    )
    made.add_argument("run", metavar="RUN_FOLDER", help="a run's folder, e.g. runs/iris")
    made.add_argument("--step", type=int, help="which step of the schedule, from 1 (default: the last weight step)")
    made.add_argument(
        "--epoch", type=int, default=0, help="of the weight step, from 0; each draws new demos, or new runs"
    )
    made.add_argument("--rows", type=int, default=4, help="how many pairs to show")
    return made


def main(options: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        PreviewError: the folder is no run, or it has no traces of that step and epoch; --rows is below 0.
    """
    if options.rows < 0:
        raise PreviewError(f"--rows {options.rows} is below 0; give how many pairs to show.")
    batches, lm = load_batches(Path(options.run), step=options.step, epoch=options.epoch)
    console = Console(highlight=False, soft_wrap=True)
    for line in summary(batches):
        console.print(line, markup=False)
    for shown, row in enumerate(trained_rows(batches)):
        if shown == options.rows:
            break
        console.print()
        console.print(_heading(row), style="bold", markup=False)
        console.print(marked(row, lm, colour=console.is_terminal))
    return 0


def load_batches(folder: Path, *, step: int | None = None, epoch: int = 0) -> tuple[EpochBatches, LanguageModel]:
    """The batches of one epoch of a run's weight step, and its LM with the tokenizer alone loaded.

    Raises:
        PreviewError: the folder is no run, or it has no traces of that step and epoch.
    """
    from cotune.datamodules import load_traces

    module, data, schedule = _read_config(folder)
    step = _step(folder, step)
    settings = schedule[step - 1]
    _check_epoch(folder / "traces" / f"step-{step}", epoch, settings.epochs_or_rounds)
    own = _collection(folder / "traces" / f"step-{step}", epoch if settings.rounds else 0)
    as_drawn = settings.learns.runs is not None
    traces = load_traces(own if as_drawn else Path(data.reused_traces or own), module.program)
    module.weights.load_tokenizer()
    maker = module.pair_maker(_pair_prompts(module, own, data))
    data.begin_weight_step(traces, maker, step=step - 1, epoch=epoch, as_drawn=as_drawn)
    return data.epoch_batches(), module.weights


def trained_rows(batches: EpochBatches) -> Iterator[TrainedRow]:
    """The rows in the order of training, read back from the batches that the loss sees."""
    for index in range(len(batches)):
        by_stage: dict[str, list[Trace]] = {}
        for place in batches.plan[index]:
            by_stage.setdefault(batches.traces[place].stage, []).append(batches.traces[place])
        # `pairs` groups the batch's rows by stage in this order, and `collate` keeps it.
        traces = (trace for stage in by_stage.values() for trace in stage)
        for trace, pair in zip(traces, batches[index].pairs, strict=True):
            foreign = batches.maker.is_foreign(trace)
            yield TrainedRow(trace, index, pair, () if foreign else trace.forced)


def summary(batches: EpochBatches) -> list[str]:
    """What the pairs are made of: stages, tokens, and the values of each output that is a label rather than text."""
    rows = list(trained_rows(batches))
    examples = len({row.trace.example for row in rows})
    sizes = sorted({len(plan) for plan in batches.plan})
    of = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} or {sizes[-1]}"
    lines = [f"{len(rows)} pairs of {examples} examples, in {len(batches)} batches of {of}"]
    share = batches.maker.vocabulary.canonical_share([row.pair.completion_ids for row in rows])
    if share is not None:
        lines.append(f"{share:.0%} of the completions have the ids that the tokenizer gives their text")
    for stage in dict.fromkeys(row.trace.stage for row in rows):
        own = [row for row in rows if row.trace.stage == stage]
        prompt = sum(len(row.pair.prompt_ids) for row in own) / len(own)
        trained = sum(row.trained for row in own) / len(own)
        lines.append(
            f"{stage}: {len(own)} pairs; on average {prompt:.0f} prompt tokens and {trained:.1f} trained tokens"
        )
        lines += [f"  {line}" for line in _by_value([row.trace for row in own])]
    return lines


def marked(row: TrainedRow, lm: LanguageModel, *, colour: bool) -> Text:
    """A row's text with its trained tokens marked, those that the engine put there apart from those the LM chose."""
    bearing = set(row.pair.bearing)
    forced = [*row.forced, *[False] * len(row.pair.completion_ids)]
    kinds = [None if i not in bearing else forced[i] for i in range(len(row.pair.completion_ids))]
    text = Text(lm.tokenizer.decode(list(row.pair.prompt_ids)))
    for kind, run in groupby(zip(kinds, row.pair.completion_ids, strict=True), key=itemgetter(0)):
        written = lm.tokenizer.decode([id_ for _, id_ in run])
        if kind is None:
            text.append(written)
        elif colour:
            text.append(written, "black on yellow" if kind else "black on green")
        else:
            text.append(f"⟨{written}⟩" if kind else f"⟦{written}⟧")
    return text


def _heading(row: TrainedRow) -> str:
    trace = row.trace
    return (
        f"── batch {row.batch + 1} · stage {trace.stage} · example {trace.example} · attempt {trace.attempt + 1} · "
        f"{len(row.pair.prompt_ids)} prompt and {row.trained} trained tokens"
    )


def _by_value(traces: Sequence[Trace]) -> Iterator[str]:
    for name in traces[0].outputs:
        counts = Counter(trace.outputs.get(name, "") for trace in traces)
        if len(counts) <= _MAX_VALUES:
            yield f"{name}: " + ", ".join(f"{value} {count}" for value, count in counts.most_common())


def _read_config(folder: Path) -> tuple[ProgramModule, TraceDataModule, list[WeightStep]]:
    """(module, data, settings of each step of the schedule)."""
    from cotune.build import build_data, build_module, build_steps

    if not (folder / "config.yaml").is_file():
        runs = ", ".join(sorted(str(path.parent) for path in folder.glob("*/config.yaml"))[:5])
        hint = f" Did you mean one of {runs}?" if runs else " Give the folder of a run, e.g. runs/iris."
        raise PreviewError(f'"{folder}" is no run: it has no config.yaml.{hint}')
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    module = build_module(config["model"], where=str(path))
    data = build_data(config["data"], where=str(path))
    # The seed stands once in the file, and the command line hands it on, as here.
    data.seed = int(config["seed_everything"])
    return module, data, build_steps(config["alternate"], where=str(path))


def _step(folder: Path, step: int | None) -> int:
    """The step of the schedule to show, from 1."""
    found = re.compile(r"step-(\d+)")
    there = sorted(int(m[1]) for path in folder.glob("traces/step-*") if (m := found.fullmatch(path.name)))
    if not there:
        raise PreviewError(
            f'"{folder}" has no traces: its weight steps have not begun, or its schedule has none (no "w").'
        )
    if step is not None and step not in there:
        raise PreviewError(
            f'"{folder}" has no traces of step {step}; there are some of step {", ".join(map(str, there))}.'
        )
    return step or there[-1]


def _check_epoch(step: Path, epoch: int, count: int) -> None:
    if not 0 <= epoch < count:
        there = "epoch 0 alone" if count == 1 else f"epochs 0 to {count - 1}"
        raise PreviewError(f'"{step}" has no traces of epoch {epoch}: the step has {there}.')


def _collection(step: Path, rounds: int) -> Path:
    """The folder of what was collected for the training after so many rounds."""
    folder = step / f"round-{rounds + 1}" if rounds else step
    if not folder.is_dir():
        raise PreviewError(
            f'"{step}" has no traces of epoch {rounds}: each epoch collects its own, and has not done so yet.'
        )
    return folder


def _pair_prompts(module: ProgramModule, traces: Path, data: TraceDataModule) -> Any:
    """The prompts in the pairs, which the weight step recorded; the zero-shot ones where it did not."""
    import json

    from cotune.programs import prompts_from_dict

    path = traces / "prompts.json"
    if not path.is_file() and data.bootstrapping.pairs == "initial":
        return module.initial_prompts
    if not path.is_file():
        raise PreviewError(f'"{path}" is missing: it holds the prompts of the training pairs.')
    return prompts_from_dict(json.loads(path.read_text(encoding="utf-8")))
