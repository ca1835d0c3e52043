"""Alternate: runs prompt steps and weight steps by turns, and ends with the best program they passed through."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from cotune.callbacks.alternation import (
    Alternation,
    Collect,
    CollectionEnded,
    Event,
    Finish,
    RoundEnded,
    Score,
    Scored,
    Search,
    Searched,
    State,
    Train,
)
from cotune.callbacks.checkpoint import check_own
from cotune.callbacks.course import Course, Options
from cotune.callbacks.epoch_end import EpochEnd
from cotune.callbacks.progress import training_bar_paused
from cotune.callbacks.save_policy import SavePolicy
from cotune.callbacks.saver import Saver
from cotune.callbacks.schedule import PROMPTS, WeightStep, parse_schedule, planned, weight_steps
from cotune.callbacks.setup_checks import check_setup, check_teachers, ours
from cotune.callbacks.step_work import StepWork
from cotune.errors import BadValueError, CotuneError
from cotune.programs import Program
from cotune.prompting import CalibratedSearch, PromptSearch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping


class UnfinishedError(CotuneError):
    """A fit has ended and its schedule has not."""


class Alternate(Callback):
    """BetterTogether (arXiv 2407.10930) as a callback: prompt steps between training epochs.

    `on_fit_start` scores the untuned program on val and runs the prompt steps at the start of the schedule. Each weight
    step is `epochs` epochs of training on traces collected just before. At its end the new weights are scored with the
    prompts in the training pairs and with the prompts from before, and the better prompts are kept. Then the following
    prompt steps run. Every prefix of the schedule gets a val score, and the fit ends with the best prefix's weights and
    prompts, unless `keep` is "last". Of equal scores the one that takes fewer tokens is kept. A callback that sets
    `trainer.should_stop`, as EarlyStopping does, ends the current weight step, and the schedule continues.
    A fit that ends before its schedule raises `UnfinishedError`, and resumes from its last checkpoint.

    This callback sets the trainer's number of epochs and makes it reload batches each epoch. At the end it writes
    `export/` for `cotune.load`, through your own `ExportProgram` if you give one.

    Args:
        schedule: e.g. "p -> w -> p": p is a prompt step, the other letters are weight steps: w learns what passing
            runs wrote, d distils the prompts into the weights, k learns from passing and failing runs (KTO), g by
            policy gradient (GRPO), and there are those in `steps`.
        search: the prompt optimiser; null: `CalibratedSearch` around `RandomDemoSearch`.
        steps: letter -> settings of its weight step; other settings are those of all weight steps.
        epochs: of each weight step.
        weights: whether a second weight step continues with adapter and optimiser, or starts fresh from the base.
        keep: "best" (by val) or "last" prefix.
        keep_best_epoch: end a weight step with the adapter of its best epoch by val, not of its last.
        try_both_prompts: score new weights also with the prompts from before the step (the paper keeps the pairs' own).
        gate: undo a weight step that does not improve val: weights and prompts return to those before it.
            Distilled prompts need only be as good. Off: later steps continue from its weights in any case.
        average_last: after a weight step's last epoch, also score the average of the adapters of this many last epochs,
            on val like an epoch; it is kept if it is better than the best epoch (without `keep_best_epoch`: always).
            Where the step is stopped early these are the last ones it had.
            Late adapters of one training run are near each other, so the average of their factors is nearly the
            average of their products. 0: no average.
        search_examples: how many train examples a prompt step bootstraps from; null for all.
        lm_calls: if the last step is a prompt step, let it try candidates until the run has made this many LM calls, as
            a control for another schedule with as many calls. Null: the search's own size.
        test_prefixes: also score every prefix on test, as tables need it. Nothing is chosen by these scores; each is
            recorded, with its cost apart from the step's. Off: test is run once, at the very end.
        save_every: optimiser steps between two saves. A kill can lose these steps, and an epoch's last step as well.
            Boundaries and the end of each weight step's training are saved too. "auto" saves as often as it can while
            saving takes under 2 % of the time. It then skips a boundary soon after a save, if stored completions can
            repeat it in moments. No result depends on this option.
        folder: where checkpoints and traces go; null: the trainer's default_root_dir. From Python only: on the command
            line all of a run is in <runs_dir>/<name>.
        seed: of the searches and the trace collections.

    Attributes:
        steps: letter -> settings of its weight step, whole.
        state: where in the schedule the run is.
        work: what is known of the finished steps; it does the remaining ones.
    """

    def __init__(
        self,
        schedule: str = "p -> w -> p",
        search: PromptSearch | None = None,
        *,
        steps: dict[str, WeightStep] | None = None,
        epochs: int = 5,
        weights: Literal["continue", "fresh"] = "continue",
        keep: Literal["best", "last"] = "best",
        keep_best_epoch: bool = True,
        try_both_prompts: bool = True,
        gate: bool = True,
        average_last: int = 0,
        search_examples: int | None = None,
        lm_calls: int | None = None,
        test_prefixes: bool = False,
        save_every: int | Literal["auto"] = "auto",
        folder: str | None = None,
        seed: int = 0,
    ) -> None:
        options = Options(
            epochs=epochs,
            weights=weights,
            keep=keep,
            keep_best_epoch=keep_best_epoch,
            try_both_prompts=try_both_prompts,
            gate=gate,
            average_last=average_last,
            search_examples=search_examples,
            lm_calls=lm_calls,
            test_prefixes=test_prefixes,
            seed=seed,
        )
        self.steps: Mapping[str, WeightStep] = weight_steps(steps, epochs=epochs)
        self.schedule = parse_schedule(schedule, self.steps)
        if lm_calls is not None and self.schedule[-1] != PROMPTS:
            raise BadValueError(
                f'lm_calls needs a schedule that ends with "p"; this is "{" -> ".join(self.schedule)}".'
            )
        self.alternation = Alternation(planned(self.schedule, self.steps))
        self.state = State()
        self.work = StepWork(Course(self.schedule, self.steps, options), search or CalibratedSearch())
        self.saver = Saver(SavePolicy(save_every), folder)
        self._resumed_from = "the checkpoint"
        self._early: list[tuple[EarlyStopping, dict[str, Any]]] = []  # each as it was before any epoch

    # What Lightning calls

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        check_setup(trainer, pl_module, self.alternation)
        module = ours(trainer, pl_module)[0]
        check_teachers(module, self.schedule, self.steps, fresh=self.options.weights == "fresh")
        self.narrow_search(module.program)
        # The alternation counts; Lightning goes on until it is told that nothing is left.
        trainer.fit_loop.max_epochs = -1
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._rehearse(trainer)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._early = [(c, copy.deepcopy(c.state_dict())) for c in callbacks if isinstance(c, EarlyStopping)]
        callbacks.append(EpochEnd(self._epoch_ended))
        from cotune.callbacks.export_program import ExportProgram  # which asks whether the schedule has ended

        if not any(isinstance(callback, ExportProgram) for callback in callbacks):
            callbacks.append(ExportProgram())  # so that `cotune.load` works however the fit was started

    @torch.no_grad()
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saver.policy.began(trainer.global_step)
        self.work.begin(ours(trainer, pl_module)[0])
        if isinstance(self.alternation.wanted(self.state), Train):
            self.work.weight.resume_training(trainer, self.saver.run_folder(trainer), rounds=self.state.rounds)
        self._go_on(trainer)

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saver.restored(trainer)
        self._end_if_finished(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not when it is decided: a resumed run has its optimisers' state only after `on_fit_start`.
        if self.state.rounds == 0 and (self.options.weights == "fresh" or self.work.weight.undone):
            for optimizer in trainer.optimizers:
                optimizer.state.clear()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Dropout draws the same numbers whether or not the run was stopped before. At the epoch's start would be too
        # early: loaders draw a seed when they are made, which happens before it in a run and after it in a resumed one.
        self.saver.step_begins(trainer)
        torch.manual_seed(self.work.course.seed("train", self.position, self.state.rounds, batch_idx))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Saved after an epoch's last batch, a run would go on with the next epoch, past this one's validation and end.
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self.saver.step_ended(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.work.weight.epoch_scored(ours(trainer, pl_module)[0], rounds=self.state.rounds)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.finished:
            raise UnfinishedError(
                f"the fit ended in step {self.position + 1} of {len(self.schedule)} ({' -> '.join(self.schedule)}), "
                "because something outside the schedule stopped the trainer. The same command resumes."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.saver.close()
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [c for c in callbacks if not isinstance(c, EpochEnd)]  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        return {**self.alternation.saved(self.state), **self.work.state_dict()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._resumed_from = str(trainer.ckpt_path or "the checkpoint")
        if trainer.state.fn == "fit":
            check_own(checkpoint, self._resumed_from)
        if checkpoint["global_step"]:  # before the first step Lightning's own state is as new
            self.saver.wait()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = self.alternation.resumed(state_dict, self._resumed_from)
        self.work.load_state_dict(state_dict)

    def narrow_search(self, program: Program) -> None:
        """Takes the part of the search that has something to do for this program; `setup` does so for each fit."""
        self.work.search = self.search.for_program(program)

    # What others ask

    @property
    def options(self) -> Options:
        return self.work.course.options

    @property
    def search(self) -> PromptSearch:
        return self.work.search

    @property
    def finished(self) -> bool:
        """Whether the schedule has come to its end. However else a fit ended, it is to be continued."""
        return self.state.finished

    @property
    def position(self) -> int:
        """Steps of the schedule that are done."""
        return self.work.course.position

    @property
    def history(self) -> list[dict[str, Any]]:
        """A record of each boundary so far."""
        return self.work.course.history

    @property
    def best(self) -> dict[str, Any]:
        """The record of the prefix that the fit ends with."""
        return self.work.best_record

    @property
    def epoch_title(self) -> str:
        """The epoch under way, e.g. "[1/3] epoch 2/18"."""
        return self.work.course.title(f"epoch {self.state.rounds + 1}/{self.work.weight.epochs}")

    # From one step to the next

    @torch.no_grad()
    def _epoch_ended(self, trainer: Trainer) -> None:
        """A training epoch is over, and every other callback has had its say about it."""
        module, data = ours(trainer)
        stop, trainer.should_stop = trainer.should_stop, False
        self._advance(RoundEnded(stop))
        data.epoch = self.state.rounds
        self.work.weight.epoch_ended(module)
        wanted = self.alternation.wanted(self.state)
        if isinstance(wanted, Train):
            self.saver.epoch_ended(trainer, stored=module.lm.store is not None)
            return
        if isinstance(wanted, Score):
            for callback, before in self._early:
                callback.load_state_dict(copy.deepcopy(before))
            self.saver.save(trainer)
        with training_bar_paused(trainer):
            self._go_on(trainer)
        self._end_if_finished(trainer)

    def _rehearse(self, trainer: Trainer) -> None:
        """Makes a `fast_dev_run` of it: the whole schedule, a batch of each set, an epoch a weight step.

        Lightning would train so many batches in all, which the first weight step would use up.
        """
        trainer.fit_loop.epoch_loop.max_steps = -1
        ours(trainer)[1].rehearse(int(trainer.fast_dev_run))  # type: ignore[attr-defined]
        self.work.course.rehearse()
        self.steps = self.work.course.steps
        self.alternation = Alternation(planned(self.schedule, self.steps))

    def _go_on(self, trainer: Trainer) -> None:
        """Does what is wanted next, until that is training, or nothing."""
        module, data = ours(trainer)
        while not isinstance(wanted := self.alternation.wanted(self.state), Train | Finish):
            if isinstance(wanted, Search):
                self.work.search_prompts(trainer, self.saver.run_folder(trainer))
                self._advance(Searched())
                continue  # what was found is not kept before it has been scored
            if isinstance(wanted, Collect):
                goes_on = self.work.weight.collect(trainer, self.saver.run_folder(trainer), rounds=self.state.rounds)
                self._advance(CollectionEnded())
                if not goes_on:
                    self._advance(RoundEnded(stop=True))
            else:
                self.work.reach_boundary(trainer, rounds=self.state.rounds)
                self._advance(Scored())
            if not self.state.finished:  # then the best prefix is saved instead, right after this
                self.saver.save_unless_too_soon(trainer, stored=module.lm.store is not None)
        if self.state.finished:
            self.work.take_best(module)
            data.nothing_to_train()
            self.saver.save(trainer)

    def _end_if_finished(self, trainer: Trainer) -> None:
        if self.state.finished:
            trainer.fit_loop.max_epochs = trainer.current_epoch  # Lightning has had all its epochs

    def _advance(self, event: Event) -> None:
        self.state = self.alternation.after(self.state, event)


def ended(trainer: Trainer) -> bool:
    """Whether a fit has come to the end of its schedule; one without a schedule has."""
    found = [c for c in trainer.callbacks if isinstance(c, Alternate)]  # type: ignore[attr-defined]
    return all(callback.finished for callback in found)
