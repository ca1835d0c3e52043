"""Calibration: what an LM says too often whatever it is asked, taken off the choices of a field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cotune.errors import BadValueError
from cotune.programs.layout import Choices, Field, Layout

Calibration = Mapping[str, Mapping[str, float]]
"""Output field -> choice -> nats that are added to its log-probability."""

_MAX = 50.0
"""Nats that a choice is lifted or lowered by at most; servers take no more than 100."""


def calibrated(layout: Layout, calibration: Calibration) -> Layout:
    """The layout with these offsets on its choices.

    Raises:
        ValueError: a field has no such choices. Choices that are not named have the offset 0.
    """
    if not calibration:
        return layout
    fields = {part.name: part for part in layout if isinstance(part, Field) and isinstance(part.syntax, Choices)}
    for name, nats in calibration.items():
        choices = fields[name].syntax.texts if name in fields else ()  # type: ignore[union-attr]
        if unknown := next((choice for choice in nats if choice not in choices), None):
            has = f"its choices are {', '.join(choices)}" if choices else "it has no choices in this form"
            raise BadValueError(f'the calibration of "{name}" names "{unknown}"; {has}. Remove it from the prompt.')
    return tuple(
        replace(part, syntax=_offset(part.syntax, calibration[part.name]))
        if isinstance(part, Field) and isinstance(part.syntax, Choices) and part.name in calibration
        else part
        for part in layout
    )


def shown(calibration: Calibration) -> str:
    """In words, for reports.

    >>> shown({"answer": {"good": -1.25, "bad": 1.25}})
    'nats on answer: good -1.25, bad +1.25'
    """
    fields = (f"{name}: {', '.join(f'{c} {n:+.2f}' for c, n in nats.items())}" for name, nats in calibration.items())
    return f"nats on {'; '.join(fields)}"


def is_calibrated(layout: Layout) -> bool:
    """Whether any choice of the layout has an offset."""
    return any(isinstance(p, Field) and isinstance(p.syntax, Choices) and bool(p.syntax.offsets) for p in layout)


def _offset(choices: Choices, nats: Mapping[str, float]) -> Choices:
    return replace(choices, offsets=tuple(float(nats.get(text, 0.0)) for text in choices.texts))


def offsets_of(log_probs: Sequence[Mapping[str, float]], known: Mapping[str, float]) -> dict[str, float]:
    """Offsets that make each choice as likely as any other on average (after batch calibration, Zhou et al., 2024).

    No label is looked at. A choice's offset is its mean log-probability over the inputs, taken off, so that choices are
    compared by how much likelier they are here than elsewhere. The offsets' mean is 0.

    Args:
        log_probs: for each input, choice -> the log-probability with which it is decoded, in nats, `known` included.
        known: offsets that were in force; they count towards the result.
    """
    found = {}
    for choice in log_probs[0]:
        mean = math.fsum(max(one[choice], -2 * _MAX) for one in log_probs) / len(log_probs)
        found[choice] = known.get(choice, 0.0) - mean
    middle = math.fsum(found.values()) / len(found)
    # Rounded, so that prompts written to a file are the ones that were scored.
    return {choice: round(min(max(nats - middle, -_MAX), _MAX), 4) for choice, nats in found.items()}
