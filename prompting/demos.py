"""Random search over demo sets: the paper's prompt step (bootstrap few-shot with random search)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count

from cotune.errors import BadValueError
from cotune.programs import Demo, Prompts, prompts_id
from cotune.programs.demos import draw_demos
from cotune.prompting.bootstrap import HINTED, Solved, bootstrap, labelled_pool
from cotune.prompting.evaluate import CountingLM, Proposal, choose, go_on
from cotune.prompting.search import Found, PromptSearch, SearchTask, at_least, generator

DemoSet = Mapping[str, Sequence[Demo]]
"""Stage -> the demos it is shown."""


class RandomDemoSearch(PromptSearch):
    """Tries demo sets made of the program's own successes, and keeps the one that scores best on dev.

    Source: the prompt step of BetterTogether (arXiv 2407.10930), i.e. bootstrap few-shot with random search. The
    program runs once over train; each success gives demos for every stage it called. Candidates, in this order:

    1. "incumbent" and "zero-shot" (the initial prompts);
    2. "labels-only": for each stage, demos made of labels alone, if the stage's inputs are inputs of the example;
    3. "bootstrap unshuffled": the first `max_demos` successes in train order;
    4. "random 1" to "random n": a random number, 1 to `max_demos`, of random successes; further ones, one by one, if
       the task asks for more LM calls than these take.

    3 and 4 draw whole rollouts, so the demos of different stages show the same examples; if a rollout called
    a stage more than once, one of the calls is drawn. A stage with fewer than `max_labelled_demos` is filled up to that
    number with labelled demos of other examples, after the bootstrapped ones. A stage that reasons has no labelled
    demos, since labels hold no reasoning: with fewer than `max_demos` successes, some unsolved examples run once more
    with the gold answer as a hint. With no success at all, 3 is skipped and 4 draws only labelled demos. Only demos
    change: instructions stay, and a stage that gets no demo keeps its prompt.

    Args:
        num_candidates: random demo sets. The paper says 6 candidates; whether that counts the first three is not known.
        max_demos: most bootstrapped demos per stage (paper: 3).
        max_labelled_demos: a stage's demos are filled up to this number with labelled ones; 0 uses none.
        restart: bootstrap from, and build upon, the initial prompts, as the paper's third step does; False: the
            incumbent.
        attempts: most runs of a train example, until one succeeds.
        chunk: examples per LM batch when scoring.
        racing: null scores candidates one by one and always finds the best on dev. A confidence, such as 0.98, runs
            them side by side and drops early those that are worse with that confidence. That takes about half the
            rollouts on 100 dev examples or more, but sometimes keeps one nearly as good as the best (see `choose`).
    """

    def __init__(
        self,
        num_candidates: int = 6,
        max_demos: int = 3,
        max_labelled_demos: int = 3,
        restart: bool = True,
        attempts: int = 1,
        chunk: int = 64,
        racing: float | None = None,
    ) -> None:
        at_least(0, "num_candidates", num_candidates, "0 tries no random demo sets")
        at_least(1, "max_demos", max_demos, "the paper uses 3")
        at_least(0, "max_labelled_demos", max_labelled_demos, "0 uses no labelled demos")
        at_least(1, "attempts", attempts, "1 runs every train example once")
        at_least(1, "chunk", chunk, "it is the number of examples in an LM batch")
        self.num_candidates, self.max_demos, self.max_labelled_demos = num_candidates, max_demos, max_labelled_demos
        if racing is not None and not 0.5 < racing < 1:
            raise BadValueError(
                f"racing {racing} is outside (0.5, 1); null switches it off, 0.98 is a good confidence."
            )
        self.restart, self.attempts, self.chunk, self.racing = restart, attempts, chunk, racing

    def most_runs(self, train: int, dev: int) -> int:
        told = min(train, HINTED * self.max_demos)
        return self.attempts * train + told + (4 + self.num_candidates) * dev

    def search(self, task: SearchTask) -> Found:
        calls = CountingLM(task.runner.lm)
        task = replace(task, runner=replace(task.runner, lm=calls))
        start = task.initial if self.restart else task.incumbent
        made = bootstrap(task, start, attempts=self.attempts, enough=self.max_demos)
        labelled, left_out = labelled_pool(task)
        proposals, notes = [Proposal(task.initial, "zero-shot")], [*made.notes, *left_out]
        for why, demos in self.demo_sets(made.solved, labelled, task.seed):
            if any(demos.values()):
                proposals.append(Proposal(with_demos(start, demos), why, parent=prompts_id(start)))
            else:
                notes.append(f'"{why}" skipped: there are no demos for it')
        found = choose(task, proposals, chunk=self.chunk, racing=self.racing, notes=notes, faults=made.faults)
        if calls.calls >= task.lm_calls:
            return found
        more = (
            Proposal(with_demos(start, demos), why, parent=prompts_id(start))
            for why, demos in self._further_sets(made.solved, labelled, task.seed)
        )
        return go_on(task, found, more, until=lambda: calls.calls >= task.lm_calls, chunk=self.chunk)

    def demo_sets(self, solved: Sequence[Solved], labelled: DemoSet, seed: int) -> list[tuple[str, DemoSet]]:
        """The demo sets to try, by name; an empty one has nothing to show."""
        sets: list[tuple[str, DemoSet]] = [
            ("labels-only", self._filled((), labelled, seed, "labels-only")),
            ("bootstrap unshuffled", self._unshuffled(solved, labelled, seed)),
        ]
        sets += [self._random(number, solved, labelled, seed) for number in range(1, self.num_candidates + 1)]
        return sets

    def _further_sets(self, solved: Sequence[Solved], labelled: DemoSet, seed: int) -> Iterator[tuple[str, DemoSet]]:
        """Random sets beyond `num_candidates`, without end; none if there is nothing to draw from."""
        if solved or labelled:
            yield from (self._random(n, solved, labelled, seed) for n in count(self.num_candidates + 1))

    def _random(self, number: int, solved: Sequence[Solved], labelled: DemoSet, seed: int) -> tuple[str, DemoSet]:
        why = f"random {number}"
        drawn = _draw_solved(solved, self.max_demos, generator(seed, why))
        return why, self._filled(drawn, labelled, seed, why)

    def _unshuffled(self, solved: Sequence[Solved], labelled: DemoSet, seed: int) -> DemoSet:
        # Without a success this would be labels-only under a wrong name.
        return self._filled(solved[: self.max_demos], labelled, seed, "bootstrap unshuffled") if solved else {}

    def _filled(self, drawn: Sequence[Solved], labelled: DemoSet, seed: int, why: str) -> DemoSet:
        """One demo a stage from each drawn success, then labelled ones of other examples."""
        sources = {one.source for one in drawn}
        filled: dict[str, list[Demo]] = {}
        for stage in dict.fromkeys([*(stage for one in drawn for stage in one.demos), *labelled]):
            # A generator for each stage, seeded alike: stages with the same pool draw the same examples.
            rng = generator(seed, f"{why} demos")
            own = [rng.choice(one.demos[stage]) for one in drawn if stage in one.demos]
            rest = draw_demos(labelled.get(stage, ()), self.max_labelled_demos - len(own), rng, sources)
            filled[stage] = [*own, *rest]
        return filled


def _draw_solved(solved: Sequence[Solved], most: int, rng: random.Random) -> list[Solved]:
    size = rng.randint(1, most)
    return rng.sample(list(solved), min(size, len(solved)))


def with_demos(start: Prompts, demos: DemoSet) -> Prompts:
    """The prompts with these demos in place of their own, stages without any as they were."""
    return {
        stage: replace(prompt, demos=tuple(demos[stage])) if demos.get(stage) else prompt
        for stage, prompt in start.items()
    }
