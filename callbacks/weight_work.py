"""WeightWork: what weight steps consist of: runs, the rows that are learnt from, and a choice among epochs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cotune.callbacks.course import Course
from cotune.callbacks.diagnosis import sampled_apart, trace_coverage
from cotune.callbacks.epoch_choice import Adapter, EpochChoice
from cotune.callbacks.progress import StepProgress, say, say_if_piped
from cotune.callbacks.schedule import PROMPTS
from cotune.callbacks.setup_checks import no_traces, ours
from cotune.datamodules import (
    Attempt,
    Collected,
    NoTracesError,
    Report,
    Trace,
    TraceDataModule,
    collect,
    collect_runs,
    load_traces,
    save_traces,
)
from cotune.lightning_modules import ProgramModule
from cotune.lightning_modules.objectives import Objective, Reference
from cotune.lightning_modules.training.reference import drawn_by
from cotune.programs import (
    Prompts,
    mean_score,
    prompts_id,
    prompts_to_dict,
)
from cotune.storage.durable import write_durably
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng


class WeightWork:
    """Does the weight steps of a schedule, up to where their result is scored.

    Attributes:
        report, coverage: of the rows that the step under way is trained on.
        choice: among its epochs.
        start: the adapter at the last boundary.
        undone: the gate undid the last weight step, so what the optimiser remembers are gradients of other weights.
    """

    def __init__(self, course: Course) -> None:
        self.course = course
        self.report, self.coverage = Report(), dict[str, Any]()
        self.undone = False
        self._average: Adapter = {}  # the moving average that teaches in the step under way
        self.begin_next({})

    def begin_next(self, adapter: Adapter) -> None:
        """A boundary is reached, with this adapter."""
        self.start, self._average = adapter, {}
        options = self.course.options
        self.choice = EpochChoice(keep_best=options.keep_best_epoch, average_last=options.average_last)

    def collect(self, trainer: Trainer, run: Path, *, rounds: int) -> bool:
        """Collects what the next rounds train on, with `rounds` of the weight step done.

        Returns:
            Whether the step goes on: objectives that learn from runs of their own may find nothing in them.

        Raises:
            NoTracesError: no run passed, where those that did are learnt from.
        """
        module, data = ours(trainer)
        prompts = self._pairs_prompts(module, data)
        reference = self.objective.reference
        if reference and reference.prompts == "before" and prompts_id(prompts) == prompts_id(self.course.incumbent):
            title = self.course.title("weight step")
            say(f"{title}: the prompts are still the program's own, so there is nothing to distil")
            self.report, self.coverage = Report(), {}
            return False
        try:
            traces = self._traces(module, data, self._folder(run, rounds), rounds)
        except NoTracesError as error:
            if self.objective.runs is None:
                raise
            say(str(error))
            if not rounds:
                self.coverage = {}  # nothing is trained on
            return False
        if not rounds:
            module.prompts = prompts
            if self.course.options.weights == "fresh" and set(self.course.schedule[: self.course.position]) - {PROMPTS}:
                module.weights.reset_adapter(seed=self.course.seed("adapter", self.course.position))
        # For `cotune preview`: the prompts that stand in the training pairs.
        text = json.dumps(prompts_to_dict(prompts), ensure_ascii=False, indent=2)
        module.ranks.once(lambda: write_durably(self._folder(run, rounds) / "prompts.json", text))
        self._train_on(trainer, traces, rounds)
        done = module.optimiser_step if rounds else 0
        left = self.epochs - rounds
        module.begin_weight_step(steps=done + left * _steps_an_epoch(trainer, data), done=done)
        module.set_rate()
        return True

    def resume_training(self, trainer: Trainer, run: Path, *, rounds: int) -> None:
        """Takes up a weight step where its checkpoint left it, with `rounds` of it done."""
        module, data = ours(trainer)
        collected = rounds if self.course.settings.rounds else 0
        traces = self._reused(module, data) or load_traces(self._folder(run, collected), module.program)
        self._train_on(trainer, traces, rounds)

    def epoch_scored(self, module: ProgramModule, *, rounds: int) -> None:
        """Lightning has run the program on val after a training epoch."""
        score = mean_score(module.evaluated)
        self.choice.offer(score, module.lm.adapter_state(), epoch=rounds + 1)
        say_if_piped(f"{self.course.title('weight step')}: epoch {rounds + 1}/{self.epochs}, val score {score:.3f}")

    def epoch_ended(self, module: ProgramModule) -> None:
        """A training epoch is over."""
        self.choice.epoch_ended(module.lm.adapter_state())

    @property
    def epochs(self) -> int:
        """Training epochs of the weight step under way."""
        return self.course.settings.epochs_or_rounds

    @property
    def objective(self) -> Objective:
        """What the weight step under way learns from."""
        return self.course.settings.learns

    def _pairs_prompts(self, module: ProgramModule, data: TraceDataModule) -> Prompts:
        """Those that stand in the training rows of the step under way."""
        wanted = self.objective.runs
        which = data.bootstrapping.pairs if wanted is None else wanted.prompts
        return module.initial_prompts if which == "initial" else self.course.incumbent

    def _reused(self, module: ProgramModule, data: TraceDataModule) -> list[Trace] | None:
        """The traces of another run, where the objective takes any."""
        return data.reuse_traces(module.program) if self.objective.runs is None else None

    def _folder(self, run: Path, rounds: int) -> Path:
        folder = run / "traces" / f"step-{self.course.position + 1}"
        return folder / f"round-{rounds + 1}" if rounds else folder

    def _train_on(self, trainer: Trainer, traces: list[Trace], rounds: int) -> None:
        module, data = ours(trainer)
        as_drawn = self.objective.runs is not None
        self.coverage = trace_coverage(traces, data.splits.train)
        if as_drawn:  # by runs that need not have passed
            self.coverage["learnt"] = len({trace.example for trace in traces})
        if silent := set(module.program.stages) - {trace.stage for trace in traces}:
            say(f"no training row is of stage {', '.join(sorted(silent))}: it learns only from the other stages' rows.")
        maker = module.pair_maker(module.prompts)
        left_out = data.begin_weight_step(traces, maker, step=self.course.position, epoch=rounds, as_drawn=as_drawn)
        if left_out:
            say(f"{left_out} of {len(traces)} traces do not fit the model's window and are left out.")
        module.full_rate, module.objective = self.course.settings.lr, self.objective

    def _traces(self, module: ProgramModule, data: TraceDataModule, folder: Path, rounds: int) -> list[Trace]:
        reused = self._reused(module, data)
        if reused is not None:
            count = len({trace.example for trace in reused})
            self.report = Report(examples=count, solved_at_attempt=[count])
            return reused
        train, objective = data.splits.train, self.objective
        with StepProgress(self.course.title("traces")) as progress, isolate_rng():
            progress.start(len(train), "collecting")
            given: dict[str, Any] = {
                "options": data.bootstrapping,
                "seed": self.course.seed("traces", self.course.position, *([rounds] if rounds else [])),
                "progress": progress.advance,
                "vocabulary": module.vocabulary,
            }
            runner, prompts = module.runner(data.metric), self._pairs_prompts(module, data)
            if objective.runs is None:
                collected = collect(train, runner, module.prompts, **given)
            else:
                collected = collect_runs(train, runner, prompts, runs=objective.runs, **given)
            traces = objective.rows(collected)
            if not traces and module.trainer.fast_dev_run:  # type: ignore[attr-defined]
                progress.say("these few examples gave nothing to train on, so training is tried with made-up scores")
                traces = objective.rows(_made_up(collected))
            self.report = collected.report(traces)
            remark = objective.said(collected, traces)
            progress.say(f"{self.report}; {remark}" if remark else str(self.report))
        if not traces and objective.runs is not None:
            raise NoTracesError(f"weight step: nothing to learn from ({remark}), so it ends here.")
        if not traces:
            raise NoTracesError(no_traces(self.report, module.program, data))
        if objective.reference is not None:
            shown = self.course.incumbent if objective.reference.prompts == "before" else prompts
            traces = self._referenced(module, traces, objective.reference, shown, rounds)
        module.ranks.once(lambda: save_traces(traces, folder))
        return traces

    def _referenced(
        self, module: ProgramModule, traces: list[Trace], reference: Reference, prompts: Prompts, rounds: int
    ) -> list[Trace]:
        """The traces with what the reference says of them."""
        own = module.lm.adapter_state()
        if reference.weights == "average":
            newest = 1 - reference.decay if rounds else 1.0
            self._average = {n: t.lerp(own[n], newest) for n, t in (self._average or own).items()}
        weights = {"start": self.start, "average": self._average}.get(reference.weights, own)
        others = rounds > 0 and weights is not own
        if others:
            module.lm.load_adapter_state(weights)
        found = module.referenced(traces, prompts, reference)
        if others:
            module.lm.load_adapter_state(own)
        if len(found) < len(traces):
            left_out = f"{len(traces) - len(found)} of {len(traces)} calls"
            say(f"{left_out} do not fit the model's window after the teacher's prompts and are left out.")
        if not found:
            raise NoTracesError("weight step: no call fits the model's window after the teacher's prompts.")
        if reference.weights == "round":
            say(sampled_apart(found))
            found = drawn_by(found)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors."""
        return {
            "report": vars(self.report),
            "coverage": self.coverage,
            "choice": self.choice.state_dict(),
            "start": self.start,
            "average": self._average,
            "undone": self.undone,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.report, self.coverage = Report(**state["report"]), state["coverage"]
        self.choice.load_state_dict(state["choice"])
        self.start, self._average = state["start"], state["average"]
        self.undone = state.get("undone", False)  # older checkpoints lack it


def _made_up(collected: Collected) -> Collected:
    """The runs as if each one that ended had passed at every other attempt, failed at the others."""

    def scored(attempt: Attempt) -> Attempt:
        passes = attempt.rollout.error is None and attempt.number % 2 == 0
        return replace(attempt, rollout=replace(attempt.rollout, score=float(passes)))

    attempts = tuple(map(scored, collected.attempts))
    return replace(collected, attempts=attempts, options=replace(collected.options, cut_traces=True))


def _steps_an_epoch(trainer: Trainer, data: TraceDataModule) -> int:
    """Optimiser steps of one training epoch."""
    batches, limit = data.steps_per_epoch, trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return max(-(-batches // trainer.accumulate_grad_batches), 1)
