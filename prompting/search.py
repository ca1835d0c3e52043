"""Prompt search: what every prompt optimiser is given, what it gives back, and the contract between."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cotune.errors import BadValueError, WrongTypeError
from cotune.programs import Demo, Example, Faults, Program, Prompt, Prompts, Runner, prompts_id, prompts_to_dict
from cotune.programs.faults import quoted

UNREADABLE = ("format", "type")
"""Kinds of errors that are the LM's: it wrote what cannot be read, or what is no value of its field's type."""


class BadPromptsError(BadValueError):
    """Prompts do not fit the program that a search is for, or show it what it is scored on."""


@dataclass(frozen=True)
class Candidate:
    """Prompts that were tried, and how they did on dev.

    Attributes:
        prompts: of every stage.
        scores: one a dev example, in dev order, in [0, 1]; only the first so many if the candidate was pruned.
        parent: `prompts_id` of the prompts it was made from; "" if it was not made from any.
        why: how it came about, e.g. "incumbent", "zero-shot", "random 3".
        pruned: scoring stopped early: the candidate could no longer beat the best one, or was dropped in a race.
        errors: rollouts without a valid score, each scored 0, by kind (`Failure.kind`).
        faults: those of the user's code among them, each kind with its first example.
        lineage: how it was made, in plain types, from a search that makes candidates of earlier ones: e.g. its round,
            its parents, the stage that was rewritten, scores on the minibatch before and after.
    """

    prompts: Prompts
    scores: tuple[float, ...]
    parent: str = ""
    why: str = ""
    pruned: bool = False
    errors: Mapping[str, int] = field(default_factory=dict)
    faults: Faults = field(default_factory=dict)
    lineage: Mapping[str, Any] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """Mean of `scores`, in [0, 1]; 0 if there are none.

        A pruned candidate's mean is over the part that was scored. It is safe to show beside others: all the examples
        left out, at 1 each, would not have lifted it over the score that pruned it, so it is not above that score.
        Dropped in a race it was behind on the examples it has run, and its mean may lie above a score over all of dev.
        """
        return mean(self.scores)

    @property
    def rank(self) -> tuple[float, int]:
        """What decides between candidates: the score, and between equal scores the fewer answers without a value.

        Where nothing passes, prompts that the LM answers in the asked form are still the better ones to go on from.
        """
        return self.score, -sum(self.errors.get(kind, 0) for kind in UNREADABLE)

    @property
    def id(self) -> str:
        return prompts_id(self.prompts)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON logs and checkpoints."""
        return {
            "id": self.id,
            "parent": self.parent,
            "why": self.why,
            "score": self.score,
            "pruned": self.pruned,
            "scores": list(self.scores),
            "errors": dict(self.errors),
            "prompts": prompts_to_dict(self.prompts),
            **({"lineage": dict(self.lineage)} if self.lineage else {}),
        }


@dataclass(frozen=True)
class Rejected:
    """A text that an LM proposed for a stage and that became no candidate.

    Attributes:
        stage: whose instruction it was to be; "" for a merge of whole prompts.
        text: what was proposed, as it was written where it could not be used.
        why: the reason, e.g. "empty" or "no better on the minibatch".
        parent: `prompts_id` of the prompts it was made from.
        lineage: as `Candidate.lineage`.
    """

    stage: str
    text: str
    why: str
    parent: str = ""
    lineage: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON logs."""
        return {**vars(self), "lineage": dict(self.lineage)}


@dataclass(frozen=True)
class Review:
    """A text that a person is asked about before a rollout is spent on it.

    Attributes:
        stage: whose instruction it is to be.
        now: the instruction that it would replace.
        proposed: the text.
    """

    stage: str
    now: str
    proposed: str


class Reviewer(Protocol):
    """Asks a person about proposals. The same answer has to come to the same question, in a resumed run too."""

    def review(self, asked: Sequence[Review]) -> list[str]:
        """For each the text to take: as proposed, or as edited; "" where it is refused."""
        ...


class Progress(Protocol):
    """What a search tells while it runs: a bar, a log, or nothing."""

    def start(self, total: int, what: str) -> None:
        """A pass over `total` examples begins: "bootstrap", or the `why` of a candidate."""
        ...

    def advance(self, n: int) -> None:
        """`n` more examples of this pass have ended. A pruned candidate's pass ends short of its total."""
        ...

    def candidate(self, index: int, total: int, candidate: Candidate, best: float) -> None:
        """Candidate `index` (from 0) of `total` is scored; `best` is the best score so far, its own included."""
        ...


@dataclass(frozen=True)
class SearchTask:
    """All that a prompt search may depend on.

    Attributes:
        runner: how rollouts are made and scored; its `max_error_rate` is of the examples of one pass.
        initial: the zero-shot prompts of the program.
        incumbent: the best prompts so far; what the search has to beat.
        train: demos are bootstrapped from these.
        dev: candidates are scored on these. Shares no example with `train`.
        threshold: a rollout is a success if its score is at least this, in (0, 1] (the paper's lambda).
        seed: of all random draws, the search's and the LM's.
        lm_calls: a search that can draw more candidates than its own arguments say does so until it has made so many
            LM calls; 0 leaves its size to itself.
        progress: told what happens; None for silence.
        reviewer: asks a person about proposed texts, where a search is to (`approve`).

    Raises:
        ValueError: train and dev overlap, dev is empty, a demo of the given prompts comes from dev, prompts lack a
            stage, or the threshold is out of range.
    """

    runner: Runner
    initial: Prompts
    incumbent: Prompts
    train: Sequence[Example]
    dev: Sequence[Example]
    threshold: float = 1.0
    seed: int = 0
    lm_calls: int = 0
    progress: Progress | None = None
    reviewer: Reviewer | None = None

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise BadValueError(f"threshold {self.threshold} is outside (0, 1]; 1 keeps only full scores.")
        if not self.dev:
            raise BadValueError("dev is empty, so no candidate can be scored; give it at least one example.")
        _check_disjoint(self.train, self.dev)
        for name, prompts in (("initial", self.initial), ("incumbent", self.incumbent)):
            check_prompts(f"the {name} prompts", prompts, self)


@dataclass(frozen=True)
class Found:
    """What a search gives back.

    Attributes:
        prompts: the best ones; the incumbent if nothing beat it.
        score: their mean score on dev, never below the incumbent's.
        candidates: all that were scored, the incumbent first, in order.
        notes: what a reader of the log should know: candidates left out and why, failures and their number.
        faults: of the user's code in all runs of the search, by kind, each with its first example.
        rejected: texts that an LM proposed and that became no candidate, in order, with the reasons.
        calls: LM calls by role, "program" and "proposer", from a search that has an LM write proposals.
    """

    prompts: Prompts
    score: float
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...] = ()
    faults: Faults = field(default_factory=dict)
    rejected: tuple[Rejected, ...] = ()
    calls: Mapping[str, int] = field(default_factory=dict)


class PromptSearch(ABC):
    """How prompts improve. One method; a user's own search is a subclass.

    The contract of `search`:

    - The incumbent is a candidate, and the first. Between equal scores the fewer answers without a value decide, then
      the earlier candidate, hence the prompts already trusted: the result is never worse on dev than the incumbent.
    - The result depends on the task and the search's own arguments only; all randomness is seeded by `task.seed`.
    - Dev scores candidates and nothing else: no demo, instruction or example of a prompt is taken from it.
    - A bad rollout (a completion that cannot be read, the user's code raising on an example) scores 0 and is counted.
      It never raises, unless there are more of the latter than the runner's `max_error_rate` allows: then
      FaultyProgramError.
    - Nothing is left out silently: `Found.notes` says what was skipped, `Found.faults` what the user's code got wrong.
    - The task is not changed, and nothing is kept on the search between calls.
    """

    @abstractmethod
    def search(self, task: SearchTask) -> Found:
        """The best prompts found for the task; see the class for the contract."""

    def for_program(self, program: Program) -> PromptSearch:
        """The search that this program gets: this one, or a part of it where the rest has nothing to do."""
        return self

    def most_runs(self, train: int, dev: int) -> int | None:
        """How often a search runs the program at most, for sets of these sizes; None where it cannot be said."""
        return None

    def about_proposals(self, stages: int, dev: int) -> int:
        """About how often a search has an LM write a proposal, for a program of so many stages; 0 where none writes."""
        return 0


def searched(search: PromptSearch, task: SearchTask) -> Found:
    """What a search finds for the task, which may be anybody's: it is checked before it is used.

    Raises:
        TypeError: it returned something else than a `Found`.
        ValueError: prompts that it returned or wanted to try are no prompts of this program.
    """
    name = f"{type(search).__name__}.search"
    try:
        found: Any = search.search(task)
        if not isinstance(found, Found) or not all(isinstance(one, Candidate) for one in found.candidates):
            what = quoted(found) if not isinstance(found, Found) else "a Found whose candidates are no Candidates"
            raise WrongTypeError(f"{name} returned {what}; return a Found, e.g. that of choose(task, proposals).")
        check_prompts("the prompts it found", found.prompts, task)
    except BadPromptsError as error:
        raise BadValueError(f"{name}: {error}") from None
    return found


def check_prompts(what: str, prompts: Any, task: SearchTask) -> None:
    """Refuses what are no prompts of the task's program, one for each stage, and demos from its dev set.

    Raises:
        BadPromptsError: so it is; the message begins with `what`.
    """
    if not isinstance(prompts, Mapping):
        raise BadPromptsError(f"{what} are {quoted(prompts)}; give a mapping of stage to Prompt.")
    _check_stages(what, prompts, task.runner.program)
    for stage, prompt in prompts.items():
        if not isinstance(prompt, Prompt) or not isinstance(prompt.instruction, str):
            raise BadPromptsError(
                f'{what} have {quoted(prompt)} for stage "{stage}"; give a Prompt, e.g. '
                f'replace(task.incumbent["{stage}"], instruction="...").'
            )
        if wrong := [demo for demo in prompt.demos if not isinstance(demo, Demo)]:
            raise BadPromptsError(f'{what} show stage "{stage}" {quoted(wrong[0])} as a demo; give a Demo.')
    _check_demos(what, prompts, task.dev)


def generator(seed: int, what: str) -> random.Random:
    """A generator of its own for each purpose: one more candidate does not change the others."""
    return random.Random(f"{seed}|{what}")


def at_least(least: int, name: str, value: int, meaning: str) -> None:
    """Refuses an argument that is too small.

    Raises:
        ValueError: it is below `least`.
    """
    if value < least:
        raise BadValueError(f"{name} {value} is below {least}; {meaning}.")


def mean(scores: Sequence[float]) -> float:
    """Mean by exact summation, so that no order of adding decides between two candidates; 0 for none."""
    return math.fsum(scores) / len(scores) if scores else 0.0


def _check_disjoint(train: Sequence[Example], dev: Sequence[Example]) -> None:
    shared = sorted({example.id for example in train} & {example.id for example in dev})
    if shared:
        raise BadValueError(
            f"train and dev share {len(shared)} examples, the first is {shared[0]}: its demos would be scored on "
            "itself. Remove it from one of them."
        )


def _check_stages(what: str, prompts: Prompts, program: Program) -> None:
    stages = program.stages
    missing = [stage for stage in stages if stage not in prompts]
    unknown = [stage for stage in prompts if stage not in stages]
    if missing or unknown:
        said = f'have none for stage "{missing[0]}"' if missing else f'name "{unknown[0]}", which is no stage'
        raise BadPromptsError(f"{what} {said}; {type(program).__name__} has the stages {', '.join(stages)}.")


def _check_demos(what: str, prompts: Prompts, dev: Sequence[Example]) -> None:
    held_out = {example.id for example in dev}
    for stage, prompt in prompts.items():
        for demo in prompt.demos:
            if demo.source and demo.source in held_out:
                raise BadPromptsError(
                    f'{what} show stage "{stage}" a demo of example {demo.source}, which is in dev: their '
                    "score would be too high. Keep the splits of the run the prompts come from, or drop the demo."
                )
