"""Demos of stages: made from labels, drawn from a pool, and hidden from the example they come from."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cotune.programs.example import Example
from cotune.programs.form import Form
from cotune.programs.layout import Schema
from cotune.programs.program import Program
from cotune.programs.prompt import Demo, Prompt, Prompts
from cotune.programs.rollout import Rollout, Step
from cotune.programs.signature import Signature
from cotune.programs.types import FieldTypeError, Line, as_text, syntax_of
from cotune.programs.values import gold_text

_HINT = re.compile(r"(?<![A-Za-z])hint(?:s|ed|ing)?(?![A-Za-z])", re.IGNORECASE)  # other scripts join words


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
    """How a label stands in a field: as the field's type writes it; of several answers, the first that is of the type.

    >>> label_text(Signature.parse("text -> count: int"), "count", ["seven", "7"])
    '7'

    Raises:
        FieldTypeError: the label is no value of the field's type.
        TypeError: it cannot be shown to an LM; see `as_text`.
    """
    syntax = syntax_of(signature.type_of(name))
    several = list(label) if isinstance(label, (list, tuple)) and label else []
    wrong: list[Exception] = []
    for one in [label, *several] if isinstance(syntax, Schema) or not several else several:
        try:
            return as_text(one) if syntax is None else signature.text(name, one)
        except (FieldTypeError, TypeError) as error:
            wrong.append(error)
    raise wrong[0]


def canonical(signature: Signature, outputs: Mapping[str, str]) -> dict[str, str]:
    """Outputs as their types write them: what an LM that only gives text wrote, as one that is held to the types would.

    >>> canonical(Signature.parse("text -> cost: float, why"), {"cost": "$1,200.50", "why": "It says so."})
    {'cost': '1200.5', 'why': 'It says so.'}

    Raises:
        FieldTypeError: a text is no value of its field's type.
    """
    typed = {n for n in outputs if (kind := signature.type_of(n)) is Line or syntax_of(kind) is not None}
    return {name: _canonical_text(signature, name, text) if name in typed else text for name, text in outputs.items()}


def demo_of(signature: Signature, step: Step, source: str) -> Demo:
    """A call as a demo of its stage."""
    return Demo(dict(step.inputs), outputs_of(signature, step), source)


def outputs_of(signature: Signature, step: Step) -> dict[str, str]:
    """A call's outputs to learn from: what an engine filled in as it was written, and other texts as `canonical`."""
    return dict(step.outputs) if step.completion.fields else canonical(signature, step.outputs)


def _canonical_text(signature: Signature, name: str, text: str) -> str:
    value = signature.value(name, text)
    with contextlib.suppress(FieldTypeError):  # a model may write other names than it reads
        written = signature.text(name, value)
        if signature.value(name, written) == value:
            return written
    return text


def hinted(program: Program, prompts: Prompts, example: Example) -> dict[str, Prompt]:
    """The prompts with the example's labels as a hint behind each stage's instruction."""
    labels = {name: value for name, value in example.labels.items() if value is not None}
    gold = "; ".join(f"{name}: {_final_text(program, name, value)}" for name, value in labels.items())
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
    """Whether a text that the LM wrote mentions the hint it was shown, and not one in its inputs or the gold answer."""
    labels = [label for label in rollout.example.labels.values() if label is not None]
    answers = [one for label in labels for one in (label if isinstance(label, (list, tuple)) else [label])]
    golds = [text for one in answers if one is not None and (text := gold_text(one).strip())]
    gold = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, golds)) or '(?!)'})(?!\w)", re.IGNORECASE)
    return any(
        _HINT.search(gold.sub("", text)) and not any(map(_HINT.search, step.inputs.values()))
        for step in rollout.steps
        for text in step.outputs.values()
    )


def _has(values: Mapping[str, Any], name: str) -> bool:
    return values.get(name) is not None
