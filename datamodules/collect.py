"""Collecting: the program's own runs on the train set, kept all, for an objective to choose from."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from cotune.datamodules.bootstrapping import Bootstrapping, Runs
from cotune.datamodules.collected import Attempt, Collected, passing
from cotune.datamodules.encode import Vocabulary
from cotune.datamodules.teacher import teach
from cotune.errors import CotuneError
from cotune.programs import (
    Demo,
    Example,
    Program,
    Prompts,
    Runner,
    draw_demos,
    hide_own_demos,
    labelled_demos,
    prompts_id,
)
from cotune.programs.demos import demo_of, hinted
from cotune.programs.forms import forms_of

_DRAW_SHARED_BY = 8
"""Examples that share one draw of demos: sharing saves prefill, more draws find more traces."""


class NoTracesError(CotuneError):
    """A weight step has nothing to learn from; its own exit code tells a table of runs."""

    exit_code = 3


def collect(
    examples: Sequence[Example],
    runner: Runner,
    prompts: Prompts,
    *,
    options: Bootstrapping,
    seed: int,
    progress: Callable[[int], None] | None = None,
    vocabulary: Vocabulary = Vocabulary(),  # noqa: B008 (frozen)
) -> Collected:
    """Runs the program on each example until enough runs succeed, or the attempts are used up; keeps all runs."""
    attempts: list[Attempt] = []
    pool: dict[str, list[Demo]] = labelled_demos(runner.program, examples, forms_of(runner.form, prompts))
    # Later attempts rerun only unsolved examples, so the error rate can be high even if few examples fail.
    warmer = replace(runner.sampling, temperature=options.temperature, top_p=1.0)
    later = replace(runner, sampling=warmer, max_error_rate=1.0)
    wanting, solved = list(examples), 0
    while wanting:
        number = attempts[-1].number + 1 if attempts else 0
        shown = _prompts_for(runner.program, prompts, wanting, pool, options, number, seed)
        done = (later if number else runner).run(wanting, shown, seed=seed, attempt=number)
        hinting = number >= options.attempts
        attempts += [Attempt(r, number, prompts_id(p), hinting) for r, p in zip(done, shown, strict=True)]
        successes = passing(attempts, options)
        for attempt in successes:
            if attempt.number == number:
                for step in attempt.rollout.steps:
                    signature = runner.program.stages[step.stage].signature
                    pool.setdefault(step.stage, []).append(demo_of(signature, step, attempt.example))
        wanting = _wanting(examples, successes, options, number + 1)
        before, solved = solved, len({attempt.example for attempt in successes})
        if progress is not None:
            progress(solved - before if wanting else len(examples) - before)
    if options.teacher is not None:
        unsolved = _unsolved(examples, attempts, options)
        # Offsets on the student's choices mean nothing to another LM, and an endpoint cannot add them.
        bare = {stage: replace(prompt, calibration={}) for stage, prompt in prompts.items()}
        shown = [hide_own_demos(bare, example.id) for example in unsolved]
        number = options.attempts + options.hints
        taught = teach(options.teacher, unsolved, runner, shown, seed=seed, attempt=number, encode=vocabulary.encode)
        ids = {example.id: prompts_id(own) for example, own in zip(unsolved, shown, strict=True)}
        attempts += [Attempt(run, number, ids[run.example.id], taught=True) for run in taught]
    forms = forms_of(runner.form, prompts)
    return Collected(tuple(attempts), tuple(examples), options, runner.program, forms, vocabulary)


def collect_runs(
    examples: Sequence[Example],
    runner: Runner,
    prompts: Prompts,
    *,
    runs: Runs,
    options: Bootstrapping,
    seed: int,
    progress: Callable[[int], None] | None = None,
    vocabulary: Vocabulary = Vocabulary(),  # noqa: B008 (frozen)
) -> Collected:
    """So many runs of each example, whatever becomes of them. Completions tell how likely each token was.

    Args:
        progress: told of each example once, after its last run.
        options: say what passes.
    """
    drawn = replace(runner.sampling, temperature=runs.temperature, top_p=1.0, log_probs=True)
    shown = [hide_own_demos(prompts, example.id) for example in examples]
    attempts: list[Attempt] = []
    for number in range(runs.each):
        told = progress if number == runs.each - 1 else None
        done = replace(runner, sampling=drawn).run(examples, shown, seed=seed, attempt=number, progress=told)
        attempts += [Attempt(r, number, prompts_id(p)) for r, p in zip(done, shown, strict=True)]
    forms = forms_of(runner.form, prompts)
    return Collected(tuple(attempts), tuple(examples), options, runner.program, forms, vocabulary)


def _wanting(
    examples: Sequence[Example], successes: Sequence[Attempt], options: Bootstrapping, number: int
) -> list[Example]:
    """The examples that attempt `number` is for: those without enough successes; a hint is for those without any."""
    if number >= options.attempts + options.hints:
        return []
    enough = options.traces_per_example if number < options.attempts else 1
    found = Counter(attempt.example for attempt in successes)
    return [example for example in examples if found[example.id] < enough]


def _unsolved(examples: Sequence[Example], attempts: Sequence[Attempt], options: Bootstrapping) -> list[Example]:
    solved = {attempt.example for attempt in passing(attempts, options)}
    return [example for example in examples if example.id not in solved]


def _prompts_for(
    program: Program,
    prompts: Prompts,
    examples: Sequence[Example],
    pool: Mapping[str, Sequence[Demo]],
    options: Bootstrapping,
    number: int,
    seed: int,
) -> list[Prompts]:
    """The prompts of an attempt, for each example: no run may read its own answer off a demo."""
    if number and options.fresh_demos:
        rng = random.Random(f"{seed}|{number}")
        given = _fresh_prompts(prompts, examples, pool, count=options.fresh_demos, rng=rng)
    else:
        given = [hide_own_demos(prompts, example.id) for example in examples]
    if number < options.attempts:
        return given
    return [hinted(program, shown, example) for shown, example in zip(given, examples, strict=True)]


def _fresh_prompts(
    prompts: Prompts,
    examples: Sequence[Example],
    pool: Mapping[str, Sequence[Demo]],
    *,
    count: int,
    rng: random.Random,
) -> list[Prompts]:
    """Prompts with freshly drawn demos for each example, never one of its own.

    Examples are put into groups at random, and a group has one draw, from outside it: what its examples share is
    computed once, while an attempt still sees many draws.
    """
    order = list(range(len(examples)))
    rng.shuffle(order)
    given: dict[int, Prompts] = {}
    for start in range(0, len(order), _DRAW_SHARED_BY):
        group = order[start : start + _DRAW_SHARED_BY]
        own = {examples[i].id for i in group}
        drawn = {stage: draw_demos(pool.get(stage, ()), count, rng, exclude_sources=own) for stage in prompts}
        shown = {stage: replace(p, demos=tuple(drawn[stage]) or p.demos) for stage, p in prompts.items()}
        for i in group:
            # Where there was nothing to draw a stage keeps the demos it had, and those may be the example's own.
            given[i] = hide_own_demos(shown, examples[i].id)
    return [given[i] for i in range(len(examples))]
