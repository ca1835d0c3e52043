"""TraceDataModule: traces as training batches, examples for validation and test."""

from __future__ import annotations

import copy
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cotune.datamodules.bootstrapping import Bootstrapping
from cotune.datamodules.collate import Batch, Pair, collate
from cotune.datamodules.collect import NoTracesError
from cotune.datamodules.pair_maker import PairMaker
from cotune.datamodules.splits import NAMES, Duplicates, Sizes, Splits, leak_notes, rotated
from cotune.datamodules.trace import Trace, load_traces
from cotune.errors import BadValueError
from cotune.programs import (
    Demo,
    Example,
    Metric,
    Program,
    Vote,
    draw_demos,
    exact_match,
)
from cotune.programs.set_metrics import set_metric
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler


class EpochBatches(Dataset[Batch]):
    """The batches of one epoch, planned ahead: a pure function of traces, options, seed and epoch.

    Rows of all stages stand in one set and are shuffled together, as in the paper; within a batch, rows of a stage
    share their prompt's prefix, and rows of a group stand in one batch. Batch sizes differ by one at most, or by what
    groups differ by, so that no small last batch counts like a full one.
    """

    def __init__(
        self, traces: Sequence[Trace], maker: PairMaker, options: Bootstrapping, *, batch_size: int, seed: str
    ) -> None:
        self.traces, self.maker, self.options, self.seed = traces, maker, options, seed
        order = _together(traces, _rows_of_an_epoch(traces, options))
        random.Random(seed).shuffle(order)
        count = _count_of_batches(order, batch_size)
        self.plan = [[place for group in order[i::count] for place in group] for i in range(count)]

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Batch:
        return collate(list(self.pairs(index).values()))

    def pairs(self, index: int) -> dict[str, list[Pair]]:
        """Stage -> pairs of batch `index`, demos drawn for it included."""
        rows = [self.traces[i] for i in self.plan[index]]
        demos = self._demos(index, rows)
        pairs: dict[str, list[Pair]] = {}
        for trace in rows:
            with_demos = self.maker.pair(trace, demos.get(trace.stage))
            # Demos that would push a row past the window are left out of that row; the row itself always fits.
            pair = with_demos if self.maker.fits(with_demos) else self.maker.pair(trace)
            pairs.setdefault(trace.stage, []).append(pair)
        return pairs

    def _demos(self, index: int, rows: Sequence[Trace]) -> dict[str, list[Demo]]:
        rng = random.Random(f"{self.seed}|{index}")
        if rng.random() >= self.options.demo_share:
            return {}
        shown = {trace.example for trace in rows}
        drawn = {}
        for stage in sorted({trace.stage for trace in rows}):
            pool = [trace.demo for trace in self.traces if trace.stage == stage]
            drawn[stage] = draw_demos(pool, rng.randint(1, self.options.fresh_demos), rng, exclude_sources=shown)
        return drawn


def _rows_of_an_epoch(traces: Sequence[Trace], options: Bootstrapping) -> list[int]:
    """Places of the traces that an epoch trains on, some of them more than once where stages are balanced.

    >>> from types import SimpleNamespace as Row
    >>> rows = [Row(stage="hop"), Row(stage="hop"), Row(stage="hop"), Row(stage="answer")]
    >>> _rows_of_an_epoch(rows, Bootstrapping(balance_stages=True))
    [0, 1, 2, 3, 3, 3]
    """
    if not options.balance_stages:
        return list(range(len(traces)))
    stages: dict[str, list[int]] = {}
    for place, trace in enumerate(traces):
        stages.setdefault(trace.stage, []).append(place)
    most = max(map(len, stages.values()), default=0)
    return [places[i % len(places)] for places in stages.values() for i in range(most)]


def _together(traces: Sequence[Trace], rows: Sequence[int]) -> list[list[int]]:
    """The rows of an epoch, those of a group as one. A group whose rows are repeated is repeated as a whole."""
    found: dict[tuple[str, int], list[int]] = {}
    seen: Counter[int] = Counter()
    for nth, place in enumerate(rows):
        group = traces[place].group
        found.setdefault((group, seen[place]) if group else ("", nth), []).append(place)
        seen[place] += 1
    return list(found.values())


def _count_of_batches(groups: Sequence[Sequence[int]], batch_size: int) -> int:
    """Of an epoch: as its rows are many, and none without a group."""
    return min(-(-sum(map(len, groups)) // batch_size), len(groups))


class EpochLoader(DataLoader[Batch]):
    """An epoch's batches in order, from where a checkpoint inside the epoch was made.

    Its state is the number of batches handed out, which Lightning saves and gives back. That of another epoch says
    nothing about this one, which then begins at its start.
    """

    def __init__(self, batches: EpochBatches) -> None:
        self._order = _FromHere(len(batches))
        self._epoch = batches.seed
        # In this process, without workers: what is handed out is what has been trained on.
        super().__init__(batches, batch_size=None, sampler=self._order)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "handed_out": self._order.handed_out}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["epoch"] == self._epoch:
            self._order.first = self._order.handed_out = state["handed_out"]


class _FromHere(Sampler[int]):
    """0 to count - 1, or the rest of it; its length is that of the whole, as Lightning counts batches."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.first = self.handed_out = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        self.handed_out = self.first
        for index in range(self.first, self.count):
            self.handed_out = index + 1
            yield index


class _NoBatches(IterableDataset[Batch]):
    """What a fit is given that has nothing to train; without a length, as Lightning warns of one of 0."""

    def __iter__(self) -> Iterator[Batch]:
        return iter(())


class TraceDataModule(LightningDataModule, ABC):
    """Four disjoint sets of examples, and batches of the traces collected on train.

    Subclasses load the examples in `load`. Traces come from `begin_weight_step`.

    Args:
        sizes: how many examples each set gets.
        metric: (example, prediction) -> score in [0, 1].
        seed: of the split and of the order of training.
        bootstrapping: how traces are collected and made into training pairs.
        traces: folder with the traces of another run, to train on instead of collecting.
        batch_size: pairs per optimiser step.
        val_batch_size: examples run together in validation and test. They are one LM batch as far as memory allows.
        duplicates: what to do with rows that have the same inputs, in one set or in two ("leakage"): "refuse" them,
            "drop" all but one, or "keep" them. Their number is reported.
        folds: for data with few labels: split all examples except test's into this many parts; one is val and one is
            dev. Null: `sizes` sets dev and val.
        fold: which part is val, from 0. Make one run for each; all have the same test set.
        val_samples: runs of each example of val, to choose steps and epochs with less noise. Above 1 it needs a
            model.sampling.temperature above 0. Test runs each example once, as in later use.
        val_vote: score of an example with several samples: their "mean", or the score of the "majority" answer.
        set_metrics: numbers of a whole set, reported beside the mean score on val and test with their interval:
            "macro_f1", "auc", or your own functions. Nothing is chosen by them.
    """

    def __init__(
        self,
        *,
        sizes: Sizes,
        metric: Metric = exact_match,
        seed: int = 0,
        bootstrapping: Bootstrapping = Bootstrapping(),  # noqa: B008 (frozen)
        traces: str | None = None,
        batch_size: int = 8,
        val_batch_size: int = 256,
        duplicates: Duplicates = "refuse",
        set_metrics: list[str] | None = None,
        folds: int | None = None,
        fold: int = 0,
        val_samples: int = 1,
        val_vote: Vote = "mean",
    ) -> None:
        super().__init__()
        if min(batch_size, val_batch_size, val_samples) < 1:
            sized = f"batch_size {batch_size}, val_batch_size {val_batch_size} and val_samples {val_samples}"
            raise BadValueError(f"{sized} must be at least 1.")
        if fold and folds is None:
            raise BadValueError(
                f"data.fold {fold} needs data.folds, the number of parts (at least 3, and more than fold). Give "
                "data.folds too, or leave out data.fold."
            )
        if val_vote != "mean" and val_samples == 1:
            raise BadValueError(
                f'data.val_vote "{val_vote}" needs data.val_samples above 1: one run of an example has nothing to vote '
                "on. Set data.val_samples too, or leave out data.val_vote."
            )
        self.sizes, self.metric, self.seed = sizes, metric, seed
        self.bootstrapping, self.reused_traces = bootstrapping, traces
        self.batch_size, self.val_batch_size, self.duplicates = batch_size, val_batch_size, duplicates
        self.set_metrics, self.folds, self.fold = list(set_metrics or []), folds, fold
        self.val_samples, self.val_vote = val_samples, val_vote
        for name in self.set_metrics:
            set_metric(name)  # refuses a name that there is no metric of
        self.epoch = 0
        self._splits: Splits | None = None
        self._place = 0
        self._traces: list[Trace] = []
        self._maker: PairMaker | None = None
        self._options = bootstrapping  # of the rows at hand
        self._all_trained = False

    @abstractmethod
    def load(self) -> Splits:
        """The four sets. Called once; must give the same sets each time."""

    @property
    def splits(self) -> Splits:
        if self._splits is None:
            made = self.load()
            if self.folds is not None:
                made = rotated(made, fold=self.fold, folds=self.folds, seed=self.seed)
            self._splits = replace(made, rest=(), fold_test=None, notes=(*made.notes, *leak_notes(made)))
        return self._splits

    def reseeded(self, seed: int) -> TraceDataModule:
        """The same data by another seed; nothing of it has been read."""
        made = copy.copy(self)
        made.seed, made._splits = seed, None
        return made

    def rehearse(self, batches: int) -> None:
        """Keeps so many batches of each set, and trains on traces of any score above 0: for a look whether all runs."""
        count = batches * self.batch_size
        self._splits = replace(self.splits, **{name: getattr(self.splits, name)[:count] for name in NAMES})
        self.bootstrapping = replace(self.bootstrapping, threshold=1e-9)

    def setup(self, stage: str) -> None:
        _ = self.splits  # bad data is found before the model is loaded

    def reuse_traces(self, program: Program) -> list[Trace] | None:
        """The traces of another run, if `traces` names some.

        Raises:
            ValueError: they hold examples that this run keeps out of training, or rows that are no traces of passing
                runs: those of steps that learn from runs as they are have weights for one objective only.
        """
        if not self.reused_traces:
            return None
        traces = load_traces(Path(self.reused_traces), program)
        kept_out = {one.id: name for name in ("dev", "val", "test") for one in getattr(self.splits, name)}
        if leaked := Counter(kept_out[i] for i in {trace.example for trace in traces} if i in kept_out):
            counts = ", ".join(f"{count} of {name}" for name, count in sorted(leaked.items()))
            raise BadValueError(
                f'the traces in data.traces "{self.reused_traces}" are of examples that this run scores on: {counts}. '
                "Give seed, sizes and fold of the run that made them, or save a copy of the traces without their rows."
            )
        if any(trace.ce is not None or trace.pg or trace.kl or trace.candidates for trace in traces):
            raise BadValueError(
                f'the traces in data.traces "{self.reused_traces}" are of a step that learns from runs as they are '
                "(d, k or g), failed ones too. Give those of a step w."
            )
        return traces

    def begin_weight_step(
        self, traces: Sequence[Trace], maker: PairMaker, *, step: int, epoch: int = 0, as_drawn: bool = False
    ) -> int:
        """Takes the traces that the next epochs train on.

        Args:
            step: place in the schedule; with seed and epoch it decides the order of the rows.
            epoch: epochs of this weight step that are done.
            as_drawn: the rows keep the prompts that they were drawn by: none gets demos besides (`demo_share`).

        Returns:
            How many traces were left out because they do not fit the model's window.

        Raises:
            NoTracesError: none is left.
        """
        if foreign := [trace for trace in traces if maker.is_foreign(trace)]:
            names = ", ".join(sorted({f'"{trace.base}"' for trace in foreign if trace.base})) or "another LM"
            print(
                f"{len(foreign)} of {len(traces)} traces are of another tokenizer ({names}): only their outputs are "
                "used, written in this run's form and this LM's tokens."
            )
        own = [(maker.own(trace), bool(trace.completion_ids)) for trace in traces]
        # What has ids was filled in, field by field.
        writable = [trace for trace, filled in own if filled or not maker.unwritable(trace)]
        if wrong := len(traces) - len(writable):
            print(f"{wrong} traces are left out: the form cannot write their outputs so that they are read back.")
        fitting = [trace for trace in writable if maker.fits(maker.pair(trace))]
        if not fitting:
            message = (
                "none was given" if not traces else f"none of {len(traces)} fits the window of {maker.window} tokens"
            )
            message += f" ({wrong} of them the form cannot write)" if wrong else ""
            raise NoTracesError(f"weight step: no traces to train on: {message}.")
        self._traces, self._maker, self._place, self.epoch = fitting, maker, step, epoch
        self._all_trained = False
        self._options = replace(self.bootstrapping, demo_share=0.0) if as_drawn else self.bootstrapping
        return len(writable) - len(fitting)

    def nothing_to_train(self) -> None:
        """From now on there are no batches: no weight step is left, or there never was one."""
        self._all_trained = True

    @property
    def steps_per_epoch(self) -> int:
        groups = _together(self._traces, _rows_of_an_epoch(self._traces, self.bootstrapping))
        return _count_of_batches(groups, self.batch_size)

    def epoch_batches(self) -> EpochBatches:
        """The batches of the current epoch.

        Raises:
            NoTracesError: no weight step has begun.
        """
        if self._maker is None:
            raise NoTracesError(
                "there are no traces to train on yet. Train with the Alternate callback, which collects them, "
                "or give data.traces the traces of another run."
            )
        return EpochBatches(
            self._traces,
            self._maker,
            self._options,
            batch_size=self.batch_size,
            seed=f"{self.seed}|{self._place}|{self.epoch}",
        )

    def state_dict(self) -> dict[str, Any]:
        """What the metric has to keep, such as a judge that was asked twice; Lightning puts it into checkpoints."""
        kept = getattr(self.metric, "state_dict", None)
        return {"metric": kept()} if callable(kept) else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if "metric" in state_dict and hasattr(self.metric, "load_state_dict"):
            self.metric.load_state_dict(state_dict["metric"])

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(_NoBatches()) if self._all_trained else EpochLoader(self.epoch_batches())

    def val_dataloader(self) -> Any:
        return self._examples(self.splits.val)

    def test_dataloader(self) -> Any:
        return self._examples(self.splits.test)

    def predict_dataloader(self) -> Any:
        return self._examples(self.splits.test)

    def _examples(self, examples: Sequence[Example]) -> Any:
        return DataLoader(list(examples), batch_size=self.val_batch_size, collate_fn=list)  # type: ignore[arg-type]
