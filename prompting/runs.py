"""Runs: rollouts of pairs of prompts and example, each made once in a search and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cotune.programs import Completion, Example, Faults, Prompts, Rollout, faults_of, prompts_id
from cotune.programs.demos import hide_own_demos
from cotune.programs.faults import merged
from cotune.prompting.search import SearchTask

Pair = tuple[Prompts, Example]


class Runs:
    """Makes rollouts for a search, all that are asked for at once in one lockstep batch, and none twice.

    A run depends on its prompts, its example and the task's seed alone, so asking again would give the same again. An
    example never sees demos made from itself.

    Attributes:
        made: rollouts made so far.
        faults: of the user's code in them.
    """

    def __init__(self, task: SearchTask) -> None:
        self._task = task
        self._kept: dict[tuple[str, str], Rollout] = {}
        self.made = 0
        self.faults: Faults = {}

    def missing(self, pairs: Sequence[Pair]) -> int:
        """How many of these have not been run."""
        return len({_key(pair) for pair in pairs} - set(self._kept))

    def of(self, pairs: Sequence[Pair], what: str) -> list[Rollout]:
        """The rollout of each pair, in their order. `what` names them to the task's progress."""
        new = {key: pair for pair in pairs if (key := _key(pair)) not in self._kept}
        if new:
            done = self._run(list(new.values()), what)
            self._kept.update(zip(new, map(_slim, done), strict=True))
            self.made += len(new)
            self.faults = merged(self.faults, faults_of(done))
        return [self._kept[_key(pair)] for pair in pairs]

    def _run(self, pairs: Sequence[Pair], what: str) -> list[Rollout]:
        task = self._task
        if task.progress is not None:
            task.progress.start(len(pairs), what)
        # Two faults in a minibatch of three say nothing of the program; of dev they are checked where it is scored.
        runner = replace(task.runner, max_error_rate=1.0)
        return runner.run(
            [example for _, example in pairs],
            [hide_own_demos(prompts, example.id) for prompts, example in pairs],
            seed=task.seed,
            progress=None if task.progress is None else task.progress.advance,
        )


def _key(pair: Pair) -> tuple[str, str]:
    return prompts_id(pair[0]), pair[1].id


def _slim(rollout: Rollout) -> Rollout:
    """The rollout without chats and token ids, which a search of many candidates would hold by the gigabyte."""
    steps = tuple(
        replace(step, messages=(), completion=Completion(step.completion.text, finished=step.completion.finished))
        for step in rollout.steps
    )
    return replace(rollout, steps=steps)
