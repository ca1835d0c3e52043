"""Reflection: what an LM is shown of a stage's runs, so that it can write a better instruction for the stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cotune.programs import Program, Prompt, Rollout, Step
from cotune.programs.types import as_text
from cotune.prompting.propose import cut, fenced
from cotune.prompting.search import UNREADABLE


def reflection(
    program: Program, stage: str, prompt: Prompt, runs: Sequence[Rollout], *, rules: str, max_chars: int = 1000
) -> str:
    """The request for a new instruction of one stage.

    It holds every call of the stage in these runs, by number, the worst run first, each with what came after it: the
    outputs of other stages, the prediction, the score, and the feedback. A run without feedback shows what was
    expected.

    Args:
        rules: about the text that is wanted; see `Proposer.rules`.
        max_chars: longest value that is shown; of a longer one the beginning and the end.
    """
    ordered = sorted(runs, key=lambda run: (run.error is None, run.score))  # stable: else in the order of the runs
    shown = [f"# Run {n} of {len(runs)}\n{_run(run, stage, max_chars)}" for n, run in enumerate(ordered, 1)]
    return "\n\n".join(
        [
            f'You improve the instruction of the stage "{stage}" of a language model program. Its stages:\n'
            + "\n".join(f"- {name}: {one.signature}" for name, one in program.stages.items()),
            f'The instruction of "{stage}" now:\n{fenced(prompt.instruction)}',
            f'What "{stage}" did with it, and what came of that:',
            *shown,
            "Write a new instruction for this stage. Keep what works. Say what the feedback and the expected results "
            "show to be missing, as rules that hold for inputs not seen here, facts of the task included. Do not "
            f"answer the runs above.\n{rules}",
        ]
    )


def expected(labels: Mapping[str, Any], max_chars: int) -> list[str]:
    """The labels of an example, one line each."""
    return [f"{name}: {cut(_text(value), max_chars)}" for name, value in labels.items()]


def blamed_stages(runs: Sequence[Rollout]) -> Mapping[str, int]:
    """Stage -> how many of the runs are not right by its doing, as far as anything says so."""
    blamed: Counter[str] = Counter()
    for run in runs:
        if run.error is not None and run.error.kind in UNREADABLE and run.steps:
            blamed[run.steps[-1].stage] += 1  # its answer could not be read
        elif run.score < 1:
            blamed.update(stage for stage, text in run.stages.items() if text.strip())
    return blamed


def _run(run: Rollout, stage: str, max_chars: int) -> str:
    places = [place for place, step in enumerate(run.steps) if step.stage == stage]
    lines: list[str] = []
    for number, place in enumerate(places, 1):
        lines += [f'Call {number} of "{stage}"', *_call(run.steps[place], max_chars)]
    if not places:
        lines.append(f'"{stage}" was not called.')
    last = places[-1] if places else -1
    later = [step for step in run.steps[last + 1 :] if step.stage != stage]
    for step in later:
        lines += [f'Then "{step.stage}" wrote', *_wrote(step, max_chars // 4)]
    return "\n".join([*lines, *_outcome(run, stage, max_chars)])


def _call(step: Step, max_chars: int) -> list[str]:
    asked = [f"  {name}: {cut(value, max_chars)}" for name, value in step.inputs.items()]
    return ["It was given", *asked, "It wrote", *_wrote(step, max_chars)]


def _wrote(step: Step, max_chars: int) -> list[str]:
    if step.outputs:
        return [f"  {name}: {cut(value, max_chars)}" for name, value in step.outputs.items()]
    return [f"  {cut(step.completion.text.strip(), max_chars) or '(nothing)'}"]


def _outcome(run: Rollout, stage: str, max_chars: int) -> list[str]:
    lines = []
    if run.prediction is not None:
        lines += [
            "The program's result",
            *(f"  {name}: {cut(_text(v), max_chars)}" for name, v in run.prediction.items()),
        ]
    lines.append(f"Score: {run.score:.3g} of 1")
    if run.error is not None:
        lines.append(f"Error: {cut(run.error.message, max_chars)}")
    said = [text.strip() for text in (run.stages.get(stage, ""), run.feedback) if text.strip()]
    lines += [f"Feedback: {cut(text, max_chars)}" for text in dict.fromkeys(said)]
    if not said and run.example.labels:
        lines += ["Expected", *(f"  {line}" for line in expected(run.example.labels, max_chars))]
    return lines


def _text(value: Any) -> str:
    try:
        return as_text(value)
    except TypeError:
        return str(value)
