"""Teaching: another LM runs the examples that the student does not solve, and its successes become the student's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from cotune.programs import (
    LM,
    Completion,
    Example,
    Prompt,
    Prompts,
    Request,
    RoleSpentError,
    Rollout,
    Runner,
    Sampling,
    Step,
)
from cotune.programs.budget import complete_within
from cotune.programs.demos import outputs_of
from cotune.programs.forms import form_of

_AT_ONCE = 32
"""Examples run together: their later stages are asked before other examples' first ones use up the teacher's calls."""


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
    outputs are written anew in the form, as their types write them, in the student's ids: nothing remains of the
    teacher's template, of its thinking or of its tokens.

    Args:
        runner: the student's; its faults are those of the unsolved examples alone, so any number of them is let pass.
        prompts: for each example.
        encode: text -> the student's ids.

    Returns:
        A run for each example, in their order, less those that it refuses, that its `max_calls` do not last for, or
        whose texts the student's form cannot write.
    """
    asked = _Within(teacher)
    asking = replace(runner, lm=asked, max_error_rate=1.0)
    done: list[Rollout] = []
    for start in range(0, len(examples), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        done += asking.run(examples[part], prompts[part], seed=seed, attempt=attempt)
    ran = [
        (run, given)
        for run, given in zip(done, prompts, strict=True)
        if not any(step.completion.finished == "refused" for step in run.steps)
    ]
    if len(ran) < len(done):
        why = asked.spent.bound if asked.spent else "it refuses the others"
        print(f"the teacher stopped after {len(ran)} of {len(examples)} unsolved examples: {why}.")
    taught, unwritable = [], []
    for run, given in ran:
        steps = [_rewritten(step, runner, given[step.stage], encode) for step in run.steps]
        if faults := [fault for step in steps if (fault := _unwritable(step, runner, given[step.stage]))]:
            unwritable.append(f"example {run.example.id}: {faults[0]}")
        else:
            taught.append(replace(run, steps=tuple(steps)))
    if unwritable:
        print(
            f"{len(unwritable)} of the teacher's {len(ran)} runs left out: the form cannot write their texts so that "
            f"they are read back ({unwritable[0]})."
        )
    return taught


class _Within:
    """An LM that refuses what its `max_calls` do not last for: what was paid before is kept."""

    def __init__(self, lm: LM) -> None:
        self._lm = lm
        self.spent: RoleSpentError | None = None

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        return complete_within(self._lm, requests, sampling, self._met)

    def _met(self, error: RoleSpentError) -> None:
        self.spent = error

    def __getattr__(self, name: str) -> Any:  # what several processes count, and the like
        return getattr(self._lm, name)


def _rewritten(step: Step, runner: Runner, prompt: Prompt, encode: Callable[[str], Sequence[int]]) -> Step:
    if not step.outputs:  # it could not be read
        return step
    signature = runner.program.stages[step.stage].signature
    outputs = outputs_of(signature, step)
    text = form_of(runner.form, prompt).write(signature, outputs)
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
    return replace(step, outputs=outputs, completion=completion)


def _unwritable(step: Step, runner: Runner, prompt: Prompt) -> str:
    """Why the form cannot write what a step gave; "" where it can, as what an engine filled in."""
    if not step.outputs or step.completion.fields:
        return ""
    return form_of(runner.form, prompt).unwritable(runner.program.stages[step.stage].signature, step.outputs)
