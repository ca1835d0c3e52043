"""Joint search: instructions and demo sets of all stages together, by a model of which combinations score well."""

from __future__ import annotations

import importlib.util
import inspect
import random
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from cotune.errors import MissingPackageError
from cotune.programs import Demo, Example, Program, Prompt, Prompts, prompts_id
from cotune.programs.faults import merged
from cotune.prompting.bootstrap import HINTED, Solved, bootstrap, labelled_pool
from cotune.prompting.demos import DemoSet, RandomDemoSearch
from cotune.prompting.evaluate import Proposal, choose, error_notes, race_against, score_candidate
from cotune.prompting.propose import Proposer, Spent, WritingSearch, cut, fenced, proposal_seed, same
from cotune.prompting.reflection import expected
from cotune.prompting.search import Candidate, Found, Rejected, SearchTask, at_least, generator, mean

TIPS = (
    "",
    "Keep it to one or two sentences.",
    "Spell out the steps to take, and the special cases.",
    "Say who is answering: an expert of the field that these examples come from.",
    "Say what a wrong answer would cost, so that care is taken.",
    "Put the task in another way than it is put now.",
)
"""One of them, drawn at random, goes with each request for an instruction, so that the proposals differ."""

_SHOWN = 4  # train examples, and traces, in a request
_MAX_SOURCE = 4000  # characters of the program's source
_MAX_VALUE = 500  # characters of a value
_MAX_STEPS = 200  # from a combination tried before to one that was not, one choice each, before there are no more


class JointSearch(WritingSearch):
    """Searches instructions and demo sets together: every stage's choice of both, modelled by TPE.

    Source: MIPROv2 (Opsahl-Ong et al., arXiv 2406.11695). The program runs once over train, and its successes become
    demo sets, as in `RandomDemoSearch`. An LM proposes instructions for each stage from train examples, the program's
    source, runs that succeeded, and a tip drawn at random. Then combinations of instruction and demo set, one of each
    for every stage, are tried: the tree-structured Parzen estimator of optuna (`pip install "cotune[joint]"`) draws
    what looks promising after all earlier trials.

    Differences from MIPROv2: the trials of a round run side by side and race against the best so far on the same
    dev examples; MIPROv2 takes means over minibatches that no two trials share. Each draw depends only on the trials
    and the seed, so a search repeated with the same (or stored) completions gives the same result to the bit.

    Args:
        trials: combinations to try. MIPROv2 uses the larger of 2 V log2(n) and 1.5 n, with V twice the number of
            stages and n the larger of the next two.
        num_instructions: instructions to choose from for each stage, including its current one.
        num_demo_sets: demo sets to choose from, besides the current demos.
        max_demos, max_labelled_demos, restart, attempts: as in `RandomDemoSearch`.
        width: trials in one round.
        racing: confidence at which a losing trial is dropped; null scores each until it can no longer win.
        writing: the arguments of `WritingSearch`.

    Raises:
        ImportError: optuna is missing.
    """

    def __init__(
        self,
        trials: int = 24,
        num_instructions: int = 6,
        num_demo_sets: int = 6,
        max_demos: int = 3,
        max_labelled_demos: int = 3,
        restart: bool = True,
        attempts: int = 1,
        width: int = 4,
        racing: float | None = 0.98,
        **writing: Any,
    ) -> None:
        super().__init__(**writing)
        if importlib.util.find_spec("optuna") is None:
            raise MissingPackageError('JointSearch needs the optuna library: pip install "cotune[joint]".')
        at_least(0, "trials", trials, "0 scores the given prompts only")
        at_least(1, "num_instructions", num_instructions, "1 keeps the instruction of each stage")
        at_least(0, "num_demo_sets", num_demo_sets, "0 keeps the demos of each stage")
        at_least(1, "width", width, "it is the number of trials in a round")
        self.demos = RandomDemoSearch(
            num_demo_sets, max_demos, max_labelled_demos, restart=restart, attempts=attempts, racing=racing
        )
        self.trials, self.num_instructions, self.num_demo_sets = trials, num_instructions, num_demo_sets
        self.width, self.racing = width, racing

    def most_runs(self, train: int, dev: int) -> int:
        hinted = min(train, HINTED * self.demos.max_demos)
        return self.demos.attempts * train + hinted + (2 + self.trials) * dev

    def about_proposals(self, stages: int, dev: int) -> int:
        return (self.num_instructions - 1) * (stages - len(self.proposer.frozen))

    def search(self, task: SearchTask) -> Found:
        stages = self.proposer.stages(task.runner.program)
        spent, task, proposer = Spent.of(task, self.proposer)
        start = task.initial if self.demos.restart else task.incumbent
        made = bootstrap(task, start, attempts=self.demos.attempts, enough=self.demos.max_demos)
        instructions, rejected = self._instructions(task, proposer, start, stages, made.solved)
        labelled, left_out = labelled_pool(task)
        space = _Space(start, instructions, self._demo_sets(task, stages, made.solved, labelled))
        found = choose(task, [Proposal(start, "zero-shot" if self.demos.restart else "incumbent")])
        trials = _Trials(task, space, found, self.racing, spent)
        while len(trials.tried) <= self.trials or spent.total < task.lm_calls:
            wanted = self.width if spent.total < task.lm_calls else min(self.width, self.trials + 1 - len(trials.tried))
            if wanted < 1 or not trials.round(wanted):
                break
        notes = [*made.notes, *left_out, *_rejected_notes(rejected), *found.notes, *trials.notes(), spent.note()]
        faults = merged(made.faults, *(candidate.faults for candidate in trials.scored))
        best = trials.best
        return Found(best.prompts, best.score, tuple(trials.scored), tuple(notes), faults, tuple(rejected), spent.calls)

    def _demo_sets(
        self, task: SearchTask, stages: Sequence[str], solved: Sequence[Solved], labelled: DemoSet
    ) -> list[tuple[str, DemoSet]]:
        """The sets by name, of the stages that may change; those that are empty for all are left out."""
        sets: list[tuple[str, DemoSet]] = []
        for why, demos in self.demos.demo_sets(solved, labelled, task.seed):
            of_stages = {stage: demos[stage] for stage in stages if demos.get(stage)}
            if of_stages:
                sets.append((why, of_stages))
        return sets[: self.num_demo_sets]

    def _instructions(
        self, task: SearchTask, proposer: Proposer, start: Prompts, stages: Sequence[str], solved: Sequence[Solved]
    ) -> tuple[dict[str, list[str]], list[Rejected]]:
        """The instructions of each stage to choose from, its own first, and the texts that cannot be used."""
        asked: list[str] = []
        places: list[tuple[str, int]] = []
        for stage in stages:
            for number in range(1, self.num_instructions):
                rng = generator(task.seed, f"instruction {stage} {number}")
                rules = proposer.rules(start[stage].instruction)
                asked.append(request(task.runner.program, stage, start[stage], task.train, solved, rules, rng))
                places.append((stage, number))
        seeds = [proposal_seed(task.seed, f"{stage} {number}") for stage, number in places]
        found = {stage: [start[stage].instruction] for stage in stages}
        rejected = []
        tried = {stage: {same(start[stage].instruction)} for stage in stages}
        now = [(stage, start[stage].instruction) for stage, _ in places]
        texts = proposer.read_all(proposer.write(asked, seeds), now, tried)
        for (stage, number), written in zip(places, texts, strict=True):
            if written.flaw:
                rejected.append(Rejected(stage, written.text, written.flaw, prompts_id(start), {"instruction": number}))
            else:
                found[stage].append(written.text)
        return found, rejected


def request(
    program: Program,
    stage: str,
    prompt: Prompt,
    train: Sequence[Example],
    solved: Sequence[Solved],
    rules: str,
    rng: random.Random,
) -> str:
    """What an LM is asked when it proposes an instruction: the program, examples of the task, runs that succeeded."""
    examples = rng.sample(list(train), min(_SHOWN, len(train)))
    traces = [demo for one in rng.sample(list(solved), min(_SHOWN, len(solved))) for demo in one.demos.get(stage, ())]
    tip = rng.choice(TIPS)
    source, now = fenced(_source(program)), fenced(prompt.instruction)
    parts = [
        f'You write the instruction of the stage "{stage}" of a language model program:\n{source}',
        f'The stage "{stage}" is {program.stages[stage].signature}. Its instruction now:\n{now}',
        _listed("Inputs of the program, and the results that are expected:", map(_example, examples)),
        _listed(f'Calls of "{stage}" in runs that were right:', map(_trace, traces[:_SHOWN])),
        f"Write an instruction for this stage with which all its calls would go right. {tip}".strip() + f"\n{rules}",
    ]
    return "\n\n".join(part for part in parts if part)


def _listed(title: str, texts: Iterable[str]) -> str:
    shown = [f"# {number}\n{text}" for number, text in enumerate(texts, 1)]
    return "\n".join([title, *shown]) if shown else ""


def _example(example: Example) -> str:
    return "\n".join([*expected(example.inputs, _MAX_VALUE), "->", *expected(example.labels, _MAX_VALUE)])


def _trace(demo: Demo) -> str:
    return "\n".join([*expected(demo.inputs, _MAX_VALUE), "->", *expected(demo.outputs, _MAX_VALUE)])


def _source(program: Program) -> str:
    """The source of the program's class; where there is none to be had, its stages."""
    try:
        text = textwrap.dedent(inspect.getsource(type(program)))
    except (OSError, TypeError):
        text = "\n".join(f"{name}: {stage.signature}" for name, stage in program.stages.items())
    return cut(text, _MAX_SOURCE)


# The space of combinations, and the trials in it


@dataclass(frozen=True)
class _Space:
    """What can be combined: for each stage an instruction and a demo set, by number; 0 is what the start has."""

    start: Prompts
    instructions: Mapping[str, Sequence[str]]
    demo_sets: Sequence[tuple[str, DemoSet]]

    @property
    def sizes(self) -> dict[str, int]:
        """The choices there are to make, and out of how many."""
        sizes = {f"{stage} instruction": len(texts) for stage, texts in self.instructions.items()}
        sizes |= {f"{stage} demos": 1 + len(self._sets(stage)) for stage in self.instructions}
        return {name: size for name, size in sizes.items() if size > 1}

    def prompts(self, choice: Mapping[str, int]) -> Prompts:
        found = dict(self.start)
        for stage, texts in self.instructions.items():
            prompt = replace(self.start[stage], instruction=texts[choice.get(f"{stage} instruction", 0)])
            at = choice.get(f"{stage} demos", 0)
            found[stage] = replace(prompt, demos=tuple(self._sets(stage)[at - 1][1][stage])) if at else prompt
        return found

    def told(self, choice: Mapping[str, int]) -> dict[str, Any]:
        """The choice in words, for a record."""
        return {
            name: at if name.endswith("instruction") or not at else self._sets(name.removesuffix(" demos"))[at - 1][0]
            for name, at in choice.items()
        }

    def _sets(self, stage: str) -> list[tuple[str, DemoSet]]:
        return [one for one in self.demo_sets if one[1].get(stage)]


@dataclass
class _Trials:
    """The trials so far, the best prompts, and all that was scored."""

    task: SearchTask
    space: _Space
    found: Found
    racing: float | None
    spent: Spent
    tried: dict[str, tuple[Mapping[str, int], float]] = field(default_factory=dict)  # prompts' id -> choice, value
    end: str = ""  # why it ended before its time

    def __post_init__(self) -> None:
        self.scored = list(self.found.candidates)
        self.best = next(one for one in self.scored if one.id == prompts_id(self.found.prompts))
        nothing = dict.fromkeys(self.space.sizes, 0)
        first = next(one for one in self.scored if one.id == prompts_id(self.space.prompts(nothing)))
        self.tried[first.id] = nothing, _value(first, self.best)

    def round(self, width: int) -> bool:
        """Tries up to so many new combinations; False where the search is at its end, because there are none left or
        nothing can be better than the best."""
        chosen: dict[str, Mapping[str, int]] = {}
        if self.best.score >= 1:
            self.end = "ended with a full score on dev"
            return False
        while len(chosen) < width:
            choice = self._new(chosen)
            if choice is None:
                self.end = f"ended after {len(self.tried) + len(chosen) - 1} trials: no combination that is new came up"
                break
            chosen[prompts_id(self.space.prompts(choice))] = choice
        self._score(chosen)
        return not self.end

    def _new(self, chosen: Collection[str]) -> Mapping[str, int] | None:
        """What the model draws; where that was tried, a combination near it that was not: good ones lie together."""
        sizes = self.space.sizes
        if not sizes:
            return None
        rng = generator(self.task.seed, f"trial {len(self.tried) + len(chosen)}")
        choice = _ask(sizes, list(self.tried.values()), rng.randrange(2**32))
        for _ in range(_MAX_STEPS):
            name = prompts_id(self.space.prompts(choice))
            if name not in self.tried and name not in chosen:
                return choice
            what = rng.choice(list(sizes))
            choice = {**choice, what: rng.randrange(sizes[what])}
        return None

    def notes(self) -> list[str]:
        texts = ", ".join(f"{len(texts)} of {stage}" for stage, texts in self.space.instructions.items())
        notes = [f"{len(self.tried) - 1} trials; demo sets: {len(self.space.demo_sets)}; instructions: {texts}"]
        notes += [self.end] if self.end else []
        return notes + error_notes(self.scored[len(self.found.candidates) :], len(self.task.dev))

    def _score(self, chosen: Mapping[str, Mapping[str, int]]) -> None:
        known = {candidate.id for candidate in self.scored}
        proposals = []
        for at, (name, choice) in enumerate(chosen.items(), len(self.tried)):
            if name not in known:
                proposals.append(Proposal(self.space.prompts(choice), f"trial {at}", prompts_id(self.space.start)))
        best = self.best
        if self.racing is None:
            new = [score_candidate(self.task, proposal, beat=best) for proposal in proposals]
        else:
            new = race_against(self.task, best, proposals, confidence=self.racing)
        for candidate in new:
            told = replace(
                candidate, lineage={"choice": self.space.told(chosen[candidate.id]), "calls": self.spent.calls}
            )
            self.scored.append(told)
            if not told.pruned and told.rank > self.best.rank:
                self.best = told
            if self.task.progress is not None:
                self.task.progress.candidate(len(self.scored) - 1, len(self.scored), told, self.best.score)
        by_id = {candidate.id: candidate for candidate in self.scored}
        self.tried |= {name: (choice, _value(by_id[name], best)) for name, choice in chosen.items()}


def _value(candidate: Candidate, best: Candidate) -> float:
    """What the model is told of a trial. One that was dropped is placed by its distance from the best of that time on
    the examples that both have run: its own mean would depend on which examples these were."""
    if not candidate.pruned:
        return candidate.score
    return best.score + candidate.score - mean(best.scores[: len(candidate.scores)])


def _ask(sizes: Mapping[str, int], trials: Sequence[tuple[Mapping[str, int], float]], seed: int) -> dict[str, int]:
    """A combination that looks promising after these trials; a function of its arguments alone."""
    import optuna

    distributions = {
        name: optuna.distributions.CategoricalDistribution(tuple(range(size))) for name, size in sizes.items()
    }
    with _quiet():
        # A study and a sampler for each ask: neither has a state that a repeated search would have to restore.
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for choice, value in trials:
            study.add_trial(
                optuna.trial.create_trial(params=dict(choice), distributions=dict(distributions), value=value)
            )
        asked = study.ask(dict(distributions))
    return {name: int(asked.params[name]) for name in sizes}


@contextmanager
def _quiet() -> Iterator[None]:
    """optuna tells of each study that it makes; of many short ones nobody wants to hear."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _rejected_notes(rejected: Sequence[Rejected]) -> list[str]:
    counts: dict[str, int] = {}
    for one in rejected:
        counts[one.why] = counts.get(one.why, 0) + 1
    return [
        f"proposals rejected: {why}: {count}" if count > 1 else f"proposals rejected: {why}"
        for why, count in counts.items()
    ]
