"""Schedules as text, as configs, records and tables have them."""

from __future__ import annotations

from collections.abc import Sequence

VANILLA = "vanilla"
"""What the program is called as it came, before any step."""


def steps_of(text: str) -> tuple[str, ...]:
    """The letters of a schedule in order. Spacing, letter case and the kind of arrow do not matter.

    >>> steps_of("p->w → P"), steps_of("")
    (('p', 'w', 'p'), ())
    """
    parts = text.replace("→", "->").split("->")
    return tuple(part.strip().lower() for part in parts) if text.strip() else ()


def name_of(steps: Sequence[str]) -> str:
    """What the program is called after these steps.

    >>> name_of(("p", "w")), name_of(())
    ('p -> w', 'vanilla')
    """
    return " -> ".join(steps) or VANILLA
