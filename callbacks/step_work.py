"""StepWork: what the steps of a schedule consist of, on a module and its data: search, collection, scores, boundaries.

What comes when is the alternation's to say, and what is saved when the save policy's.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cotune.callbacks.approval import Approval
from cotune.callbacks.boundary import Boundary, BoundaryListener, judge_noise
from cotune.callbacks.costs import Costs
from cotune.callbacks.diagnosis import diagnose, nothing_gained, sampled_apart, trace_coverage
from cotune.callbacks.epoch_choice import Adapter, EpochChoice
from cotune.callbacks.progress import StepProgress, say, say_if_piped
from cotune.callbacks.schedule import PROMPTS, WEIGHTS, WeightStep
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
from cotune.errors import BadValueError
from cotune.lightning_modules import ProgramModule
from cotune.lightning_modules.objectives import Objective, Reference
from cotune.lightning_modules.training.reference import drawn_by
from cotune.programs import (
    Example,
    Prompts,
    Rollout,
    mean_score,
    mean_tokens,
    prompts_from_dict,
    prompts_id,
    prompts_to_dict,
)
from cotune.prompting import Candidate, Found, PromptSearch, SearchTask
from cotune.storage.durable import write_durably
from cotune.storage.schedule_text import name_of
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng


@dataclass(frozen=True)
class Options:
    """How steps are done; see `Alternate`, whose arguments these are."""

    epochs: int = 5
    weights: Literal["continue", "fresh"] = "continue"
    keep: Literal["best", "last"] = "best"
    keep_best_epoch: bool = True
    try_both_prompts: bool = True
    gate: bool = True
    average_last: int = 0
    search_examples: int | None = None
    lm_calls: int | None = None
    test_prefixes: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise BadValueError(f"epochs {self.epochs} is below 1; leave w out of the schedule to train nothing.")
        if self.search_examples is not None and self.search_examples < 1:
            raise BadValueError(f"search_examples {self.search_examples} is below 1; null takes the whole train set.")
        if self.average_last < 0 or self.average_last == 1 or self.average_last > self.epochs:
            raise BadValueError(f"average_last {self.average_last} is none of 0 (off) and 2 to epochs ({self.epochs}).")


class StepWork:
    """Does the steps of a schedule, and keeps what is known of those behind.

    Args:
        schedule: letters of the steps, in order.
        steps: letter -> settings, of the weight steps.
        search: of the prompt steps.

    Attributes:
        history: a record of each boundary so far.
        best: the prefix that the run would end with now: index, score, prompts and adapter.
    """

    def __init__(
        self, schedule: Sequence[str], steps: Mapping[str, WeightStep], search: PromptSearch, options: Options
    ) -> None:
        self.schedule, self.steps, self.search, self.options = tuple(schedule), steps, search, options
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self.costs = Costs()
        self._incumbent: Prompts = {}
        self._val_scores: dict[str, float] = {}  # example -> score at the last boundary
        self._report, self._coverage = Report(), dict[str, Any]()
        self._choice = EpochChoice(keep_best=options.keep_best_epoch)
        self._found: Found | None = None  # by a search that has not been scored yet
        self._start: Adapter = {}  # the adapter at the last boundary
        self._average: Adapter = {}  # the moving average that teaches in the weight step under way
        self._tried: Sequence[Candidate] = ()  # in a search that has not ended

    def begin(self, module: ProgramModule) -> None:
        """A fit begins, or goes on if there is a history."""
        self.costs.begin(module.lm, resumed=bool(self.history))
        if not self.history:
            self._incumbent = module.prompts

    @property
    def position(self) -> int:
        """Steps of the schedule that are behind."""
        return max(len(self.history) - 1, 0)

    @property
    def seconds_before(self) -> float:
        """That earlier processes of a resumed run have taken, up to its checkpoint."""
        return sum(float(record["seconds"]) for record in self.history) + self.costs.seconds_before

    @property
    def best_record(self) -> dict[str, Any]:
        """The record of the prefix that the run would end with now."""
        record: dict[str, Any] = self.history[self.best["index"]]
        return record

    def title(self, what: str) -> str:
        return f"[{self.position}/{len(self.schedule)}] {what}"

    def seed(self, *parts: Any) -> int:
        """A 31-bit seed from what it is for."""
        text = "|".join(map(str, (self.options.seed, *parts)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1

    # Prompt steps

    def search_prompts(self, trainer: Trainer, run: Path) -> None:
        """Searches, and gives the module what was found; what a person is asked about stands in the run's folder.

        Raises:
            ApprovalNeededError: a person is to be asked, and cannot be here.
        """
        module, data = ours(trainer)
        with StepProgress(self.title("prompt step")) as progress:
            self._tried = progress.tried
            task = SearchTask(
                runner=module.runner(data.metric),
                initial=module.initial_prompts,
                incumbent=module.prompts,
                train=self._search_examples(data),
                dev=data.splits.dev,
                threshold=data.bootstrapping.threshold,
                seed=self.seed("search", self.position),
                lm_calls=self._calls_left(),
                progress=progress,
                reviewer=Approval(
                    run / "proposals.yaml",
                    progress.paused,
                    waived=bool(trainer.fast_dev_run),  # type: ignore[attr-defined]
                    ranks=module.ranks,
                ),
            )
            with isolate_rng():
                self._found = self.search.search(task)
        module.prompts = self._found.prompts
        self._tried = []

    def _search_examples(self, data: TraceDataModule) -> list[Example]:
        train, most = list(data.splits.train), self.options.search_examples
        if most is None or most >= len(train):
            return train
        return random.Random(self.seed("examples", self.position)).sample(train, most)

    def _calls_left(self) -> int:
        """LM calls that the last search may make, so that with the scoring behind it the run has made `lm_calls`."""
        if self.options.lm_calls is None or self.position < len(self.schedule) - 1:
            return 0
        spent = sum(int(record["lm_calls"]) for record in self.history)
        return max(self.options.lm_calls - spent - int(self.history[0]["lm_calls"]), 1)

    # Weight steps

    def rehearse(self) -> None:
        """From now on weight steps are one epoch long, as `fast_dev_run` asks."""
        self.steps = {letter: replace(step, epochs=1, rounds=None) for letter, step in self.steps.items()}

    def collect(self, trainer: Trainer, run: Path, *, rounds: int) -> bool:
        """Collects what the next rounds train on, with `rounds` of the weight step behind.

        Returns:
            Whether the step goes on: objectives that learn from runs of their own may find nothing in them.

        Raises:
            NoTracesError: no run passed, where those that did are learnt from.
        """
        module, data = ours(trainer)
        prompts = self._pairs_prompts(module, data)
        reference = self._objective.reference
        if reference and reference.prompts == "before" and prompts_id(prompts) == prompts_id(self._incumbent):
            say(f"{self.title('weight step')}: the prompts in force are the plain ones, so there is nothing to distil")
            self._report, self._coverage = Report(), {}
            return False
        try:
            traces = self._traces(module, data, self._folder(run, rounds), rounds)
        except NoTracesError as error:
            if self._objective.runs is None:
                raise
            say(str(error))
            return False
        if not rounds:
            module.prompts = prompts
            if self.options.weights == "fresh" and set(self.schedule[: self.position]) - {PROMPTS}:
                module.weights.reset_adapter(seed=self.seed("adapter", self.position))
        # For `cotune preview`: the prompts that stand in the training pairs.
        text = json.dumps(prompts_to_dict(prompts), ensure_ascii=False, indent=2)
        module.ranks.once(lambda: write_durably(self._folder(run, rounds) / "prompts.json", text))
        self._train_on(trainer, traces, rounds)
        done = module.weight_step if rounds else 0
        left = self._settings.epochs_or_rounds - rounds
        module.begin_weight_step(steps=done + left * _steps_an_epoch(trainer, data), done=done)
        return True

    def resume_training(self, trainer: Trainer, run: Path, *, rounds: int) -> None:
        """Takes up a weight step where its checkpoint left it, with `rounds` of it behind."""
        module, data = ours(trainer)
        collected = rounds if self._settings.rounds else 0
        traces = self._reused(module, data) or load_traces(self._folder(run, collected), module.program)
        self._train_on(trainer, traces, rounds)

    def epoch_scored(self, module: ProgramModule, *, rounds: int) -> None:
        """Lightning has run the program on val behind a training epoch."""
        score = mean_score(module.evaluated)
        self._choice.offer(score, module.lm.adapter_state(), epoch=rounds + 1)
        epochs = self._settings.epochs_or_rounds
        say_if_piped(f"{self.title('weight step')}: epoch {rounds + 1}/{epochs}, val score {score:.3f}")

    def epoch_ended(self, module: ProgramModule, *, rounds: int) -> None:
        """A training epoch is over, `rounds` of the step with it."""
        if self.options.average_last and rounds > self._settings.epochs_or_rounds - self.options.average_last:
            self._choice.add_to_average(module.lm.adapter_state())

    @property
    def epochs(self) -> int:
        """Training epochs of the weight step under way."""
        return self._settings.epochs_or_rounds

    @property
    def _settings(self) -> WeightStep:
        return self.steps[self.schedule[self.position]]

    @property
    def _objective(self) -> Objective:
        return self._settings.learns

    def _pairs_prompts(self, module: ProgramModule, data: TraceDataModule) -> Prompts:
        """Those that stand in the training rows of the step under way."""
        wanted = self._objective.runs
        which = data.bootstrapping.pairs if wanted is None else wanted.prompts
        return module.initial_prompts if which == "initial" else self._incumbent

    def _reused(self, module: ProgramModule, data: TraceDataModule) -> list[Trace] | None:
        """The traces of another run, where the objective takes any."""
        return data.reuse_traces(module.program) if self._objective.runs is None else None

    def _folder(self, run: Path, rounds: int) -> Path:
        folder = run / "traces" / f"step-{self.position + 1}"
        return folder / f"round-{rounds + 1}" if rounds else folder

    def _train_on(self, trainer: Trainer, traces: list[Trace], rounds: int) -> None:
        module, data = ours(trainer)
        as_drawn = self._objective.runs is not None
        self._coverage = trace_coverage(traces, data.splits.train)
        if as_drawn:  # by runs that need not have passed
            self._coverage["taught"] = len({trace.example for trace in traces})
        if silent := set(module.program.stages) - {trace.stage for trace in traces}:
            say(f"no row is of stage {', '.join(sorted(silent))}: it learns only what the other stages' rows teach.")
        maker = module.pair_maker(module.prompts)
        left_out = data.begin_weight_step(traces, maker, step=self.position, epoch=rounds, as_drawn=as_drawn)
        if left_out:
            say(f"{left_out} of {len(traces)} traces do not fit the model's window and are left out.")
        module.full_rate, module.objective = self._settings.lr, self._objective

    def _traces(self, module: ProgramModule, data: TraceDataModule, folder: Path, rounds: int) -> list[Trace]:
        reused = self._reused(module, data)
        if reused is not None:
            count = len({trace.example for trace in reused})
            self._report = Report(examples=count, solved_at_attempt=[count])
            return reused
        train, objective = data.splits.train, self._objective
        with StepProgress(self.title("traces")) as progress, isolate_rng():
            progress.start(len(train), "collecting")
            given: dict[str, Any] = {
                "options": data.bootstrapping,
                "seed": self.seed("traces", self.position, *([rounds] if rounds else [])),
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
                progress.say("no run of so few examples is learnt from, so training is tried on made-up scores")
                traces = objective.rows(_made_up(collected))
            self._report = collected.report(traces)
            remark = objective.said(collected, traces)
            progress.say(f"{self._report}; {remark}" if remark else str(self._report))
        if not traces and objective.runs is not None:
            raise NoTracesError(f"weight step: nothing to learn from ({remark}), so it ends here.")
        if not traces:
            raise NoTracesError(no_traces(self._report, module.program, data))
        if objective.reference is not None:
            shown = self._incumbent if objective.reference.prompts == "before" else prompts
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
        weights = {"start": self._start, "average": self._average}.get(reference.weights, own)
        others = rounds > 0 and weights is not own
        if others:
            module.lm.load_adapter_state(weights)
        found = module.referenced(traces, prompts, adapter=reference.weights != "base", top_k=reference.top_k)
        if others:
            module.lm.load_adapter_state(own)
        if len(found) < len(traces):
            left_out = f"{len(traces) - len(found)} of {len(traces)} calls"
            say(f"{left_out} do not fit the window behind the prompts that teach, and are left out.")
        if not found:
            raise NoTracesError("weight step: no call fits the model's window behind the prompts that would teach.")
        if reference.weights == "round":
            say(sampled_apart(found))
            found = drawn_by(found)
        return found

    # Boundaries

    def reach_boundary(self, trainer: Trainer, *, rounds: int) -> None:
        """Scores what the step has led to, and records it; `rounds` were trained in it."""
        module, data = ours(trainer)
        if rounds:
            self._end_weight_step(trainer, rounds)
        elif self._found is not None:
            self._record(trainer, PROMPTS, self._score(module, data.splits.val, "val"), found=self._found)
        else:
            self._record(trainer, "", self._score(module, data.splits.val, "vanilla"))

    def take_best(self, module: ProgramModule) -> None:
        """The schedule is over: the module becomes the best prefix."""
        module.prompts = prompts_from_dict(self.best["prompts"])
        module.lm.load_adapter_state(self.best["adapter"])

    def take_best_so_far(self, module: ProgramModule) -> str:
        """The run ends within a step: the module becomes the best prefix, or what a search found beyond it.

        Returns:
            What a search had found; "" for the best prefix.
        """
        self.take_best(module)
        beaten = [one for one in self._tried if one.why == "incumbent"]
        best = max(self._tried, key=lambda one: one.rank, default=None)  # the first of equals
        if not beaten or best is None or best.rank <= beaten[0].rank or self.best["index"] < self.position:
            return ""
        module.prompts = best.prompts
        return f'candidate "{best.why}", {best.score:.3f} on dev (incumbent {beaten[0].score:.3f}), not scored on val'

    def _end_weight_step(self, trainer: Trainer, rounds: int) -> None:
        module, data = ours(trainer)
        choice = self._choice
        if choice.wants(rounds):  # Lightning does not validate here, or not behind every epoch
            done = self._score(module, data.splits.val, "val")
            choice.offer(mean_score(done), module.lm.adapter_state(), epoch=rounds)
        average, count = choice.average()
        if count > 1:
            module.lm.load_adapter_state(average)
            done = self._score(module, data.splits.val, f"average of {count} epochs")
            choice.offer(mean_score(done), average, epoch=rounds, averaged=count)
        module.lm.load_adapter_state(choice.adapter)
        done = self._score(module, data.splits.val, "pairs' prompts")
        initial = prompts_id(module.prompts) == prompts_id(module.initial_prompts)
        tried: dict[str, tuple[Prompts, list[Rollout]]] = {"initial" if initial else "current": (module.prompts, done)}
        if self.options.try_both_prompts and prompts_id(self._incumbent) != prompts_id(module.prompts):
            other = self._score(module, data.splits.val, "prompts from before", prompts=self._incumbent)
            tried["current"] = (self._incumbent, other)
        # The pairs' own prompts come first, so a tie keeps them: these weights were made for them.
        kept = max(tried, key=lambda name: mean_score(tried[name][1]))
        module.prompts, done = tried[kept]
        scores = {name: mean_score(rollouts) for name, (_, rollouts) in tried.items()}
        more: dict[str, Any] = {"traces": self._report, "coverage": self._coverage, "epochs": rounds, **choice.record}
        if self.options.gate and not self._gained(done):
            note = nothing_gained(done, self._val_scores)
            say(f"{self.title('weight step')}: {note}")
            more["notes"] = (note,)
            module.lm.load_adapter_state(self._start)
            module.prompts = self._incumbent
            for optimizer in trainer.optimizers:  # what it remembers are the gradients of those weights
                optimizer.state.clear()
            done = self._score(module, data.splits.val, "weights as before")
        self._choice = EpochChoice(keep_best=self.options.keep_best_epoch)
        self._record(trainer, WEIGHTS, done, scores=scores, **more)

    def _gained(self, done: Sequence[Rollout]) -> bool:
        """Whether a weight step is kept: val is better than before it. Distilled prompts need only be as good."""
        gain = mean_score(done) - float(self.history[-1]["val_score"])
        reference = self._objective.reference
        return gain > 0 or (gain == 0 and reference is not None and reference.prompts == "before")

    def _record(
        self,
        trainer: Trainer,
        step: str,
        rollouts: list[Rollout],
        *,
        scores: dict[str, float] | None = None,
        found: Found | None = None,
        **more: Any,
    ) -> None:
        """Records a boundary, remembers it if it is the best so far, and tells the listeners."""
        module, data = ours(trainer)
        index, score, cost = len(self.history), mean_score(rollouts), self.costs.take()
        if self.options.test_prefixes:
            more["tested"] = self._score(module, data.splits.test, "test")
            more["test_cost"] = self.costs.take()
        more.setdefault("notes", found.notes if found else ())
        before = self._val_scores if index else None
        boundary = Boundary(
            index=index,
            step=step,
            prefix=name_of(self.schedule[:index]),
            prompts=module.prompts,
            previous=self._incumbent,
            val_score=score,
            scores=scores or {"current": score},
            rollouts=rollouts,
            cost=cost,
            diagnosis=diagnose(rollouts, before, threshold=data.bootstrapping.threshold, set_metrics=data.set_metrics),
            found=found,
            judge=judge_noise(data.metric),
            **more,
        )
        self.history.append(boundary.record())
        self._val_scores = {rollout.example.id: rollout.score for rollout in rollouts}
        self._incumbent, self._found, self._start, self._average = module.prompts, None, module.lm.adapter_state(), {}
        rank = (score, -mean_tokens(rollouts))  # of equal scores the cheaper to run; else the earlier
        if self.options.keep == "last" or not self.best or rank > (self.best["score"], -self.best["tokens"]):
            prompts = prompts_to_dict(module.prompts)
            self.best = {"index": index, "score": score, "tokens": -rank[1], "prompts": prompts}
            self.best["adapter"] = module.lm.adapter_state()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, BoundaryListener):
                callback.on_boundary(trainer, module, boundary)

    def _score(
        self, module: ProgramModule, examples: Sequence[Example], what: str, prompts: Prompts | None = None
    ) -> list[Rollout]:
        _, data = ours(module.trainer)
        with StepProgress(self.title("validation")) as progress, isolate_rng():
            more: dict[str, Any] = {}
            if examples is data.splits.val:
                more = {"samples": data.val_samples, "vote": data.val_vote}
            progress.start(len(examples) * more.get("samples", 1), what)
            return module.rollouts(examples, metric=data.metric, prompts=prompts, progress=progress.advance, **more)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors."""
        return {
            "history": self.history,
            "best": self.best,
            "incumbent": prompts_to_dict(self._incumbent),
            "val_scores": self._val_scores,
            "report": vars(self._report),
            "coverage": self._coverage,
            "choice": self._choice.state_dict(),
            "start": self._start,
            "average": self._average,
            "costs": self.costs.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history, self.best = state["history"], state["best"]
        self._incumbent, self._val_scores = prompts_from_dict(state["incumbent"]), state["val_scores"]
        self._report, self._coverage = Report(**state["report"]), state["coverage"]
        self._choice.load_state_dict(state["choice"])
        self._start, self._average = state["start"], state["average"]
        self.costs.load_state_dict(state["costs"])


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
