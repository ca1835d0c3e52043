"""Warm-up: a few rollouts and one training step of a fit, timed: `python -m cotune.table.warm_up OUT fit ...`."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cotune.cli import guarded
from cotune.datamodules import Pair, collate
from cotune.lightning_modules.gradients import BatchGradients
from cotune.programs import Example, Prompt, draw_demos, labelled_demos
from cotune.programs.rollout import Rollout, rollouts
from cotune.table.cost import Pace
from cotune.table.parts import Parts, parts_of

_EXAMPLES = 8
_DEMOS = 3


def measure(parts: Parts) -> Pace:
    """The pace of these parts; loads the LM. `seconds_a_start` is what the measuring took: the rest is the start.

    Half of the rollouts show demos, as half of a table's do. A first batch is not counted: it pays for what comes once.
    """
    module, data = parts.module, parts.data
    module.configure_model()
    began = time.perf_counter()
    examples = list(data.splits.train[:_EXAMPLES])
    _run(parts, examples[:1], demos=False)
    before = module.lm.usage
    calls, tokens, seconds = before.calls, before.prompt_tokens, before.seconds
    done = [*_run(parts, examples, demos=False), *_run(parts, examples, demos=True)]
    usage = module.lm.usage
    calls, tokens, seconds = usage.calls - calls, usage.prompt_tokens - tokens, usage.seconds - seconds
    pairs = [
        Pair(step.completion.prompt_ids, step.completion.completion_ids or (module.lm.end_ids[0],))
        for rollout in done
        for step in rollout.steps
        if step.completion.finished != "too_long"
    ]
    a_pair = _seconds_a_pair(parts, pairs[: data.batch_size])
    took = time.perf_counter() - began
    return Pace(tokens / max(calls, 1), seconds / max(calls, 1), a_pair, seconds_a_start=took)


def _run(parts: Parts, examples: Sequence[Example], *, demos: bool) -> list[Rollout]:
    module, data = parts.module, parts.data
    prompts = dict(module.initial_prompts)
    if demos:
        rng = random.Random(0)
        shown = labelled_demos(module.program, data.splits.train)
        asked = {example.id for example in examples}
        for stage, prompt in prompts.items():
            drawn = draw_demos(shown.get(stage, ()), _DEMOS, rng, exclude_sources=asked)
            prompts[stage] = Prompt(prompt.instruction, tuple(drawn))
    return rollouts(
        module.program,
        examples,
        lm=module.lm,
        prompts=prompts,
        template=module.template,
        metric=None,
        sampling=module.sampling,
        max_error_rate=1.0,
    )


def _seconds_a_pair(parts: Parts, pairs: list[Pair]) -> float:
    if not pairs:
        return 0.0
    model = parts.module.lm.model
    trained = [p for p in model.parameters() if p.requires_grad]
    batch = collate([pairs], pad_id=parts.module.lm.pad_id).to(trained[0].device)
    began = time.perf_counter()
    BatchGradients(None).compute(model, trained, batch).loss.item()
    return (time.perf_counter() - began) / len(pairs)


def main() -> int:
    out, *words = sys.argv[1:]

    def run() -> int:
        Path(out).write_text(measure(parts_of(words)).write(), encoding="utf-8")
        return 0

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
