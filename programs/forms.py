"""Forms by name, so that prompts can choose among them: a prompt step may search the form as it does demos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cotune.errors import BadValueError
from cotune.programs.form import Form, Lines, Markers, ReasonThenFill, Tags
from cotune.programs.json_form import Json
from cotune.programs.layout import Layout
from cotune.programs.lm import Completion
from cotune.programs.prompt import Prompt, Prompts
from cotune.programs.signature import Signature

STRAIGHT = ", straight"
"""Behind a form's name: without the reasoning of stages that reason."""


class Straight(Form):
    """Another form, and the answer straight away: stages that reason do not. Their reasoning is then empty."""

    def __init__(self, form: Form) -> None:
        self.form = form

    def used(self, signature: Signature) -> Signature:
        if not (reasoning := signature.reasoning):
            return signature
        message, types = (
            {k: v for k, v in of.items() if k != reasoning} for of in (signature.descriptions, signature.types)
        )
        return replace(signature, outputs=signature.outputs[1:], descriptions=message, types=types)

    def layout(self, signature: Signature) -> Layout:
        return self.form.layout(self.used(signature))

    def render(self, signature: Signature, prompt: Prompt, inputs: Mapping[str, str]) -> list[dict[str, str]]:
        return self.form.render(self.used(signature), prompt, inputs)

    def write(self, signature: Signature, outputs: Mapping[str, str]) -> str:
        return self.form.write(self.used(signature), outputs)

    def read(self, signature: Signature, completion: Completion) -> dict[str, str]:
        return _silent(signature) | self.form.read(self.used(signature), completion)

    def parse(self, signature: Signature, text: str) -> dict[str, str]:
        return _silent(signature) | self.form.parse(self.used(signature), text)

    def repair(self, signature: Signature, fault: str) -> str:
        return self.form.repair(self.used(signature), fault)

    def unwritable(self, signature: Signature, outputs: Mapping[str, str]) -> str:
        shown = {name: text for name, text in outputs.items() if name != signature.reasoning}
        return self.form.unwritable(self.used(signature), shown)


def _silent(signature: Signature) -> dict[str, str]:
    return {signature.reasoning: ""} if signature.reasoning else {}


_SHIPPED: dict[str, Form] = {
    "reason then fill": ReasonThenFill(),
    "lines": Lines(),
    "tags": Tags(),
    "markers": Markers(),
    "json": Json(),
}


def names() -> list[str]:
    """What a prompt's form may be, "" apart."""
    return [name + ending for name in _SHIPPED for ending in ("", STRAIGHT)]


def form_named(name: str) -> Form:
    """The form of this name.

    Raises:
        ValueError: there is none.
    """
    form = _SHIPPED.get(name.removesuffix(STRAIGHT))
    if form is None:
        raise BadValueError(f'there is no form "{name}"; the forms are {", ".join(names())}.')
    return Straight(form) if name.endswith(STRAIGHT) else form


def form_of(form: Form, prompt: Prompt) -> Form:
    """The form of a prompt: its own, or that of the run."""
    return form_named(prompt.form) if prompt.form else form


def forms_of(form: Form, prompts: Prompts) -> dict[str, Form]:
    """Stage -> the form of its prompt."""
    return {stage: form_of(form, prompt) for stage, prompt in prompts.items()}


def in_form(prompts: Prompts, forms: str | Mapping[str, Prompt]) -> dict[str, Prompt]:
    """The prompts in a form: in the one of that name, or each in that of another's prompt of its stage.

    A calibration is of the form that it was computed in; in another there is none.
    """
    wanted = {stage: forms if isinstance(forms, str) else forms[stage].form for stage in prompts}
    return {
        stage: prompt if prompt.form == wanted[stage] else replace(prompt, form=wanted[stage], calibration={})
        for stage, prompt in prompts.items()
    }
