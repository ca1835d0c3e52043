"""Signatures: what a stage takes and gives, as named fields, and the instruction that says how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_FORM = 'A signature is written "inputs -> outputs" with names separated by commas, e.g. "context, question -> answer".'


@dataclass(frozen=True)
class Signature:
    """The contract of one stage: input fields, output fields and an instruction.

    Attributes:
        inputs: names of the fields that the stage reads, in the order they are shown to the LM.
        outputs: names of the fields that the LM must produce, in order.
        instruction: the task in words. A prompt search may replace it; this is where it starts.
        descriptions: a sentence for any field whose name does not say enough.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    instruction: str = ""
    descriptions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = (*self.inputs, *self.outputs)
        for name in names:
            if not name.isidentifier():
                raise ValueError(f'signature field "{name}" is not a Python name. {_FORM}')
            if names.count(name) > 1:
                raise ValueError(f'signature field "{name}" stands more than once; every field needs its own name.')
        if not self.outputs:
            raise ValueError(f"a signature needs at least one output field. {_FORM}")
        unknown = sorted(set(self.descriptions) - set(names))
        if unknown:
            raise ValueError(f'description of "{unknown[0]}", which is not a field; the fields are {", ".join(names)}.')

    @classmethod
    def parse(cls, text: str, *, instruction: str = "", descriptions: Mapping[str, str] | None = None) -> Signature:
        """Reads a signature from its short form.

        >>> Signature.parse("context, question -> answer").inputs
        ('context', 'question')

        Raises:
            ValueError: the text has not exactly one arrow, or a name is not an identifier or stands twice.
        """
        sides = text.split("->")
        if len(sides) != 2:
            raise ValueError(f'signature "{text}" has {len(sides) - 1} arrows. {_FORM}')
        inputs, outputs = (tuple(name.strip() for name in side.split(",") if name.strip()) for side in sides)
        return cls(inputs, outputs, instruction or _default_instruction(inputs, outputs), dict(descriptions or {}))


def _default_instruction(inputs: tuple[str, ...], outputs: tuple[str, ...]) -> str:
    return f"Given {', '.join(inputs)}, produce {', '.join(outputs)}." if inputs else f"Produce {', '.join(outputs)}."
