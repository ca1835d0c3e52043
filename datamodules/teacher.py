"""Teaching: another LM runs the examples that the student does not solve, and its successes become the student's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from cotune.programs import LM, Example, Prompt, Prompts, RoleSpentError, Rollout, Runner, Step
from cotune.programs.forms import form_of

_AT_ONCE = 32
"""Examples run together, so that what was answered is kept where the teacher's calls end."""


def teach(
    teacher: LM,
    examples: Sequence[Example],
    runner: Runner,
    prompts: Sequence[Prompts],
    *,
    seed: int,
    attempt: int,
    encode: Callable[[str], Sequence[int]],
) -> list[Rollout]:
    """The teacher's runs of these examples, with what it wrote as the student would have written it.

    Its completions are read by the form and the metric like the student's. What passes is trained on, so each step's
    outputs are written anew in the form, in the student's ids: nothing remains of the teacher's template, of its
    thinking or of its tokens.

    Args:
        runner: the student's; its faults are those of the unsolved examples alone, so any number of them is let pass.
        prompts: for each example.
        encode: text -> the student's ids.

    Returns:
        A run for each example, in their order; for the first of them only, where the teacher's `max_calls` are made.
    """
    asking = replace(runner, lm=teacher, max_error_rate=1.0)
    done: list[Rollout] = []
    for start in range(0, len(examples), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        try:
            made = asking.run(examples[part], prompts[part], seed=seed, attempt=attempt)
        except RoleSpentError as spent:
            print(f"the teacher stopped after {len(done)} of {len(examples)} unsolved examples: {spent.bound}.")
            break
        done += made
    return [
        replace(one, steps=tuple(_rewritten(step, runner, given[step.stage], encode) for step in one.steps))
        for one, given in zip(done, prompts, strict=False)
    ]


def _rewritten(step: Step, runner: Runner, prompt: Prompt, encode: Callable[[str], Sequence[int]]) -> Step:
    if not step.outputs:  # it could not be read
        return step
    text = form_of(runner.form, prompt).write(runner.program.stages[step.stage].signature, step.outputs)
    cut = step.completion.finished == "length"
    completion = replace(
        step.completion,
        text=text,
        prompt_ids=(),
        completion_ids=tuple(encode(text)),
        finished="length" if cut else "stop",
        forced=(),
        log_probs=(),
        thinking="",
    )
    return replace(step, completion=completion)
