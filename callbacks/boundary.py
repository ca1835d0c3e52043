"""Boundaries: what Alternate tells others after each step of the schedule, as one record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cotune.datamodules.collected import Report
from cotune.programs import Faults, LMJudge, Prompts, Rollout, faults_of, mean_score, mean_tokens, prompts_id
from cotune.programs.faults import faults_from_dict, faults_to_dict, merged
from cotune.prompting import Found
from lightning.pytorch import LightningModule, Trainer


@dataclass(frozen=True)
class Boundary:
    """The state between two steps of a schedule.

    Attributes:
        index: steps before it; 0 is the program as it came.
        step: the step that led here, "p" or "w"; "" at index 0.
        prefix: the schedule up to here, e.g. "p -> w"; "vanilla" at index 0.
        prompts: those kept; `previous` are those before the step.
        val_score: mean score on val with the kept prompts.
        scores: val score by prompts tried, by name ("initial", "current").
        rollouts: on val, with the kept prompts.
        cost: LM calls, prompt and completion tokens, seconds, of this step alone.
        found: the search's result, after a prompt step.
        traces: what collecting gave, after a weight step.
        epochs: training epochs of the step, rounds included; 0 of a prompt step.
        epoch: the epoch whose adapter was kept (from 1), after a weight step.
        averaged: how many epochs' adapters the kept one is the average of; 0 where it is an epoch's own.
        diagnosis: passed, wrong, closed, out-of-type, unreadable, won and lost examples; see `diagnose`.
        coverage: whose traces passed, after a weight step; see `trace_coverage`.
        tested: rollouts on test, where Alternate was asked for them; no choice is made by them.
        test_cost: what those cost, which `cost` leaves out.
        judge: how far an `LMJudge` agreed with itself so far, where it is the metric.
    """

    index: int
    step: str
    prefix: str
    prompts: Prompts
    previous: Prompts
    val_score: float
    scores: Mapping[str, float]
    rollouts: Sequence[Rollout]
    cost: Mapping[str, Any]
    found: Found | None = None
    traces: Report | None = None
    epochs: int = 0
    epoch: int | None = None
    averaged: int = 0
    diagnosis: Mapping[str, Any] = field(default_factory=dict)
    coverage: Mapping[str, Any] = field(default_factory=dict)
    tested: Sequence[Rollout] | None = None
    test_cost: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=())
    judge: Mapping[str, Any] = field(default_factory=dict)

    @property
    def faults(self) -> Faults:
        """What the user's code got wrong since the boundary before: in the search, in collecting, on val."""
        search = {} if self.found is None else self.found.faults
        traces = {} if self.traces is None else faults_from_dict(self.traces.faults)
        return merged(search, traces, faults_of(self.rollouts))

    def record(self) -> dict[str, Any]:
        """One line of history.jsonl: plain types only."""
        failures = Counter(r.error.kind for r in self.rollouts if r.error is not None)
        record = {
            "index": self.index,
            "step": self.step,
            "prefix": self.prefix,
            "prompts": prompts_id(self.prompts),
            "val_score": self.val_score,
            "val_tokens": mean_tokens(self.rollouts),
            "scores": dict(self.scores),
            "failures": dict(failures),
            **self.cost,
        }
        if self.found is not None:
            record["dev_score"] = self.found.score
            record["candidates"] = [
                {"why": c.why, "id": c.id, "score": c.score, "pruned": c.pruned} for c in self.found.candidates
            ]
        if self.traces is not None:
            record["traces"] = {"solved": self.traces.solved, **vars(self.traces), **self.coverage}
            record |= {"epochs": self.epochs, "epoch": self.epoch}
            if self.averaged:
                record["averaged"] = self.averaged
        if self.diagnosis:
            record["diagnosis"] = dict(self.diagnosis)
        if self.tested is not None:
            record["test_score"] = mean_score(self.tested)
            record["test_cost"] = dict(self.test_cost)
        if self.faults:
            record["faults"] = faults_to_dict(self.faults)
        if self.judge:
            record["judge"] = dict(self.judge)
        if self.notes:
            record["notes"] = list(self.notes)
        return record


def judge_noise(metric: Any) -> dict[str, Any]:
    """How far a judge agreed with itself, in plain types; {} for another metric, and where it was asked once."""
    return asdict(metric.noise) if isinstance(metric, LMJudge) and metric.noise.asked_twice else {}


class BoundaryListener:
    """A callback that also wants to know of boundaries: mix it in, and Alternate calls `on_boundary`."""

    def on_boundary(self, trainer: Trainer, module: LightningModule, boundary: Boundary) -> None:
        """The step before `boundary` is over, and the module holds its prompts and weights."""
