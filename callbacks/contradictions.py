"""Contradictions: what makes every score 0 whatever the LM writes, found before or at the first batch and said."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from cotune.callbacks.boundary import Boundary, BoundaryListener
from cotune.callbacks.progress import say
from cotune.datamodules import TraceDataModule
from cotune.errors import CotuneError
from cotune.lightning_modules import ProgramModule
from cotune.programs import Example, FieldTypeError, Form, Metric, NamedValues, Program, Rollout, Signature
from cotune.programs.demos import label_text
from cotune.programs.faults import quoted, raised
from cotune.programs.metrics import COMPARE_FIELDS, BatchMetric
from lightning.pytorch import Callback, LightningModule, Trainer

_MAX_SECONDS = 5.0
"""For asking the metric about the labels themselves. One that takes longer, as where it asks an LM, is asked less."""


class ContradictionError(CotuneError, ValueError):
    """Data, metric, program and LM cannot go together: whatever is tuned, the score stays 0."""


class FindContradictions(Callback, BoundaryListener):
    """Looks, before the model is loaded, whether labels can be reached, and at the first predictions, whether they are.

    Refused are labels that no prediction has, that are no value of their field's type, that the metric scores below
    `bootstrapping.threshold` against themselves, or that the form can never write; and prompts that never fit the
    model's window. Where that cannot be known for sure a line says so.
    """

    def __init__(self) -> None:
        self._fits = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        looked, self._fits = self._fits, self._fits or stage == "fit"  # a fit's look is at the sets of its test, too
        data = getattr(trainer, "datamodule", None)
        if not looked and isinstance(pl_module, ProgramModule) and isinstance(data, TraceDataModule):
            examples = _used(data, stage)
            check_fields(pl_module.program, data.metric, examples)
            found = check_texts(pl_module.program, pl_module.form, examples)
            found += check_gold(
                data.metric, examples, threshold=data.bootstrapping.threshold, program=pl_module.program
            )
            for line in found:
                say(line)

    def on_boundary(self, trainer: Trainer, module: LightningModule, boundary: Boundary) -> None:
        assert isinstance(module, ProgramModule)
        self._look(trainer, module, boundary.rollouts, first=boundary.index == 0)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate" and isinstance(pl_module, ProgramModule):
            self._look(trainer, pl_module, pl_module.evaluated, first=True)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Behind a fit the first predictions have been looked at, and a test score of 0 may be what it is.
        if isinstance(pl_module, ProgramModule) and not self._fits:
            self._look(trainer, pl_module, pl_module.evaluated, first=True)

    def _look(self, trainer: Trainer, module: ProgramModule, done: Sequence[Rollout], *, first: bool) -> None:
        found = window_note(done, module.lm.window)
        if first:
            check_window(done, module.lm.window, module.sampling.max_new_tokens)
            found += cut_note(done, module.sampling.max_new_tokens)
            found += check_predictions(done, trainer.datamodule.metric)  # type: ignore[attr-defined]
        for line in found:
            say(line)


def check_fields(program: Program, metric: Metric, examples: Sequence[Example]) -> None:
    """Refuses labels that no output can equal, as far as the signatures tell.

    Raises:
        ContradictionError: a label that the metric compares with the field of its name is no field of the program (of
            cotune's own programs: others may return what they like), or a label is no value of its field's type.
    """
    labels = list(dict.fromkeys(name for example in examples for name in example.labels))
    outputs = list(dict.fromkeys(name for stage in program.stages.values() for name in stage.signature.outputs))
    unknown = [name for name in labels if name not in outputs]
    if unknown and metric in COMPARE_FIELDS and _is_cotunes(program):
        raise ContradictionError(_no_field(unknown[0], labels, outputs, "is no output of the program; it gives"))
    for stage in program.stages.values():
        for name in (n for n in stage.signature.outputs if n in labels and n in stage.signature.types):
            wrong = [(e, why) for e in examples if (why := _no_value(stage.signature, name, e.labels.get(name)))]
            if wrong:
                example, why = wrong[0]
                raise ContradictionError(
                    f"example {example.id}: the label {name} {quoted(example.labels[name], limit=80)} cannot be "
                    f"an answer: {why} This holds for {len(wrong)} of {len(examples)} labels. Fix these or the type."
                )


def check_texts(program: Program, form: Form, examples: Sequence[Example]) -> list[str]:
    """Looks whether the form can write each label so that it is read back. Returns what to say of those it cannot.

    Raises:
        ContradictionError: it can write none of a field's labels.
    """
    found = []
    signatures = [stage.signature for stage in program.stages.values()]
    for signature, name in ((one, name) for one in signatures for name in one.outputs):
        labels = [e for e in examples if e.labels.get(name) is not None]
        wrong = [(e, why) for e in labels if (why := _unwritable(form, signature, name, e.labels[name]))]
        if wrong:
            message = (
                f"example {wrong[0][0].id}: the form {type(form).__name__} cannot write the label {name} so that "
                f"it is read back: {wrong[0][1]}. So it is with {len(wrong)} of {len(labels)} labels"
            )
            if len(wrong) == len(labels):
                raise ContradictionError(f"{message}. Fix the data, or use another model.form.")
            found.append(f"{message}; they are never shown as demos or taught as gold answers")
    return list(dict.fromkeys(found))


def check_gold(
    metric: Metric, examples: Sequence[Example], *, threshold: float, program: Program | None = None
) -> list[str]:
    """Asks the metric about the labels themselves, which should be right. Returns what to say.

    Where the program is one of cotune's, which predict what their last stage's types read, so are the labels read. Any
    other may predict what it likes: where the metric passes a label and not what the field's type reads of it, that is
    said.

    A metric that needs more than the labels (raises, or asks for other fields) cannot be asked, and that is said; so
    are labels that it scores below `threshold` against themselves, where it passes others.

    Raises:
        ContradictionError: it passes no label against itself, so that no run can be known to succeed.
    """
    signatures = [stage.signature for stage in program.stages.values()] if program else []
    known = program is not None and _is_cotunes(program)
    wrong: list[tuple[Example, Any, Mapping[str, Any]]] = []
    apart: list[tuple[Example, Any, Mapping[str, Any]]] = []
    unasked: list[str] = []
    began, asked = time.monotonic(), 0
    for example in examples:
        if time.monotonic() - began > _MAX_SECONDS:
            break
        asked += 1
        try:
            read = _read(example, signatures[-1:] if known else signatures)
            score, missed = _of_itself(metric, example, read if known else {}, threshold)
        except Exception as error:  # the user's code
            unasked.append(f"example {example.id}: {raised(error)}")
            continue
        if missed and not float(score) >= threshold:
            unasked.append(f"example {example.id}: it looks for {missed[0]}, which is no label")
        elif not float(score) >= threshold:
            wrong.append((example, score, read if known else {}))
        elif read and not known and not isinstance(metric, BatchMetric):  # which may ask an LM
            with contextlib.suppress(Exception):  # the user's code; a program that predicts something else may be right
                typed, _ = _of_itself(metric, example, read, threshold)
                if not float(typed) >= threshold:
                    apart.append((example, typed, read))
    if wrong and len(wrong) == asked:
        raise ContradictionError(_below_one(metric, wrong, asked, threshold))
    found = [_below_one(metric, wrong, asked, threshold)] if wrong else []
    found += [_typed_below_one(metric, apart, asked)] if apart else []
    if asked < len(examples):
        found.append(
            f"whether the metric scores labels as right was tried on {asked} of {len(examples)} examples: more would "
            f"have taken longer than {_MAX_SECONDS:g} s"
        )
    if unasked:
        first = f"whether the metric scores labels as right could not be tried on {len(unasked)} of {asked} examples"
        found.append(f"{first} ({unasked[0]})")
    return found


def check_window(done: Sequence[Rollout], window: int, max_new_tokens: int) -> None:
    """Refuses prompts that never fit the model's window, or fill it so far that every answer is cut off by its end.

    Raises:
        ContradictionError: so it is with every run, and none has a score.
    """
    last = [rollout.steps[-1].completion for rollout in done if rollout.steps]
    long = [len(c.prompt_ids) for c in last if c.finished == "too_long"]
    filled = [
        len(c.prompt_ids)
        for c in last
        if c.finished == "length" and 0 < window - len(c.prompt_ids) < max_new_tokens // 2
    ]
    if not done or len(long) + len(filled) < len(done) or any(rollout.score for rollout in done):
        return
    reasons = [f"{len(long)} of {len(done)} prompts are longer than it"] if long else []
    reasons += [f"{len(filled)} of {len(done)} prompts leave next to nothing of it for an answer"] if filled else []
    raise ContradictionError(
        f"the model's window of {window:,} tokens is too small: {'; '.join(reasons)} (the prompts have "
        f"{min(long + filled):,} to {max(long + filled):,} tokens, and up to {max_new_tokens:,} more are generated). "
        "Use a model with a longer window, or shorten inputs, passages and instructions."
    )


def window_note(done: Sequence[Rollout], window: int) -> list[str]:
    """How many runs ended at a prompt that did not fit the window, as a line; none where all fitted."""
    last = [rollout.steps[-1].completion for rollout in done if rollout.steps]
    long = [len(c.prompt_ids) for c in last if c.finished == "too_long"]
    if not long:
        return []
    return [
        f"{len(long)} of {len(done)} runs scored 0 because a prompt was longer than the model's window of {window:,} "
        f"tokens (up to {max(long):,}): fewer or shorter demos or passages would fit"
    ]


def cut_note(done: Sequence[Rollout], max_new_tokens: int) -> list[str]:
    """Says where every run was cut off before its answer; [] where one was not."""
    unread = [r.steps[-1].completion for r in done if r.error and r.error.kind == "format" and r.steps]
    cut = [completion for completion in unread if completion.finished == "length"]
    if not cut or len(cut) < len(done):
        return []
    return [
        f"{len(cut)} of {len(done)} completions were cut before their answer, at {max_new_tokens} new tokens; "
        "--model.sampling.max_new_tokens allows more"
    ]


def check_predictions(done: Sequence[Rollout], metric: Metric) -> list[str]:
    """Looks for the labels' fields in predictions. Returns what to say where another metric than cotune's scores all 0.

    Raises:
        ContradictionError: a label that the metric compares with the field of its name is in no prediction.
    """
    predictions = [rollout.prediction for rollout in done if rollout.prediction is not None]
    labels = list(dict.fromkeys(name for rollout in done for name in rollout.example.labels))
    fields = list(dict.fromkeys(str(name) for prediction in predictions for name in prediction))
    unknown = [name for name in labels if name not in fields]
    if not predictions or not unknown:
        return []
    if metric in COMPARE_FIELDS:
        raise ContradictionError(_no_field(unknown[0], labels, fields, "is in no prediction; predictions have"))
    if any(rollout.score for rollout in done):
        return []
    return [f'all scores are 0, and the label "{unknown[0]}" is in no prediction; predictions have {", ".join(fields)}']


def _used(data: TraceDataModule, stage: str) -> list[Example]:
    parts = {"validate": ("val",), "test": ("test",)}.get(stage, ("train", "dev", "val", "test"))
    return [example for part in parts for example in getattr(data.splits, part)]


def _no_field(label: str, labels: Sequence[str], fields: Sequence[str], said: str) -> str:
    free = [name for name in fields if name not in labels and name != "reasoning"]
    column = (
        f"rename it, as in data.labels {{{free[0]}: {label}}}" if len(free) == 1 else "name the column of one of these"
    )
    return f'the label "{label}" {said} {", ".join(fields) or "nothing"}. Labels are compared by name: {column}.'


def _no_value(signature: Signature, name: str, label: Any) -> str:
    """Why a label is no value of its field's type; "" where it is one, or one of its several answers is."""
    try:
        if label is not None:
            label_text(signature, name, label)
    except (FieldTypeError, TypeError) as error:
        return str(error)
    return ""


def _unwritable(form: Form, signature: Signature, name: str, label: Any) -> str:
    """Why the form cannot write a label so that it is read back; "" where it can, or it is no text at all."""
    try:
        return form.unwritable(signature, {name: label_text(signature, name, label)})
    except (FieldTypeError, TypeError):
        return ""  # other checks say so


def _is_cotunes(program: Program) -> bool:
    """Whether the program is known to predict what its last stage wrote, under the names of its outputs."""
    return type(program).__module__.split(".")[0] == "cotune"


class _Asked(NamedValues):
    """A prediction that notes what it was asked for and does not have."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(copy.deepcopy(dict(values)))
        self._missed: list[str] = []  # no field's name, since fields are attributes

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python looks for, as to copy it
            raise AttributeError(name)
        return super().__getattr__(name)

    def __missing__(self, name: str) -> NoReturn:
        self._missed.append(name)
        super().__missing__(name)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or bool(self._missed.append(str(name)))  # type: ignore[func-returns-value]

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 (which notes it)


def _read(example: Example, signatures: Sequence[Signature]) -> dict[str, Any]:
    """Labels that their field's type reads as another value: name -> that value, as a prediction then has it. Of
    several stages with a field the last decides."""
    found = {}
    for signature in signatures:
        for name in set(example.labels) & set(signature.types) & set(signature.outputs):
            with contextlib.suppress(FieldTypeError, TypeError):  # other checks say so
                found[name] = signature.value(name, label_text(signature, name, example.labels[name]))
    return {n: value for n, value in found.items() if isinstance(value, list) or value != example.labels[n]}


def _of_itself(metric: Metric, example: Example, read: Mapping[str, Any], threshold: float) -> tuple[Any, list[str]]:
    """The metric's score of an example's labels as prediction, and what it missed there. Of several answers the first
    will do."""
    first = {n: v[0] if isinstance(v, (list, tuple)) and v else v for n, v in example.labels.items()}
    for labels in ({**first, **read}, {**example.labels, **read}):
        prediction = _Asked(labels)
        score = metric(copy.deepcopy(example), prediction)
        if float(score) >= threshold:
            break
    return score, prediction._missed


def _typed_below_one(metric: Metric, apart: Sequence[tuple[Example, Any, Mapping[str, Any]]], asked: int) -> str:
    example, score, read = apart[0]
    values = "; ".join(
        f"{field} {quoted(example.labels[field], limit=80)} as {quoted(value, limit=80)}"
        for field, value in read.items()
    )
    return (
        f"example {example.id}: its field's type reads the label {values}, which the metric {_name(metric)} scores "
        f"{float(score):g}. So it is with {len(apart)} of {asked} labels: a program that returns what a stage gave it "
        "is never right on them. Write the labels as the type reads them, or change the type or the metric."
    )


def _name(metric: Metric) -> str:
    return str(getattr(metric, "__name__", type(metric).__name__))


def _below_one(
    metric: Metric, wrong: Sequence[tuple[Example, Any, Mapping[str, Any]]], asked: int, threshold: float
) -> str:
    example, score, read = wrong[0]
    labels = "; ".join(f"{field} {quoted(value, limit=80)}" for field, value in example.labels.items())
    other = [value for n, value in read.items() if value != example.labels[n]]
    labels += "".join(f", which its type reads as {quoted(value, limit=80)}" for value in other)
    why = f" ({score.feedback})" if getattr(score, "feedback", "") else ""
    return (
        f"example {example.id}: the metric {_name(metric)} scores the right answer itself ({labels}) "
        f"{float(score):g}{why}, so no run on it can reach {threshold:g}. This holds for {len(wrong)} of {asked} "
        "labels. Fix the labels or the metric; where less is enough, lower data.bootstrapping.threshold."
    )
