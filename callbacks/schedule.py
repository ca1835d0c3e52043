"""Schedules: the order of prompt and weight steps, read from a string such as "p -> w -> p"."""

from __future__ import annotations

from typing import Literal

StepKind = Literal["p", "w"]

_NAMES = {"p": "prompts", "w": "weights"}
_HELP = 'Steps are "p" (prompts) and "w" (weights), e.g. "p -> w -> p".'


def parse_schedule(text: str) -> tuple[StepKind, ...]:
    """Steps in order. Spacing, letter case and the kind of arrow do not matter.

    >>> parse_schedule("p->w ->P")
    ('p', 'w', 'p')

    Raises:
        ValueError: a step is unknown, or there is none.
    """
    parts = [part.strip() for part in text.replace("→", "->").split("->")]
    if parts == [""]:
        raise ValueError(f"the schedule is empty. {_HELP}")
    steps: list[StepKind] = []
    for part in parts:
        step = part.lower()
        if step not in _NAMES:
            raise ValueError(f'schedule "{text}": unknown step "{part}". {_HELP}')
        steps.append(step)  # type: ignore[arg-type]
    return tuple(steps)


def prefix_name(steps: tuple[StepKind, ...], count: int) -> str:
    """How the state after `count` steps is called in tables.

    >>> prefix_name(("p", "w", "p"), 2), prefix_name(("p", "w"), 0)
    ('p -> w', 'vanilla')
    """
    return " -> ".join(steps[:count]) or "vanilla"
