"""Warm-up: a few rollouts and one training step of a fit, timed."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace

from cotune.datamodules import Pair, collate
from cotune.experiments.cost import Pace
from cotune.experiments.parts import Parts
from cotune.lightning_modules.training.gradients import BatchGradients
from cotune.programs import Example, Prompt, draw_demos, labelled_demos
from cotune.programs.forms import forms_of
from cotune.programs.rollout import Rollout, Step

_FEW, _MORE = 2, 8
"""Examples of the two passes that are timed: what a pass costs anyway, and what each row adds."""

_ROWS = 64
"""Rows of a pass of the real runs, as a search scores candidates; fewer where dev is smaller."""

_DEMOS = 3


def measure(parts: Parts) -> Pace:
    """The pace of these parts; loads the LM. `seconds_a_start` is what the measuring took: the rest is the start.

    All rollouts show demos, which is more than a run's do. A first pass is not counted: it pays for what comes once.
    """
    module, data = parts.module, parts.data
    module.configure_model()
    began = time.perf_counter()
    examples = list(data.splits.train[: _FEW + _MORE])
    _run(parts, examples[:1])
    _, few = _timed(parts, examples[:_FEW])
    done, more = _timed(parts, examples[_FEW:])
    steps = [step for rollout in done for step in rollout.steps]
    a_pass, a_run = _line_through((_FEW, few), (len(done), more))
    calls_a_run = max(len(steps) / max(len(done), 1), 1.0)
    a_call = (a_run + a_pass / min(_ROWS, max(data.sizes.dev, 1))) / calls_a_run
    tokens = sum(len(step.completion.prompt_ids) for step in steps) / max(len(steps), 1)
    a_pair = _seconds_a_pair(parts, [_pair(parts, step) for step in steps][: data.batch_size])
    return Pace(tokens, a_call, a_pair, seconds_a_start=time.perf_counter() - began)


def _line_through(few: tuple[float, float], more: tuple[float, float]) -> tuple[float, float]:
    """(seconds at 0 rows, seconds a row) of the line through two passes; neither below a tenth of the mean of a row.

    >>> _line_through((2, 6.0), (8, 12.0))
    (4.0, 1.0)
    """
    (n, seconds), (m, longer) = few, more
    if m <= n:
        return 0.0, seconds / max(n, 1)
    least = longer / m / 10
    slope = max((longer - seconds) / (m - n), least)
    return max(longer - m * slope, 0.0), slope


def _timed(parts: Parts, examples: Sequence[Example]) -> tuple[list[Rollout], float]:
    began = time.perf_counter()
    done = _run(parts, examples)
    return done, time.perf_counter() - began


def _run(parts: Parts, examples: Sequence[Example]) -> list[Rollout]:
    module, data = parts.module, parts.data
    prompts = dict(module.initial_prompts)
    rng, shown = random.Random(0), labelled_demos(module.program, data.splits.train, forms_of(module.form, prompts))
    asked = {example.id for example in examples}
    for stage, prompt in prompts.items():
        drawn = draw_demos(shown.get(stage, ()), _DEMOS, rng, exclude_sources=asked)
        prompts[stage] = Prompt(prompt.instruction, tuple(drawn))
    return replace(module.runner(None), max_error_rate=1.0).run(examples, prompts)


def _pair(parts: Parts, step: Step) -> Pair:
    """A step as it is trained on: behind the zero-shot prompt."""
    module = parts.module
    signature, prompt = module.program.stages[step.stage].signature, module.initial_prompts[step.stage]
    ids = module.weights.encode(module.form.render(signature, prompt, step.inputs))
    return Pair(ids, step.completion.completion_ids or (module.weights.end_ids[0],))


def _seconds_a_pair(parts: Parts, pairs: list[Pair]) -> float:
    if not pairs:
        return 0.0
    model = parts.module.weights.model
    trained = [p for p in model.parameters() if p.requires_grad]
    batch = collate([pairs])
    began = time.perf_counter()
    BatchGradients(None).compute(model, trained, batch, parts.module.objective).loss.item()
    return (time.perf_counter() - began) / len(pairs)
