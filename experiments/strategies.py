"""Strategies: orders of prompt and weight steps, and the fewest schedules that run all of them as prefixes."""

from __future__ import annotations

from collections.abc import Iterable

from cotune.callbacks.schedule import parse_schedule
from cotune.storage.schedule_text import VANILLA

Steps = tuple[str, ...]
"""The steps of a strategy in order; () is the program as it came, "vanilla"."""

PAPERS = (VANILLA, "p", "w", "p -> p", "w -> w", "p -> w", "w -> p", "p -> w -> p")
"""The eight strategies of the paper's table, in its order."""


def parse_strategy(text: str) -> Steps:
    """Steps of a strategy: "vanilla", or a schedule of any length.

    >>> parse_strategy("w->P"), parse_strategy("p -> d"), parse_strategy("vanilla")
    (('w', 'p'), ('p', 'd'), ())

    Raises:
        ValueError: a step is unknown.
    """
    return () if text.strip().lower() == VANILLA else parse_schedule(text)


def covering(strategies: Iterable[Steps]) -> list[Steps]:
    """The fewest schedules of which every strategy is a prefix, the longest first.

    A strategy that is a prefix of another needs no run of its own, and one that is not needs one: so these are the
    strategies that no other continues. A run has at least one step: vanilla alone is run as "p".

    >>> from cotune.storage.schedule_text import name_of
    >>> [name_of(steps) for steps in covering(parse_strategy(name) for name in PAPERS)]
    ['p -> w -> p', 'p -> p', 'w -> w', 'w -> p']
    """
    wanted = dict.fromkeys(strategies)
    longest = [s for s in wanted if s and not any(o != s and o[: len(s)] == s for o in wanted)]
    return sorted(longest or ([("p",)] if wanted else []), key=len, reverse=True)
