"""Alternate: runs prompt steps and weight steps by turns, and ends with the best program they passed through."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from cotune.callbacks.boundary import Boundary, BoundaryListener
from cotune.callbacks.checkpoint import Checkpoints
from cotune.callbacks.diagnosis import advice_without_traces, diagnose, trace_coverage
from cotune.callbacks.epoch_means import Sums, add_epoch_sums, epoch_sums, log_epoch_sums
from cotune.callbacks.progress import StepProgress, say_if_piped, training_bar_paused
from cotune.callbacks.schedule import parse_schedule, prefix_name
from cotune.datamodules import (
    NoTracesError,
    PairMaker,
    Report,
    Trace,
    TraceDataModule,
    collect,
    load_traces,
    save_traces,
)
from cotune.datamodules.crash_point import crash_point
from cotune.datamodules.durable import write_durably
from cotune.lightning_modules import ProgramModule, Usage
from cotune.programs import (
    Example,
    Program,
    Prompts,
    Rollout,
    mean_score,
    prompts_from_dict,
    prompts_id,
    prompts_to_dict,
)
from cotune.prompting import Found, PromptSearch, RandomDemoSearch, SearchTask
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

_SAVING_SHARE = 0.015
"""Most of a run's time that saving may take, where it is left to Alternate when to save."""


class Stopping(Protocol):
    """Who knows whether the process has been asked to end."""

    requested: int | None

    def check(self) -> None:
        """Raises if it has."""
        ...


class Alternate(Callback):
    """BetterTogether (arXiv 2407.10930) as a callback: prompt steps between training epochs.

    In `on_fit_start` the program is scored on val as it came, and prompt steps that stand first are run. Each weight
    step is `epochs` epochs of training on traces collected just before. At its end the new weights are scored with the
    prompts in the training pairs and with the prompts from before, and the better are kept; prompt steps that follow
    run then. Every prefix of the schedule gets a val score, and the fit ends holding the best prefix's weights and
    prompts, unless `keep` is "last". Ties keep the earlier.

    Use `Trainer(reload_dataloaders_every_n_epochs=1)`; the number of epochs is set here.

    Args:
        schedule: e.g. "p -> w -> p": p is a prompt step, w a weight step.
        search: the prompt optimiser.
        epochs: of each weight step.
        weights: whether a second weight step continues with adapter and optimiser, or starts fresh from the base.
        keep: "best" (by val) or "last" prefix.
        keep_best_epoch: end a weight step with the adapter of its best epoch by val, not of its last.
        try_both_prompts: score new weights also with the prompts from before the step (the paper keeps the pairs' own).
        average_last: after a weight step's last epoch, also score the average of its last so many epochs' adapters, on
            val like an epoch; it is kept if it is better than the best epoch (without `keep_best_epoch`: in any case).
            Of one training run, late adapters are near each other, and the average of their factors is nearly the
            average of their products. 0 makes none.
        search_examples: how many train examples a prompt step bootstraps from; null for all.
        lm_calls: let the last step, a prompt step, go on trying candidates until the run has made so many LM calls:
            a control for another schedule that spends as many. Null: the search's own size.
        test_prefixes: also score every prefix on test, as tables need it. No choice is made by these scores; each is
            recorded, and its cost apart from the step's. Off: test is run once, at the very end.
        save_every: optimiser steps between two saves, all of which a kill can cost; boundaries are saved as well, and
            the last step of each weight step.
            "auto" saves as often as keeps saving under 2 % of the time, and lets a boundary pass that comes too soon
            after a save if completions are kept, from which it is reached again in moments. No result depends on it.
        folder: where checkpoints and traces go; null takes the trainer's default_root_dir.
        seed: of the searches and the trace collections.

    Attributes:
        stopping: asked between two optimiser steps; when it wants the process to end, the state is saved first.
    """

    def __init__(
        self,
        schedule: str = "p -> w -> p",
        search: PromptSearch | None = None,
        *,
        epochs: int = 5,
        weights: Literal["continue", "fresh"] = "continue",
        keep: Literal["best", "last"] = "best",
        keep_best_epoch: bool = True,
        try_both_prompts: bool = True,
        average_last: int = 0,
        search_examples: int | None = None,
        lm_calls: int | None = None,
        test_prefixes: bool = False,
        save_every: int | Literal["auto"] = "auto",
        folder: str | None = None,
        seed: int = 0,
    ) -> None:
        self.steps = parse_schedule(schedule)
        if epochs < 1:
            raise ValueError(f"epochs {epochs} is below 1; leave w out of the schedule to train nothing.")
        if search_examples is not None and search_examples < 1:
            raise ValueError(f"search_examples {search_examples} is below 1; null takes the whole train set.")
        if save_every != "auto" and save_every < 1:
            raise ValueError(f'save_every {save_every} is below 1; it is a number of optimiser steps, or "auto".')
        if average_last < 0 or average_last == 1 or average_last > epochs:
            raise ValueError(f"average_last {average_last} is none of 0 (off) and 2 to epochs ({epochs}).")
        if lm_calls is not None and self.steps[-1] != "p":
            raise ValueError(f'lm_calls is for a schedule that ends with "p"; this is "{" -> ".join(self.steps)}".')
        self.search = search or RandomDemoSearch()
        self.epochs, self.weights, self.keep = epochs, weights, keep
        self.keep_best_epoch, self.try_both_prompts = keep_best_epoch, try_both_prompts
        self.average_last, self.lm_calls, self.test_prefixes = average_last, lm_calls, test_prefixes
        self.search_examples, self.save_every = search_examples, save_every
        self.folder, self.seed = folder, seed
        self.stopping: Stopping | None = None
        self.history: list[dict[str, Any]] = []
        self.epoch = 0
        """epochs of the present weight step that are behind"""
        self._incumbent: Prompts = {}
        self._best: dict[str, Any] = {}
        self._best_epoch: dict[str, Any] = {}
        self._late: dict[str, Any] = {}  # sum and number of the late epochs' adapters
        self._val_scores: dict[str, float] = {}  # example -> score at the last boundary
        self._coverage: dict[str, Any] = {}
        self._report = Report()
        self._collected = False  # the traces of the present weight step are there, and its pairs' prompts are set
        self._usage = Usage()  # the LM's own, so that a checkpoint made at any time holds its count
        self._spent = Usage()  # as it was at the last boundary
        self._clock = time.perf_counter()
        self._elapsed = 0.0
        self._checkpoints: Checkpoints | None = None
        self._resumed_from: dict[str, Any] = {}  # the trainer's own part of the checkpoint, until it has been restored
        self._epoch_sums: Sums = {}
        # The LM's usage as it was before, from an epoch's last step to its validation's end.
        self._before_validation: dict[str, Any] = {}
        self._saved_at, self._saved_step, self._saving_takes = time.perf_counter(), 0, 0.0

    # What Lightning calls

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        _check_setup(trainer, pl_module)
        weight_steps = self.steps.count("w")
        if trainer.max_epochs not in (None, -1, 1000, weight_steps * self.epochs):
            raise ValueError(
                f"trainer.max_epochs is {trainer.max_epochs}, but the schedule has {weight_steps} weight steps of "
                f"alternate.epochs {self.epochs}. Leave trainer.max_epochs out and set alternate.epochs."
            )
        trainer.fit_loop.max_epochs = weight_steps * self.epochs
        reload: int = getattr(trainer, "reload_dataloaders_every_n_epochs", 0)
        if weight_steps and reload != 1:
            raise ValueError(
                f"each epoch has batches of its own: set Trainer(reload_dataloaders_every_n_epochs=1), it is {reload}."
            )

    @torch.no_grad()
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, data = _ours(trainer, pl_module)
        data.between_batches = lambda: self._between_batches(trainer)
        self._clock = self._saved_at = time.perf_counter()
        if not self.history:
            self._usage, self._spent = module.lm.usage, Usage(**vars(module.lm.usage))
            self._incumbent = module.prompts
            self._arrive(trainer, step="", rollouts=self._score(module, data.splits.val, "vanilla"))
        else:
            module.lm.usage = self._usage
        self._until_weights(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resumed_from = {}  # by now Lightning has restored it
        self._saved_step = trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.epoch == 0 and self.weights == "fresh":
            for optimizer in trainer.optimizers:
                optimizer.state.clear()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Dropout draws the same numbers whether or not the run was stopped before. At the epoch's start would be too
        # early: loaders draw a seed when they are made, which happens before it in a run and after it in a resumed one.
        torch.manual_seed(_seed(self.seed, "train", self.position, self.epoch, batch_idx))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        crash_point("optimizer-step")
        if self._epoch_sums:
            add_epoch_sums(trainer, self._epoch_sums)
            self._epoch_sums = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        behind_an_epoch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if trainer.state.fn == "fit" and not trainer.sanity_checking and behind_an_epoch:
            # In a resumed validation Lightning would count on from where it was saved.
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset()
            self._before_validation = dict(vars(self._usage))
            # The last epoch is followed by more than its validation before a boundary is reached.
            self._after_step(trainer, due=self.epoch + 1 == self.epochs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._before_validation = {}
            module, _ = _ours(trainer, pl_module)
            self._offer_epoch(module, list(module.evaluated))
            score = mean_score(module.evaluated)
            say_if_piped(f"{self._title('weight step')}: epoch {self.epoch + 1}/{self.epochs}, val score {score:.3f}")

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epoch += 1
        module, data = _ours(trainer, pl_module)
        log_epoch_sums(module, self._epoch_sums)
        self._epoch_sums = {}
        data.epoch = self.epoch
        if self.average_last and self.epoch > self.epochs - self.average_last:
            self._late = _added(self._late, module.lm.adapter_state())
        if self.epoch < self.epochs:
            if self._save_is_due(trainer) or module.lm.store is None:
                self._save(trainer)
            return
        with training_bar_paused(trainer):
            self._end_weight_step(trainer)
            self._until_weights(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._before_validation and self._stop_requested and trainer.global_step > self._saved_step:
            vars(self._usage).update(self._before_validation)
            self._save_inside_epoch(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": list(self.steps),
            "epochs": self.epochs,
            "history": self.history,
            "epoch": self.epoch,
            "incumbent": prompts_to_dict(self._incumbent),
            "best": self._best,
            "best_epoch": self._best_epoch,
            "late": self._late,
            "val_scores": self._val_scores,
            "report": vars(self._report),
            "collected": self._collected,
            "usage": vars(self._usage),
            "spent": vars(self._spent),
            "elapsed": self._elapsed,
            "epoch_sums": self._epoch_sums,
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._resumed_from = {name: checkpoint[name] for name in _TRAINERS_OWN if name in checkpoint}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Prompt steps that wait at a resumed run's start run before Lightning has restored optimiser and loops: as far
        # as these are concerned the run is still where its checkpoint was.
        checkpoint.update(self._resumed_from)
        if self._before_validation:
            # Behind an epoch's last step: as Lightning has it inside the validation's first batch, so that a resumed
            # run begins with the validation. With no batch begun it would take the validation as done.
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            for count in (progress["total"], progress["current"]):
                count.update(ready=1, started=1, processed=0, completed=0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved, mine = (
            {"schedule": " -> ".join(steps), "epochs": epochs}
            for steps, epochs in ((state_dict["steps"], state_dict["epochs"]), (self.steps, self.epochs))
        )
        for name in mine:
            if saved[name] != mine[name]:
                raise ValueError(
                    f"the checkpoint was made with alternate.{name} {saved[name]}, this run has {mine[name]}. "
                    "Continue with the same, or start a new run."
                )
        self.history, self.epoch = state_dict["history"], state_dict["epoch"]
        self._incumbent = prompts_from_dict(state_dict["incumbent"])
        self._best, self._best_epoch = state_dict["best"], state_dict["best_epoch"]
        self._late, self._val_scores = state_dict.get("late", {}), state_dict.get("val_scores", {})
        self._report, self._collected = Report(**state_dict["report"]), state_dict["collected"]
        self._usage, self._spent = Usage(**state_dict["usage"]), Usage(**state_dict["spent"])
        self._elapsed, self._epoch_sums = state_dict["elapsed"], state_dict["epoch_sums"]

    # What happens at a boundary

    @property
    def position(self) -> int:
        """Steps of the schedule that are behind."""
        return max(len(self.history) - 1, 0)

    @property
    def best(self) -> dict[str, Any]:
        """The record of the prefix that the fit ends with."""
        record: dict[str, Any] = self.history[self._best["index"]]
        return record

    def _until_weights(self, trainer: Trainer) -> None:
        """Runs prompt steps up to the next weight step and begins that, or ends the schedule."""
        while self.position < len(self.steps) and self.steps[self.position] == "p":
            self._prompt_step(trainer)
        if self.position < len(self.steps):
            self._begin_weight_step(trainer)
        else:
            self._finish(trainer)

    def _prompt_step(self, trainer: Trainer) -> None:
        module, data = _ours(trainer)
        with StepProgress(self._title("prompt step")) as progress:
            task = SearchTask(
                runner=module.runner(data.metric),
                initial=module.initial_prompts,
                incumbent=module.prompts,
                train=self._search_examples(data),
                dev=data.splits.dev,
                threshold=data.bootstrapping.threshold,
                seed=_seed(self.seed, "search", self.position),
                lm_calls=self._calls_left(data) if self.position == len(self.steps) - 1 else 0,
                progress=progress,
            )
            with isolate_rng():
                found = self.search.search(task)
        module.prompts = found.prompts
        self._arrive(trainer, step="p", rollouts=self._score(module, data.splits.val, "val"), found=found)

    def _begin_weight_step(self, trainer: Trainer) -> None:
        module, data = _ours(trainer)
        folder = self._folder(trainer) / "traces" / f"step-{self.position + 1}"
        resumed = self._collected
        if resumed:
            traces = data.reuse_traces(module.program) or load_traces(folder, module.program)
        else:
            traces = self._collect(module, data, folder)
            if data.bootstrapping.pairs == "initial":
                module.prompts = module.initial_prompts
            if self.weights == "fresh" and "w" in self.steps[: self.position]:
                module.lm.reset_adapter(seed=_seed(self.seed, "adapter", self.position))
            _record_prompts(module.prompts, folder / "prompts.json")
        self._coverage = trace_coverage(traces, data.splits.train)
        maker = PairMaker(
            module.program,
            module.form,
            module.prompts,
            module.lm.encode,
            end_id=module.lm.end_ids[0],
            pad_id=module.lm.pad_id,
            window=module.lm.window,
        )
        left_out = data.begin_weight_step(traces, maker, step=self.position, epoch=self.epoch)
        if left_out:
            print(f"{left_out} of {len(traces)} traces do not fit the model's window and are left out.")
        steps = -(-data.steps_per_epoch // trainer.accumulate_grad_batches)
        # A checkpoint from inside an epoch knows how far the rate has come.
        module.begin_weight_step(steps=steps * self.epochs, done=module.weight_step if resumed else 0)
        if not resumed:
            self._collected = True
            self._save_unless_too_soon(trainer)

    def _between_batches(self, trainer: Trainer) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.current.completed % trainer.accumulate_grad_batches == 0:
            self._after_step(trainer)

    def _after_step(self, trainer: Trainer, *, due: bool = False) -> None:
        """Right after an optimiser step: saves where it is due, or the process is to end."""
        if due or self._stop_requested or self._save_is_due(trainer):
            self._save_inside_epoch(trainer)
        if self.stopping is not None:
            self.stopping.check()

    def _save_inside_epoch(self, trainer: Trainer) -> None:
        before = self._epoch_sums  # of a part before an interruption, if no batch has been trained on since
        self._epoch_sums = before or epoch_sums(trainer)
        self._save(trainer)
        self._epoch_sums = before

    @property
    def _stop_requested(self) -> bool:
        return self.stopping is not None and self.stopping.requested is not None

    def _save_unless_too_soon(self, trainer: Trainer) -> None:
        """Saves, unless that would cost too much and what has happened since can be gone through again quickly."""
        module, _ = _ours(trainer)
        if self.save_every != "auto" or module.lm.store is None or self._save_is_due(trainer):
            self._save(trainer)

    def _save_is_due(self, trainer: Trainer) -> bool:
        if self.save_every == "auto":
            return time.perf_counter() - self._saved_at >= self._saving_takes / _SAVING_SHARE
        return trainer.global_step - self._saved_step >= self.save_every

    def _collect(self, module: ProgramModule, data: TraceDataModule, folder: Path) -> list[Trace]:
        reused = data.reuse_traces(module.program)
        if reused is not None:
            self._report = Report(examples=len({trace.example for trace in reused}))
            return reused
        train = data.splits.train
        with StepProgress(self._title("traces")) as progress, isolate_rng():
            progress.start(len(train), "collecting")
            traces, self._report = collect(
                train,
                program=module.program,
                lm=module.lm,
                template=module.form,
                prompts=module.prompts,
                metric=data.metric,
                sampling=module.sampling,
                options=data.bootstrapping,
                seed=_seed(self.seed, "traces", self.position),
                max_error_rate=module.max_error_rate,
                progress=progress.advance,
                encode_text=module.lm.encode.text,
            )
            progress.say(str(self._report))
        if not traces:
            raise NoTracesError(_no_traces(self._report, module.program, data))
        save_traces(traces, folder)
        return traces

    def _offer_epoch(self, module: ProgramModule, done: list[Rollout]) -> None:
        """Keeps this epoch's adapter if val says it is the best of the weight step so far."""
        score = mean_score(done)
        if not self._best_epoch or not self.keep_best_epoch or score > self._best_epoch["score"]:
            self._best_epoch = {"score": score, "epoch": self.epoch + 1, "adapter": module.lm.adapter_state()}

    def _end_weight_step(self, trainer: Trainer) -> None:
        module, data = _ours(trainer)
        if not self._best_epoch:  # validation is switched off, or comes more rarely than weight steps end
            self._offer_epoch(module, self._score(module, data.splits.val, "val"))
        if self._late:
            self._offer_average(module, data)
        module.lm.load_adapter_state(self._best_epoch["adapter"])
        done = self._score(module, data.splits.val, "pairs' prompts")
        tried: dict[str, tuple[Prompts, list[Rollout]]] = {self._pairs_name(module): (module.prompts, done)}
        if self.try_both_prompts and prompts_id(self._incumbent) != prompts_id(module.prompts):
            other = self._score(module, data.splits.val, "prompts from before", prompts=self._incumbent)
            tried["current"] = (self._incumbent, other)
        # The pairs' own prompts come first, so a tie keeps them: these weights were made for them.
        kept = max(tried, key=lambda name: mean_score(tried[name][1]))
        module.prompts, done = tried[kept]
        scores = {name: mean_score(rollouts) for name, (_, rollouts) in tried.items()}
        more = {"epoch": self._best_epoch["epoch"], "averaged": self._best_epoch.get("averaged", 0)}
        self.epoch, self._best_epoch, self._collected, self._late = 0, {}, False, {}
        more |= {"traces": self._report, "coverage": self._coverage}
        self._arrive(trainer, step="w", rollouts=done, scores=scores, **more)

    def _offer_average(self, module: ProgramModule, data: TraceDataModule) -> None:
        """Keeps the average of the late epochs' adapters if val says it is the best, or the last is to be kept."""
        count = self._late["count"]
        average = {name: tensor / count for name, tensor in self._late["sum"].items()}
        module.lm.load_adapter_state(average)
        score = mean_score(self._score(module, data.splits.val, f"average of {count} epochs"))
        if not self.keep_best_epoch or score > self._best_epoch["score"]:
            self._best_epoch = {"score": score, "epoch": self.epoch, "adapter": average, "averaged": count}

    def _arrive(
        self,
        trainer: Trainer,
        *,
        step: str,
        rollouts: list[Rollout],
        scores: dict[str, float] | None = None,
        found: Found | None = None,
        **more: Any,
    ) -> None:
        """Records a boundary, remembers it if it is the best so far, tells the listeners and saves."""
        crash_point("boundary-before")
        module, data = _ours(trainer)
        index, score, cost = len(self.history), mean_score(rollouts), self._cost(module)
        if self.test_prefixes:
            more["tested"] = self._score(module, data.splits.test, "test")
            more["test_cost"] = self._cost(module)
        before = self._val_scores if index else None
        boundary = Boundary(
            index=index,
            step=step,
            prefix=prefix_name(self.steps, index),
            prompts=module.prompts,
            previous=self._incumbent,
            val_score=score,
            scores=scores or {"current": score},
            rollouts=rollouts,
            cost=cost,
            diagnosis=diagnose(rollouts, before, threshold=data.bootstrapping.threshold),
            found=found,
            notes=found.notes if found else (),
            **more,
        )
        self.history.append(boundary.record())
        self._val_scores = {rollout.example.id: rollout.score for rollout in rollouts}
        self._incumbent = module.prompts
        if self.keep == "last" or not self._best or score > self._best["score"]:
            self._best = {
                "index": index,
                "score": score,
                "prompts": prompts_to_dict(module.prompts),
                "adapter": module.lm.adapter_state(),
            }
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, BoundaryListener):
                callback.on_boundary(trainer, module, boundary)
        # At the end of the schedule the best prefix is saved instead, right after this.
        if index < len(self.steps):
            self._save_unless_too_soon(trainer)
        crash_point("boundary-after")

    def _finish(self, trainer: Trainer) -> None:
        """The schedule is over: the module becomes the best prefix, and the fit loop has nothing left to do."""
        module, _ = _ours(trainer)
        module.prompts = prompts_from_dict(self._best["prompts"])
        module.lm.load_adapter_state(self._best["adapter"])
        trainer.limit_train_batches = 0  # with no epoch left, no loader is asked for
        self._save(trainer)

    # Small parts

    def _score(
        self, module: ProgramModule, examples: Sequence[Example], what: str, prompts: Prompts | None = None
    ) -> list[Rollout]:
        _, data = _ours(module.trainer)
        with StepProgress(self._title("validation")) as progress, isolate_rng():
            progress.start(len(examples), what)
            return module.rollouts(examples, metric=data.metric, prompts=prompts, progress=progress.advance)

    def _search_examples(self, data: TraceDataModule) -> list[Example]:
        train = list(data.splits.train)
        if self.search_examples is None or self.search_examples >= len(train):
            return train
        return random.Random(_seed(self.seed, "examples", self.position)).sample(train, self.search_examples)

    def _calls_left(self, data: TraceDataModule) -> int:
        """LM calls that the last search may make, so that with the scoring behind it the run has made `lm_calls`."""
        if self.lm_calls is None:
            return 0
        spent = sum(int(record["lm_calls"]) for record in self.history)
        return max(self.lm_calls - spent - int(self.history[0]["lm_calls"]), 1)

    def _cost(self, module: ProgramModule) -> dict[str, Any]:
        """What the LM and the clock say has been spent since the last boundary."""
        usage, now = module.lm.usage, time.perf_counter()
        spent = usage.since(vars(self._spent))
        self._spent = Usage(**vars(usage))
        seconds, self._elapsed, self._clock = self._elapsed + now - self._clock, 0.0, now
        return {
            "lm_calls": spent["calls"],
            "prompt_tokens": spent["prompt_tokens"],
            "completion_tokens": spent["completion_tokens"],
            "too_long": spent["too_long"],
            "cached_calls": spent["cached"],
            "generating_seconds": round(spent["seconds"], 3),
            "seconds": round(seconds, 3),
        }

    def _save(self, trainer: Trainer) -> None:
        started = time.perf_counter()
        self._elapsed, self._clock = self._elapsed + started - self._clock, started
        if self._checkpoints is None:
            self._checkpoints = Checkpoints(self._folder(trainer) / "checkpoints")
        self._checkpoints.save(trainer)
        self._saved_at, self._saved_step = time.perf_counter(), trainer.global_step
        self._saving_takes = self._saved_at - started

    def _folder(self, trainer: Trainer) -> Path:
        return Path(self.folder or trainer.default_root_dir)

    @property
    def epoch_title(self) -> str:
        """The epoch under way, e.g. "[1/3] epoch 2/18"."""
        return self._title(f"epoch {self.epoch + 1}/{self.epochs}")

    def _title(self, what: str) -> str:
        return f"[{self.position}/{len(self.steps)}] {what}"

    @staticmethod
    def _pairs_name(module: ProgramModule) -> str:
        return "initial" if prompts_id(module.prompts) == prompts_id(module.initial_prompts) else "current"


def _ours(trainer: Trainer, module: LightningModule | None = None) -> tuple[ProgramModule, TraceDataModule]:
    return module or trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined, return-value]


def _check_setup(trainer: Trainer, module: LightningModule) -> None:
    data = getattr(trainer, "datamodule", None)
    if not isinstance(module, ProgramModule) or not isinstance(data, TraceDataModule):
        raise TypeError(
            f"Alternate works with a ProgramModule and a TraceDataModule; this fit has {type(module).__name__} and "
            f"{type(data).__name__}. Call trainer.fit(module, datamodule=data)."
        )
    if trainer.world_size > 1:
        raise NotImplementedError(
            f"this fit has {trainer.world_size} processes; Alternate runs in one for now. Set trainer.devices to 1."
        )
    for name in ("dev", "val"):
        if not getattr(data.splits, name):
            raise ValueError(f"the {name} set is empty, and steps are chosen by its scores; set data.sizes.{name}.")
    if data.bootstrapping.gold_answers and not _labels_fill_a_stage(module.program, data):
        labels = sorted({name for example in data.splits.train for name in example.labels})
        stages = "; ".join(f"{name}: {', '.join(s.signature.outputs)}" for name, s in module.program.stages.items())
        raise ValueError(
            "data.bootstrapping.gold_answers is true, but the labels give no stage all that it writes "
            f"(labels: {', '.join(labels) or 'none'}; stages: {stages}). Set it to false; for stages "
            "that reason there is data.bootstrapping.hints."
        )


def _labels_fill_a_stage(program: Program, data: TraceDataModule) -> bool:
    labels = {name for example in data.splits.train for name, value in example.labels.items() if value is not None}
    return any(set(stage.signature.outputs) <= labels for stage in program.stages.values())


def _added(late: dict[str, Any], adapter: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A sum of adapters with one more in it; plain types, as checkpoints hold it."""
    if not late:
        return {"count": 1, "sum": adapter}
    return {"count": late["count"] + 1, "sum": {name: late["sum"][name] + t for name, t in adapter.items()}}


_TRAINERS_OWN = ("epoch", "global_step", "loops", "optimizer_states", "lr_schedulers", "MixedPrecision")
"""Entries of a checkpoint that Lightning restores only after `on_fit_start`."""


def _seed(*parts: Any) -> int:
    """A 31-bit seed from what it is for."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:4], "big") >> 1


def _record_prompts(prompts: Prompts, path: Path) -> None:
    """Writes the prompts that stand in the training pairs, for `cotune preview`."""
    write_durably(path, json.dumps(prompts_to_dict(prompts), ensure_ascii=False, indent=2))


def _no_traces(report: Report, program: Program, data: TraceDataModule) -> str:
    options = data.bootstrapping
    offered = not options.gold_answers and _labels_fill_a_stage(program, data)
    return (
        f"weight step: no run reached a score of {options.threshold:g}, so there is nothing to train on: {report}. "
        f"{advice_without_traces(report, options, gold_answers=offered)}"
    )
