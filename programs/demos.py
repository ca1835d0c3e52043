"""Demos of stages: made from labels, drawn from a pool, and hidden from the example they come from."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cotune.programs.example import Example
from cotune.programs.form import Form
from cotune.programs.layout import Schema
from cotune.programs.program import Program
from cotune.programs.prompt import Demo, Prompt, Prompts
from cotune.programs.rollout import Rollout
from cotune.programs.signature import Signature
from cotune.programs.types import FieldTypeError, as_text, syntax_of
from cotune.programs.values import gold_text


def labelled_demos(
    program: Program, examples: Sequence[Example], forms: Mapping[str, Form] | None = None
) -> dict[str, list[Demo]]:
    """Demos that need no run: a stage's inputs taken from the example's inputs, its outputs from the labels.

    A stage has one for every example that gives ALL of its inputs and at least one of its outputs; outputs without a
    label are left out of the demo, and the form shows them as not given. But a stage that reasons has none where the
    labels lack its reasoning: shown answers without reasoning, an LM stops reasoning (13 tokens an answer instead of
    138 were seen). A value of None counts as not there. Fields are matched by name.

    Args:
        forms: stage -> the form of its prompt: leaves out what it cannot write so that it is read back
            (`Form.unwritable`), and may leave the reasoning out.

    Returns:
        Stage -> demos, in the order of the examples. A stage with none is not a key.

    >>> from cotune.programs.reasoning import Predict
    >>> sums = [Example.of({"question": "1+1"}, {"answer": "2"}, id="a")]
    >>> labelled_demos(Predict("question -> answer"), sums)
    {'predict': [Demo(inputs={'question': '1+1'}, outputs={'answer': '2'}, source='a')]}
    >>> labelled_demos(Predict("question -> answer", reasoning=True), sums)
    {}

    Raises:
        TypeError: a value cannot be shown to an LM; see `as_text`.
    """
    found: dict[str, list[Demo]] = {}
    for name, stage in program.stages.items():
        form = forms[name] if forms else None
        made = [_labelled(form.used(stage.signature) if form else stage.signature, example) for example in examples]
        demos = [demo for demo in made if demo and not (form and form.unwritable(stage.signature, demo.outputs))]
        if demos:
            found[name] = demos
    return found


def draw_demos(pool: Sequence[Demo], k: int, rng: random.Random, exclude_sources: Collection[str] = ()) -> list[Demo]:
    """At most k demos in random order, no two from one source and none from an excluded source.

    Where a source has several demos (a stage called twice in one rollout) one of them is drawn. A demo without a
    source counts as a source of its own.

    >>> pool = [Demo({"q": "1+1"}, {"a": "2"}, "x"), Demo({"q": "2+2"}, {"a": "4"}, "y")]
    >>> draw_demos(pool, 3, random.Random(0), exclude_sources={"x"})
    [Demo(inputs={'q': '2+2'}, outputs={'a': '4'}, source='y')]
    """
    groups: dict[tuple[str, int], list[Demo]] = {}
    for position, demo in enumerate(pool):
        if not demo.source or demo.source not in exclude_sources:
            groups.setdefault((demo.source, -1 if demo.source else position), []).append(demo)
    drawn = rng.sample(list(groups), min(max(k, 0), len(groups)))
    return [rng.choice(groups[key]) for key in drawn]


def hide_own_demos(prompts: Prompts, example_id: str) -> dict[str, Prompt]:
    """The prompts without the demos that come from this example: no run may read off its own answer.

    >>> shown = {"answer": Prompt("Answer.", (Demo({}, {"a": "2"}, "x"), Demo({}, {"a": "4"}, "y")))}
    >>> [demo.source for demo in hide_own_demos(shown, "x")["answer"].demos]
    ['y']
    """
    return {
        stage: replace(prompt, demos=tuple(demo for demo in prompt.demos if demo.source != example_id))
        for stage, prompt in prompts.items()
    }


def _labelled(signature: Signature, example: Example) -> Demo | None:
    inputs = {
        name: signature.shown(name, example.inputs[name]) for name in signature.inputs if _has(example.inputs, name)
    }
    outputs = {
        name: label_text(signature, name, example.labels[name])
        for name in signature.outputs
        if _has(example.labels, name)
    }
    lacks_reasoning = signature.reasoning and signature.reasoning not in outputs
    if len(inputs) < len(signature.inputs) or not outputs or lacks_reasoning:
        return None
    return Demo(inputs, outputs, source=example.id)


def label_text(signature: Signature, name: str, label: Any) -> str:
    """How a label stands in a field: as the field's type writes it; of several answers that are right, the first.

    Raises:
        FieldTypeError: the label is no value of the field's type.
        TypeError: it cannot be shown to an LM; see `as_text`.
    """
    kind = signature.type_of(name)
    if isinstance(label, (list, tuple)) and label and not isinstance(syntax_of(kind), Schema):
        label = label[0]
    return as_text(label) if syntax_of(kind) is None else signature.text(name, label)


def hinted(program: Program, prompts: Prompts, example: Example) -> dict[str, Prompt]:
    """The prompts with the example's labels as a hint behind each stage's instruction."""
    gold = "; ".join(f"{name}: {_final_text(program, name, value)}" for name, value in example.labels.items())
    hint = f"Hint, which your reply must not mention: the final result should be {gold}."
    return {stage: replace(prompt, instruction=f"{prompt.instruction}\n{hint}") for stage, prompt in prompts.items()}


def _final_text(program: Program, name: str, label: Any) -> str:
    """A label as the last stage that has such an output would write it."""
    for stage in reversed(program.stages.values()):
        if name in stage.signature.outputs:
            with contextlib.suppress(FieldTypeError):
                return label_text(stage.signature, name, label)
    return gold_text(label)


def speaks_of_hint(rollout: Rollout) -> bool:
    """Whether a text that the LM wrote mentions the hint it was shown, and not one in its own inputs."""
    return any(
        "hint" in text.lower() and not any("hint" in given.lower() for given in step.inputs.values())
        for step in rollout.steps
        for text in step.outputs.values()
    )


def _has(values: Mapping[str, Any], name: str) -> bool:
    return values.get(name) is not None
