"""Searches around another one: they settle something that all prompts have, and let it search on with that."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cotune.programs import Program
from cotune.programs.faults import merged
from cotune.prompting.demos import RandomDemoSearch
from cotune.prompting.search import Found, PromptSearch


class SearchAround(PromptSearch):
    """A search that another one is part of.

    Args:
        then: the search inside; `RandomDemoSearch` without one.
    """

    def __init__(self, then: PromptSearch | None = None) -> None:
        self.then = then or RandomDemoSearch()

    @property
    def proposer(self) -> Any:
        """Of the search inside, which has an LM of its own where that one writes instructions."""
        return getattr(self.then, "proposer", None)

    @proposer.setter
    def proposer(self, proposer: Any) -> None:
        self.then.proposer = proposer  # type: ignore[attr-defined]

    def for_program(self, program: Program) -> PromptSearch:
        inside = self.then.for_program(program)
        if inside is self.then:
            return self
        own = copy.copy(self)
        own.then = inside
        return own

    def about_proposals(self, stages: int, dev: int) -> int:
        return self.then.about_proposals(stages, dev)


def joined(parts: Sequence[Found]) -> Found:
    """What searches found one after the other, each beginning with the best of the one before: the last one's prompts,
    and everything that was tried, once."""
    known = dict.fromkeys(candidate.id for part in parts for candidate in part.candidates)
    first = {candidate.id: candidate for part in reversed(parts) for candidate in reversed(part.candidates)}
    return replace(
        parts[-1],
        candidates=tuple(first[one] for one in known),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
        faults=merged(*(part.faults for part in parts)),
        rejected=tuple(text for part in parts for text in part.rejected),
        calls={role: sum(part.calls.get(role, 0) for part in parts) for role in {r for p in parts for r in p.calls}},
    )
