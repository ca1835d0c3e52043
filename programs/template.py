"""Names from before forms, until their callers have moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cotune.programs.example import Example
from cotune.programs.form import Form, Lines, ParseError
from cotune.programs.lm import LM, Sampling
from cotune.programs.metrics import Metric
from cotune.programs.program import Program
from cotune.programs.prompt import Prompts
from cotune.programs.rollout import Rollout
from cotune.programs.runner import Runner

Template = Form
ChatTemplate = Lines


def rollouts(
    program: Program,
    examples: Sequence[Example],
    *,
    lm: LM,
    prompts: Prompts | Sequence[Prompts],
    template: Form,
    metric: Metric | None,
    sampling: Sampling,
    seed: int = 0,
    attempt: int = 0,
    max_error_rate: float = 0.5,
    progress: Callable[[int], None] | None = None,
) -> list[Rollout]:
    runner = Runner(program, lm, template, metric, sampling, max_error_rate)
    return runner.run(examples, prompts, seed=seed, attempt=attempt, progress=progress)


__all__: list[Any] = ["ChatTemplate", "ParseError", "Template", "rollouts"]
