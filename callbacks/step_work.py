"""StepWork: what the steps of a schedule consist of, on a module and its data: searches, weight steps, boundaries.

What comes when is the alternation's to say, and what is saved when the save policy's.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cotune.callbacks.approval import Approval
from cotune.callbacks.boundary import Boundary, BoundaryListener, judge_noise
from cotune.callbacks.costs import Costs
from cotune.callbacks.course import Course
from cotune.callbacks.diagnosis import diagnose, nothing_gained
from cotune.callbacks.progress import StepProgress, say
from cotune.callbacks.schedule import PROMPTS, WEIGHTS
from cotune.callbacks.setup_checks import ours
from cotune.callbacks.weight_work import WeightWork
from cotune.datamodules import (
    TraceDataModule,
)
from cotune.lightning_modules import ProgramModule
from cotune.programs import (
    Example,
    Prompts,
    Rollout,
    mean_score,
    prompts_from_dict,
    prompts_id,
    prompts_to_dict,
)
from cotune.prompting import Candidate, Found, PromptSearch, SearchTask
from cotune.prompting.search import searched
from cotune.reporting.closing_table import rank_of
from cotune.storage.schedule_text import name_of
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng


class StepWork:
    """Does the steps of a schedule, and keeps what is known of those done.

    Args:
        search: of the prompt steps.

    Attributes:
        best: the prefix that the run would end with now: its place in the history, its prompts and its adapter.
    """

    def __init__(self, course: Course, search: PromptSearch) -> None:
        self.course, self.search, self.weight = course, search, WeightWork(course)
        self.best: dict[str, Any] = {}
        self.costs = Costs()
        self._val_scores: dict[str, float] = {}  # example -> score at the last boundary
        self._found: Found | None = None  # by a search that has not been scored yet
        self._tried: Sequence[Candidate] = ()  # in a search that has not ended

    def begin(self, module: ProgramModule) -> None:
        """A fit begins, or goes on if there is a history."""
        self.costs.begin(module.lm, resumed=bool(self.course.history))
        if not self.course.history:
            self.course.incumbent = module.prompts

    @property
    def seconds_before(self) -> float:
        """That earlier processes of a resumed run have taken, up to its checkpoint."""
        history = self.course.history
        testing = sum(record.get("test_cost", {}).get("seconds", 0.0) for record in history)
        return float(sum(record["seconds"] for record in history) + testing + self.costs.seconds_before)

    @property
    def best_record(self) -> dict[str, Any]:
        """The record of the prefix that the run would end with now."""
        record: dict[str, Any] = self.course.history[self.best["index"]]
        return record

    # Prompt steps

    def search_prompts(self, trainer: Trainer, run: Path) -> None:
        """Searches, and gives the module what was found; what a person is asked about stands in the run's folder.

        Raises:
            ApprovalNeededError: a person is to be asked, and cannot be here.
            CotuneError: the search returned no `Found`, or prompts of another program.
        """
        module, data = ours(trainer)
        with StepProgress(self.course.title("prompt step")) as progress:
            self._tried = progress.tried
            task = SearchTask(
                runner=module.runner(data.metric),
                initial=module.initial_prompts,
                incumbent=module.prompts,
                train=self._search_examples(data),
                dev=data.splits.dev,
                threshold=data.bootstrapping.threshold,
                seed=self.course.seed("search", self.course.position),
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
                self._found = searched(self.search, task)
        module.prompts = self._found.prompts
        self._tried = []

    def _search_examples(self, data: TraceDataModule) -> list[Example]:
        train, most = list(data.splits.train), self.course.options.search_examples
        if most is None or most >= len(train):
            return train
        return random.Random(self.course.seed("examples", self.course.position)).sample(train, most)

    def _calls_left(self) -> int:
        """LM calls that the last search may make, so that with the scoring after it the run has made `lm_calls`."""
        if self.course.options.lm_calls is None or self.course.position < len(self.course.schedule) - 1:
            return 0
        spent = sum(int(record["lm_calls"]) for record in self.course.history)
        return max(self.course.options.lm_calls - spent - int(self.course.history[0]["lm_calls"]), 1)

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
        if not beaten or best is None or best.rank <= beaten[0].rank or self.best["index"] < self.course.position:
            return ""
        module.prompts = best.prompts
        return f'candidate "{best.why}", {best.score:.3f} on dev (incumbent {beaten[0].score:.3f}), not scored on val'

    def _end_weight_step(self, trainer: Trainer, rounds: int) -> None:
        module, data = ours(trainer)
        choice = self.weight.choice
        if choice.wants(rounds):  # Lightning does not validate here, or not after every epoch
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
        if self.course.options.try_both_prompts and prompts_id(self.course.incumbent) != prompts_id(module.prompts):
            other = self._score(module, data.splits.val, "prompts from before", prompts=self.course.incumbent)
            tried["current"] = (self.course.incumbent, other)
        # The pairs' own prompts come first, so a tie keeps them: these weights were made for them.
        kept = max(tried, key=lambda name: mean_score(tried[name][1]))
        module.prompts, done = tried[kept]
        scores = {name: mean_score(rollouts) for name, (_, rollouts) in tried.items()}
        rows = {"traces": self.weight.report, "coverage": self.weight.coverage}
        more: dict[str, Any] = {**rows, "epochs": rounds, **choice.record}
        self.weight.undone = False
        if self.course.options.gate and not self._gained(done):
            note = nothing_gained(done, self._val_scores)
            say(f"{self.course.title('weight step')}: {note}")
            more["notes"] = (note,)
            module.lm.load_adapter_state(self.weight.start)
            module.prompts, self.weight.undone = self.course.incumbent, True
            done = self._score(module, data.splits.val, "weights as before")
        self._record(trainer, WEIGHTS, done, scores=scores, **more)

    def _gained(self, done: Sequence[Rollout]) -> bool:
        """Whether a weight step is kept: val is better than before it. Distilled prompts need only be as good."""
        gain = mean_score(done) - float(self.course.history[-1]["val_score"])
        reference = self.weight.objective.reference
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
        index, score, cost = len(self.course.history), mean_score(rollouts), self.costs.take()
        if self.course.options.test_prefixes:
            more["tested"] = self._score(module, data.splits.test, "test")
            more["test_cost"] = self.costs.take()
        more.setdefault("notes", found.notes if found else ())
        before = self._val_scores if index else None
        boundary = Boundary(
            index=index,
            step=step,
            prefix=name_of(self.course.schedule[:index]),
            prompts=module.prompts,
            previous=self.course.incumbent,
            val_score=score,
            scores=scores or {"current": score},
            rollouts=rollouts,
            cost=cost,
            diagnosis=diagnose(rollouts, before, threshold=data.bootstrapping.threshold, set_metrics=data.set_metrics),
            found=found,
            judge=judge_noise(data.metric),
            **more,
        )
        self.course.history.append(boundary.record())
        self._val_scores = {rollout.example.id: rollout.score for rollout in rollouts}
        self.course.incumbent, self._found = module.prompts, None
        self.weight.begin_next(module.lm.adapter_state())
        newest = self.course.history[-1]
        if self.course.options.keep == "last" or not self.best or rank_of(newest) > rank_of(self.best_record):
            adapter = module.lm.adapter_state()
            self.best = {"index": index, "prompts": prompts_to_dict(module.prompts), "adapter": adapter}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, BoundaryListener):
                callback.on_boundary(trainer, module, boundary)

    def _score(
        self, module: ProgramModule, examples: Sequence[Example], what: str, prompts: Prompts | None = None
    ) -> list[Rollout]:
        _, data = ours(module.trainer)
        with StepProgress(self.course.title("validation")) as progress, isolate_rng():
            more: dict[str, Any] = {}
            if examples is data.splits.val:
                more = {"samples": data.val_samples, "vote": data.val_vote}
            progress.start(len(examples) * more.get("samples", 1), what)
            return module.rollouts(examples, metric=data.metric, prompts=prompts, progress=progress.advance, **more)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors."""
        return {
            "history": self.course.history,
            "best": self.best,
            "incumbent": prompts_to_dict(self.course.incumbent),
            "val_scores": self._val_scores,
            **self.weight.state_dict(),
            "costs": self.costs.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.course.history, self.best = state["history"], state["best"]
        self.course.incumbent, self._val_scores = prompts_from_dict(state["incumbent"]), state["val_scores"]
        self.weight.load_state_dict(state)
        self.costs.load_state_dict(state["costs"])
