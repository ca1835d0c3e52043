"""Pool: candidates that are kept, who leads where, and what can be made of two lineages."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cotune.programs import Prompts
from cotune.prompting.search import Candidate


@dataclass(frozen=True)
class Member:
    """A candidate of the pool, scored on all of dev.

    Attributes:
        objectives: mean over dev by name, where the metric gives some.
        parents: places in the pool of what it was made from.
    """

    candidate: Candidate
    objectives: Mapping[str, float] = field(default_factory=dict)
    parents: tuple[int, ...] = ()


@dataclass(frozen=True)
class Merge:
    """Prompts made of two members: each stage from the one that has changed it since their common ancestor.

    Attributes:
        pair: places of the two.
        sources: stage -> place of the member that it comes from.
    """

    prompts: Prompts
    pair: tuple[int, int]
    sources: Mapping[str, int]


def leads(pool: Sequence[Member]) -> dict[int, int]:
    """Place -> on how many dev examples and objectives the member is the best, those that are dominated left out.

    A member is dominated where, wherever it is the best, another that stays is as good. The lowest scores are looked at
    first, and of equal scores the later, so that what stays is high and early (GEPA, arXiv 2507.19457, algorithm 2).

    >>> ours = [Member(Candidate({}, scores)) for scores in ((1.0, 0.0), (0.0, 1.0), (0.0, 0.5))]
    >>> leads(ours)
    {0: 1, 1: 1}
    """
    fronts = [_best(column) for column in zip(*(member.candidate.scores for member in pool), strict=True)]
    names = dict.fromkeys(name for member in pool for name in member.objectives)
    fronts += [_best([member.objectives.get(name, 0.0) for member in pool]) for name in names]
    staying = set().union(*fronts)
    for place in sorted(staying, key=lambda place: (pool[place].candidate.rank, -place)):
        if all(place not in front or len(front & staying) > 1 for front in fronts):
            staying.discard(place)
    return {place: sum(place in front for front in fronts) for place in sorted(staying)}


def draw_parent(pool: Sequence[Member], rng: random.Random) -> int:
    """A place of the pool, the oftener the more it leads."""
    leading = leads(pool)
    return rng.choices(list(leading), weights=list(leading.values()))[0]


def merges(pool: Sequence[Member]) -> list[Merge]:
    """What can be made of two leading members of separate lineages, where each gives a stage.

    A stage comes from the member that has changed it since the common ancestor; where both have, from the better of the
    two, the earlier of equals.
    """
    leading = list(leads(pool))
    lines = _lineages(pool)
    found = []
    for at, first in enumerate(leading):
        for second in leading[at + 1 :]:
            shared = lines[first] & lines[second]
            if not shared or first in lines[second] or second in lines[first]:
                continue
            origin = max(shared, key=lambda place: (pool[place].candidate.rank, -place))
            sources = _sources(pool, first, second, origin)
            if set(sources.values()) == {first, second}:
                prompts = {stage: pool[place].candidate.prompts[stage] for stage, place in sources.items()}
                found.append(Merge(prompts, (first, second), sources))
    return found


def _best(scores: Sequence[float]) -> set[int]:
    best = max(scores)
    return {place for place, score in enumerate(scores) if score == best}


def _lineages(pool: Sequence[Member]) -> list[set[int]]:
    """The ancestors of each member."""
    lines: list[set[int]] = []
    for member in pool:  # parents stand before their children
        lines.append(set(member.parents).union(*(lines[parent] for parent in member.parents)))
    return lines


def _sources(pool: Sequence[Member], first: int, second: int, origin: int) -> dict[str, int]:
    """Where each stage of a merge comes from; none where one member would give all."""
    better = max((first, second), key=lambda place: (pool[place].candidate.rank, -place))
    ours, theirs, old = (pool[place].candidate.prompts for place in (first, second, origin))
    found = {}
    for stage in ours:
        if ours[stage] == theirs[stage]:
            continue
        changed = [place for place, prompts in ((first, ours), (second, theirs)) if prompts[stage] != old[stage]]
        found[stage] = changed[0] if len(changed) == 1 else better
    return {**dict.fromkeys(ours, better), **found} if set(found.values()) == {first, second} else {}


def mean_objectives(objectives: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each objective over runs; a run that gives none counts as 0.

    >>> mean_objectives([{"short": 1.0}, {}])
    {'short': 0.5}
    """
    names = dict.fromkeys(name for one in objectives for name in one)
    return {name: math.fsum(one.get(name, 0.0) for one in objectives) / len(objectives) for name in names}
