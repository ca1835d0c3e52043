"""Reflective search: an LM reads what a stage's runs did and got, and writes the stage a better instruction."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cotune.errors import BadValueError
from cotune.programs import Example, Prompts, Rollout, prompts_id
from cotune.prompting.evaluate import Proposal, candidate_of, check_faults, error_notes
from cotune.prompting.pool import Member, Merge, draw_parent, mean_objectives, merges
from cotune.prompting.propose import Spent, WritingSearch, proposal_seed, same
from cotune.prompting.reflection import blamed_stages, reflection
from cotune.prompting.runs import Pair, Runs
from cotune.prompting.search import Found, Rejected, SearchTask, at_least, generator

BARREN = 10
"""Rounds in a row without a proposal worth a rollout after which a search ends."""

_MERGE_SAMPLE = 5
"""Dev examples on which a merge has to be as good as both that it is made of, before it runs on all (as in GEPA)."""


class ReflectiveSearch(WritingSearch):
    """Has an LM rewrite instructions, one stage at a time, from the stage's runs and their feedback.

    Source: GEPA (Agrawal et al., arXiv 2507.19457). The pool begins with the incumbent and the initial prompts. Each
    round draws up to `proposals` parents from the pool, in proportion to the number of dev examples and objectives that
    they lead; runs each on a minibatch of train; has the LM rewrite the instruction of one stage; and runs the child on
    the same examples. A child that is better there runs on all of dev and joins the pool. From time to time two
    lineages are merged, stage by stage. The best of the pool on dev is the result.

    Differences from GEPA: the proposals of a round are one LM batch each for parents, reflections and children; no
    run is made twice; the LM sees every call of the stage; a text is checked before it is run, and no text is tried
    twice; all draws are seeded, so a search repeated with the same (or stored) completions gives the same result to
    the bit.

    It learns from feedback (`Score.feedback`, `Score.stages`). Without any, the LM sees what was expected.
    Demos stay those of the parent.

    Args:
        max_runs: runs of the program, on train and dev together. The pool's first members are always scored. With
            `task.lm_calls` it continues until this many LM calls are made.
        minibatch: train examples from which a proposal is written, and on which it is first scored.
        proposals: rewrites in one round.
        max_merges: attempts to merge two lineages in a search; 0 for none.
        choose_stage: "turns" goes through the stages; "blame" draws the one that feedback by stage or an unreadable
            answer blames, in proportion; if nothing blames any, each in turn.
        tolerance: how far below its parent's a child's mean score may be on the minibatch, in [0, 1]; at 0 it must be
            higher. Above 0 fewer good proposals are lost to noise, and more runs go into bad ones.
        writing: the arguments of `WritingSearch`.
    """

    def __init__(
        self,
        max_runs: int = 1000,
        minibatch: int = 3,
        proposals: int = 4,
        max_merges: int = 5,
        choose_stage: Literal["turns", "blame"] = "blame",
        tolerance: float = 0.0,
        **writing: Any,
    ) -> None:
        super().__init__(**writing)
        at_least(0, "max_runs", max_runs, "0 scores the given prompts only")
        at_least(1, "minibatch", minibatch, "GEPA uses 3")
        at_least(1, "proposals", proposals, "it is the number in one round")
        at_least(0, "max_merges", max_merges, "0 merges nothing")
        if choose_stage not in ("turns", "blame"):
            raise BadValueError(f'choose_stage "{choose_stage}" is neither "turns" nor "blame".')
        if not 0 <= tolerance <= 1:
            raise BadValueError(f"tolerance {tolerance} is outside [0, 1]; 0 asks for a better score on the minibatch.")
        self.max_runs, self.minibatch, self.proposals, self.max_merges = max_runs, minibatch, proposals, max_merges
        self.choose_stage, self.tolerance = choose_stage, tolerance

    def most_runs(self, train: int, dev: int) -> int:
        return max(self.max_runs, 2 * dev)

    def about_proposals(self, stages: int, dev: int) -> int:
        return max(self.max_runs - dev, 0) // (2 * self.minibatch)

    def search(self, task: SearchTask) -> Found:
        return _Reflecting(self, task).found()


@dataclass
class _Attempt:
    """A proposal on its way: where it was drawn, and then, step by step, what became of it."""

    slot: int
    parent: int
    examples: Sequence[Example]
    before: list[Rollout] = field(default_factory=list)
    stage: str = ""
    text: str = ""
    prompts: Prompts = field(default_factory=dict)
    after: list[Rollout] = field(default_factory=list)

    @property
    def gain(self) -> float:
        """By how much the scores' sum rose on the minibatch."""
        return math.fsum([*(run.score for run in self.after), *(-run.score for run in self.before)])


@dataclass(frozen=True)
class _Born:
    """What is to join the pool: the prompts, how they were made, and the places of what they were made from."""

    proposal: Proposal
    lineage: Mapping[str, Any] = field(default_factory=dict)
    parents: tuple[int, ...] = ()


class _Reflecting:
    """One search under way: its pool, what has been tried, and what it cost."""

    def __init__(self, options: ReflectiveSearch, task: SearchTask) -> None:
        self.options = options
        self.stages = options.proposer.stages(task.runner.program)
        self.spent, self.task, self.proposer = Spent.of(task, options.proposer)
        self.runs = Runs(self.task)
        self.pool: list[Member] = []
        self.turns: list[int] = []  # one for each member: how many proposals were drawn from it and its ancestors
        self.tried: dict[str, set[str]] = {stage: set() for stage in self.stages}
        self.pooled: set[str] = set()  # ids of prompts that were in the pool or tried as a merge
        self.rejected: list[Rejected] = []
        self.counts: Counter[str] = Counter()
        self.most_asked = options.about_proposals(len(self.stages), len(task.dev))
        self.asked = self.drawn = self.round = self.merged = self.idle = self.barren = 0

    def found(self) -> Found:
        first = [Proposal(self.task.incumbent, "incumbent")]
        if prompts_id(self.task.initial) != prompts_id(self.task.incumbent):
            first.append(Proposal(self.task.initial, "zero-shot"))
        self._join([_Born(proposal) for proposal in first])
        if not self.task.train:
            self.counts["train is empty: there is nothing to reflect on"] += 1
        while self.task.train and not self._ended():
            self.round += 1
            self._round()
        best = max((member.candidate for member in self.pool), key=lambda c: c.rank)  # the first of equals
        candidates = tuple(member.candidate for member in self.pool)
        notes = (*self._notes(), *error_notes(candidates, len(self.task.dev)))
        return Found(
            best.prompts, best.score, candidates, notes, self.runs.faults, tuple(self.rejected), self.spent.calls
        )

    def _ended(self) -> bool:
        epoch = -(-len(self.task.train) // self.options.minibatch)
        if any(member.candidate.score >= 1 for member in self.pool):
            self.counts["ended with a full score on dev"] += 1
        elif self.idle >= epoch:
            self.counts[f"ended after {self.idle} minibatches in a row that were all right"] += 1
        elif self.barren >= BARREN:
            self.counts[f"ended after {BARREN} rounds in a row without a proposal that was worth a run"] += 1
        elif self.spent.total >= self.task.lm_calls and self.asked >= self.most_asked:
            self.counts[f"ended after {self.asked} proposals"] += 1
        else:
            return self._slots() < 1
        return True

    def _slots(self) -> int:
        """Proposals that the runs left allow for: each takes two minibatches, and one of them all of dev."""
        # A text of no use leaves its second minibatch unrun; that does not allow for more of them.
        if self.spent.total < self.task.lm_calls:
            return self.options.proposals
        left = self.options.max_runs - self.runs.made - len(self.task.dev)
        return min(self.options.proposals, left // (2 * self.options.minibatch), self.most_asked - self.asked)

    # A round

    def _round(self) -> None:
        attempts = self._drawn_attempts(self._slots())
        ran = iter(self.runs.of([pair for a in attempts for pair in self._pairs(a.parent, a.examples)], "minibatches"))
        for attempt in attempts:
            attempt.before = [next(ran) for _ in attempt.examples]
        attempts = self._written([attempt for attempt in attempts if self._has_stage(attempt)])
        merge = self._merge()
        sample = self._merge_sample()
        asked: list[Pair] = [(a.prompts, example) for a in attempts for example in a.examples]
        asked += [(merge.prompts, example) for example in sample if merge is not None]
        ran = iter(self.runs.of(asked, f"round {self.round}"))
        for attempt in attempts:
            attempt.after = [next(ran) for _ in attempt.examples]
        self.barren = 0 if attempts or merge else self.barren + 1
        families = self._families([attempt for attempt in attempts if self._passes(attempt)])
        born = [self._child(family) for family in families]
        if merge is not None and self._merge_passes(merge, list(ran), sample):
            born.append(self._heir(merge))
        self._join(self._affordable(born))
        self._join(self._affordable(self._singles(families)))

    def _drawn_attempts(self, slots: int) -> list[_Attempt]:
        attempts = []
        for slot in range(slots):
            parent = draw_parent(self.pool, generator(self.task.seed, f"parent {self.round} {slot}"))
            attempts.append(_Attempt(slot, parent, self._next_minibatch()))
        return attempts

    def _next_minibatch(self) -> list[Example]:
        """The next examples of train, which is shuffled anew for each pass; the last of a pass is filled up."""
        size = min(self.options.minibatch, len(self.task.train))
        each = -(-len(self.task.train) // size)
        epoch, place = divmod(self.drawn, each)
        order = list(self.task.train)
        generator(self.task.seed, f"epoch {epoch}").shuffle(order)
        self.drawn += 1
        return order[place * size :][:size] if (place + 1) * size <= len(order) else order[-size:]

    def _pairs(self, member: int, examples: Sequence[Example]) -> list[Pair]:
        return [(self.pool[member].candidate.prompts, example) for example in examples]

    def _has_stage(self, attempt: _Attempt) -> bool:
        """Picks the stage to rewrite; False where there is nothing to learn from the minibatch."""
        if all(run.score >= 1 and run.error is None for run in attempt.before):
            self.idle += 1
            self.counts["minibatches skipped: all right"] += 1
            return False
        self.idle = 0
        called = {step.stage for run in attempt.before for step in run.steps}
        for stage in self.stages:
            self.counts[f'minibatches that never called stage "{stage}"'] += stage not in called
        turn = self.turns[attempt.parent]
        order = [self.stages[(turn + at) % len(self.stages)] for at in range(len(self.stages))]
        usable = [stage for stage in order if stage in called]
        if not usable:
            self.counts["minibatches skipped: they called no stage that may be rewritten"] += 1
            return False
        self.turns[attempt.parent] = turn + order.index(usable[0]) + 1
        blamed = blamed_stages(attempt.before) if self.options.choose_stage == "blame" else {}
        weights = [blamed.get(stage, 0) for stage in usable]
        draw = generator(self.task.seed, f"stage {self.round} {attempt.slot}")
        attempt.stage = draw.choices(usable, weights)[0] if any(weights) else usable[0]
        return True

    def _written(self, attempts: Sequence[_Attempt]) -> list[_Attempt]:
        """The attempts with what the proposer wrote, those left out whose text cannot be used."""
        asked, places = [], []
        for attempt in attempts:
            prompt = self.pool[attempt.parent].candidate.prompts[attempt.stage]
            rules = self.proposer.rules(prompt.instruction)
            asked.append(reflection(self.task.runner.program, attempt.stage, prompt, attempt.before, rules=rules))
            places.append((attempt.stage, prompt.instruction))
        self.asked += len(asked)
        seeds = [proposal_seed(self.task.seed, f"{self.round} {attempt.slot}") for attempt in attempts]
        usable = []
        texts = self.proposer.read_all(self.proposer.write(asked, seeds), places, self.tried)
        for attempt, written in zip(attempts, texts, strict=True):
            parent = self.pool[attempt.parent].candidate.prompts
            old = parent[attempt.stage]
            attempt.text = written.text
            if written.flaw:
                self._reject(attempt, written.flaw)
                continue
            attempt.prompts = {**parent, attempt.stage: replace(old, instruction=written.text)}
            usable.append(attempt)
        return usable

    def _passes(self, attempt: _Attempt) -> bool:
        allowed = self.options.tolerance * len(attempt.examples)
        if attempt.gain > -allowed:
            return True
        self._reject(attempt, "no better on the minibatch")
        return False

    def _families(self, passed: Sequence[_Attempt]) -> list[list[_Attempt]]:
        """The attempts of each parent; of those that rewrote one stage the one that gained the most."""
        best: dict[tuple[int, str], _Attempt] = {}
        for attempt in sorted(passed, key=lambda attempt: -attempt.gain):  # stable: the earlier of equals
            if best.setdefault((attempt.parent, attempt.stage), attempt) is not attempt:
                self._reject(attempt, "another rewrite of the stage gained more in its round")
        families: dict[int, list[_Attempt]] = {}
        for attempt in sorted(best.values(), key=lambda attempt: attempt.slot):
            families.setdefault(attempt.parent, []).append(attempt)
        return list(families.values())

    def _child(self, family: Sequence[_Attempt]) -> _Born:
        """One child with all that the family rewrote: scoring each on dev would take as many times the runs."""
        place = family[0].parent
        parent = self.pool[place].candidate
        prompts = {**parent.prompts, **{attempt.stage: attempt.prompts[attempt.stage] for attempt in family}}
        stages = " and ".join(f'"{attempt.stage}"' for attempt in family)
        proposal = Proposal(prompts, f"round {self.round}: {stages} rewritten", parent.id)
        return _Born(proposal, self._lineage(family), (place,))

    def _singles(self, families: Sequence[Sequence[_Attempt]]) -> list[_Born]:
        """The rewrites one by one of each family whose child turned out no better than its parent."""
        scores = {member.candidate.id: member.candidate.score for member in self.pool}
        found = []
        for family in families:
            child = scores.get(prompts_id(self._child(family).proposal.prompts), 0.0)
            if len(family) > 1 and child <= self.pool[family[0].parent].candidate.score:
                found += [self._child([attempt]) for attempt in family]
        return found

    # Merging

    def _merge(self) -> Merge | None:
        if self.merged >= self.options.max_merges:
            return None
        possible = [merge for merge in merges(self.pool) if prompts_id(merge.prompts) not in self.pooled]
        if not possible:
            return None
        merge = generator(self.task.seed, f"merge {self.round}").choice(possible)
        self.merged += 1
        self.pooled.add(prompts_id(merge.prompts))
        return merge

    def _merge_sample(self) -> list[Example]:
        draw = generator(self.task.seed, f"merge sample {self.round}")
        return draw.sample(list(self.task.dev), min(_MERGE_SAMPLE, len(self.task.dev)))

    def _merge_passes(self, merge: Merge, ran: Sequence[Rollout], sample: Sequence[Example]) -> bool:
        own = math.fsum(run.score for run in ran)
        allowed = self.options.tolerance * len(sample)
        for place in merge.pair:
            theirs = math.fsum(run.score for run in self.runs.of(self._pairs(place, sample), "merge"))
            if own < theirs - allowed:
                lineage = self._merge_lineage(merge)
                parent = self.pool[merge.pair[0]].candidate.id
                why = "a merge that is worse than one of the two on a sample of dev"
                self.rejected.append(Rejected("", "", why, parent, lineage))
                self.counts[f"proposals rejected: {why}"] += 1
                return False
        return True

    def _heir(self, merge: Merge) -> _Born:
        first, second = (self.pool[place].candidate for place in merge.pair)
        why = f"round {self.round}: merge of {first.id} and {second.id}"
        return _Born(Proposal(merge.prompts, why, first.id), self._merge_lineage(merge), merge.pair)

    # The pool

    def _affordable(self, born: Sequence[_Born]) -> list[_Born]:
        """Those that the runs left allow to score on dev."""
        kept: list[_Born] = []
        for one in born:
            asked = [(other.proposal.prompts, example) for other in (*kept, one) for example in self.task.dev]
            fits = self.runs.made + self.runs.missing(asked) <= self.options.max_runs
            if fits or self.spent.total < self.task.lm_calls:
                kept.append(one)
            else:
                why = "no runs left to score it on dev"
                self.rejected.append(Rejected("", "", why, one.proposal.parent, one.lineage))
                self.counts[f"proposals rejected: {why}"] += 1
        return kept

    def _join(self, born: Sequence[_Born]) -> None:
        """Scores proposals on all of dev, in one batch, and takes them into the pool."""
        total = len(self.task.dev)
        asked = [(one.proposal.prompts, example) for one in born for example in self.task.dev]
        ran = self.runs.of(asked, "dev") if asked else []
        for at, one in enumerate(born):
            runs = ran[at * total : (at + 1) * total]
            check_faults(runs, self.task)
            objectives = mean_objectives([run.objectives for run in runs])
            told = {**one.lineage, **({"objectives": objectives} if objectives else {}), "calls": self.spent.calls}
            candidate = replace(candidate_of(one.proposal, runs, total), lineage=told)
            self.pool.append(Member(candidate, objectives, one.parents))
            self.turns.append(max((self.turns[place] for place in one.parents), default=0))
            self.pooled.add(candidate.id)
            if self.task.progress is not None:
                best = max(member.candidate.score for member in self.pool)
                self.task.progress.candidate(len(self.pool) - 1, len(self.pool), candidate, best)

    # What is told

    def _reject(self, attempt: _Attempt, why: str) -> None:
        self.counts[f"proposals rejected: {why}"] += 1
        self.tried[attempt.stage].add(same(attempt.text))
        parent = self.pool[attempt.parent].candidate.id
        self.rejected.append(Rejected(attempt.stage, attempt.text, why, parent, self._lineage([attempt])))

    def _lineage(self, family: Sequence[_Attempt]) -> dict[str, Any]:
        rewritten = {
            attempt.stage: {
                "minibatch": [example.id for example in attempt.examples],
                "before": [run.score for run in attempt.before],
                "after": [run.score for run in attempt.after],
            }
            for attempt in family
        }
        return {
            "round": self.round,
            "parents": [self.pool[family[0].parent].candidate.id],
            "rewritten": rewritten,
        }

    def _merge_lineage(self, merge: Merge) -> dict[str, Any]:
        ids = {place: self.pool[place].candidate.id for place in merge.pair}
        sources = {stage: ids[place] for stage, place in merge.sources.items()}
        return {"round": self.round, "parents": list(ids.values()), "sources": sources}

    def _notes(self) -> list[str]:
        notes = [f"{self.round} rounds, {self.runs.made} runs, {len(self.pool)} candidates", self.spent.note()]
        return notes + [f"{what}: {count}" if count > 1 else what for what, count in self.counts.items() if count]
