"""Programs of one or two stages: predict straight away, think first, or describe before deciding."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any

from cotune.errors import BadValueError
from cotune.programs.program import Call, Outputs, Program, Stage
from cotune.programs.signature import Signature
from cotune.programs.types import Reasoning


class Predict(Program):
    """One stage: the signature's inputs to its outputs.

    Args:
        signature: e.g. "question -> answer".
        instruction: the task in words; a plain sentence made of the field names when empty.
        descriptions: a sentence for any field.
        reasoning: put a `reasoning` field before the outputs (chain of thought), as the paper's programs do.
        types: type of any field that the signature names none for, as a signature writes it; a list of texts or
            numbers stands for the choices of a field.
        scores: predictions hold "scores", too: field -> choice -> log-probability, for each field with choices.
    """

    def __init__(
        self,
        signature: str,
        instruction: str = "",
        descriptions: dict[str, str] | None = None,
        reasoning: bool = False,
        types: dict[str, str | list[str | bool | int | float]] | None = None,
        scores: bool = False,
    ) -> None:
        parsed = Signature.parse(signature, instruction=instruction, descriptions=descriptions, types=types)
        self.predict = Stage(with_reasoning(parsed) if reasoning else parsed, scores=scores)

    def run(self, **inputs: Any) -> Generator[Call, Outputs, Mapping[str, Any]]:
        return (yield self.predict(**inputs))


class DescribeThenDecide(Program):
    """Two stages: `describe` puts the inputs into words, `decide` answers from inputs and words.

    Only the final answer has labels; what a good description is, the program has to find out by itself.

    Args:
        signature: the whole program's, e.g. "petal_length, petal_width -> answer".
        describe: instruction of the first stage.
        decide: instruction of the second.
        descriptions: a sentence for any field of either stage (`description` is the one between them).
        choices: what a description may be; any text without them.
    """

    def __init__(
        self,
        signature: str,
        describe: str,
        decide: str,
        descriptions: dict[str, str] | None = None,
        choices: list[str | bool | int | float] | None = None,
    ) -> None:
        whole, about = Signature.parse(signature), descriptions or {}
        between = ("description",)
        inputs = (*whole.inputs, *between)
        types = {**whole.types, **({"description": choices} if choices else {})}
        first, second = (
            Signature(taken, given, how, _only(about, (*taken, *given)), _only(types, (*taken, *given)))
            for taken, given, how in ((whole.inputs, between, describe), (inputs, whole.outputs, decide))
        )
        unknown = sorted(set(about) - set(second.inputs) - set(second.outputs))
        if unknown:
            raise BadValueError(f'"{unknown[0]}" is described, but is no field of {signature} and not "description".')
        self.describe, self.decide = Stage(first), Stage(second)

    def run(self, **inputs: Any) -> Generator[Call, Outputs, Mapping[str, Any]]:
        described = yield self.describe(**inputs)
        return (yield self.decide(**inputs, description=described["description"]))


def with_reasoning(signature: Signature) -> Signature:
    """The signature with a `reasoning` output in front: chain of thought (Wei et al., 2022).

    >>> with_reasoning(Signature.parse("question -> answer")).outputs
    ('reasoning', 'answer')
    """
    about = {"reasoning": "think step by step", **signature.descriptions}
    outputs = ("reasoning", *signature.outputs)
    return replace(signature, outputs=outputs, descriptions=about, types={"reasoning": Reasoning, **signature.types})


def _only(about: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: text for name, text in about.items() if name in names}
