"""Prefixes that prompts share: which of them to compute once, and those computed before."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from cotune.inference import engine
from cotune.inference.engine import Prompted
from cotune.inference.local.cascade import KeyValues
from cotune.programs.shared_prefix import common, shared_prefix

BLOCK = 128
"""Tokens of a prefix that are computed together. What is kept is reused in whole blocks, so that a prefix has the same
bits whether or not a part of it was kept."""

_GROUP_COST = 48
"""What another group costs, in tokens: below this a longer shared prefix is not worth a smaller group."""

_READ_AGAIN = 4
"""Each group reads its prefix's keys and values at every step of decoding, which several small groups do much more
slowly than a large one. So a prefix counts as longer by one in so many tokens."""


def waves_by_prefix(prompts: Sequence[Prompted]) -> list[list[int]]:
    """Indices of the prompts in waves, those with much in common together. It depends on the prompts alone."""
    order = [i for group in group_by_shared_prefix([prompt.ids for prompt in prompts]) for i in group]
    return [order[start : start + engine.WAVE] for start in range(0, len(order), engine.WAVE)]


def group_by_shared_prefix(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of the prompts, grouped so that computing each group's shared prefix once costs least.

    A group of n prompts costs its shared prefix once, the rest of each prompt, and `group_cost` for being a group. No
    grouping whatever has a lower sum. It depends on the prompts alone.

    >>> group_by_shared_prefix([[1] * 100 + [2], [5] * 100 + [6], [1] * 100 + [3]])
    [[0, 2], [1]]
    """
    nodes = _radix_tree(prompts)
    closes_below = _groups_pay(nodes)
    groups: list[list[int]] = []
    for node, below in zip(nodes, closes_below, strict=True):  # a prompt joins the nearest group above it
        above = node.parent.home if node.parent else None
        node.home = node if (above.level + 1 if above else 0) < below else above
        if node.home is None:
            groups += [[i] for i in node.members]
        else:
            node.home.group += node.members
    groups += [node.group for node in nodes if node.group]
    return sorted((sorted(group) for group in groups), key=lambda group: group[0])


def group_cost(shared: int) -> int:
    """What a group with a prefix of so many tokens costs beside computing it, in tokens."""
    return _GROUP_COST + shared // _READ_AGAIN


@dataclass(eq=False)
class _Node:
    """A prefix of `depth` tokens at which prompts part: `members` share no more than it with any other prompt."""

    depth: int
    parent: _Node | None = None
    level: int = 0
    members: list[int] = field(default_factory=list)
    home: _Node | None = None  # itself or the node above whose group its members join
    group: list[int] = field(default_factory=list)


def _radix_tree(prompts: Sequence[Sequence[int]]) -> list[_Node]:
    """The radix tree of the prompts, parents first. A prompt's last token is its own, so it does not count."""
    # In sorted order a prompt shares most with a neighbour, so the tree is made by one walk along its rightmost path.
    order = sorted(range(len(prompts)), key=lambda i: (tuple(prompts[i][:-1]), i))
    shared = [shared_prefix([prompts[i], prompts[j]]) for i, j in pairwise(order)]
    path = [_Node(0)]  # from the root to where the last prompt hangs
    nodes = path[:]
    for i, before, after in zip(order, [0, *shared], [*shared, 0], strict=False):
        below = None
        while path[-1].depth > before:
            below = path.pop()
        if before > path[-1].depth:  # here the prompt before parted from this one, with all that hangs below
            path.append(_Node(before, path[-1]))
            nodes.append(path[-1])
            if below is not None:
                below.parent = path[-1]
        if after > path[-1].depth:
            path.append(_Node(after, path[-1]))
            nodes.append(path[-1])
        path[-1].members.append(i)
    nodes.sort(key=lambda node: node.depth)
    for node in nodes[1:]:
        assert node.parent is not None
        node.level = node.parent.level + 1
    return nodes


def _groups_pay(nodes: Sequence[_Node]) -> list[int]:
    """For each node: below which level of the nearest group above it (counted from 1; 0 is none) it should be a group.

    Compared with computing each prompt for itself, a group of n prompts with a prefix of P tokens saves
    (n - 1) P - group_cost(P): each prompt P, the group less P and its own cost. So what a node's prompts save hangs on
    one thing above it, the depth of the group they would join, and is best found from the leaves up.
    """
    saved: dict[_Node, list[int]] = {}
    closes_below = []
    for node in reversed(nodes):
        above, at = [node.depth], node.parent
        while at is not None:
            above.append(at.depth)
            at = at.parent
        own = len(node.members)
        best = [own * gain for gain in (-group_cost(0), *reversed(above))]  # by the group above: none, the root's, ...
        if node in saved:
            best = [a + b for a, b in zip(best, saved.pop(node), strict=True)]
        as_group = best.pop() - node.depth - group_cost(node.depth)
        closes_below.append(sum(as_group >= joining for joining in best))
        if node.parent is not None:
            best = [max(as_group, joining) for joining in best]
            so_far = saved.get(node.parent)
            saved[node.parent] = best if so_far is None else [a + b for a, b in zip(so_far, best, strict=True)]
    return closes_below[::-1]


class PrefixCache:
    """Keys and values of prefixes, kept while the weights stay: a radix tree over token ids, as a sorted list.

    In a sorted list of sequences, the one that shares most with a new sequence stands beside the place where that
    would be put. What was used longest ago goes first when `tokens` are exceeded.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._kept: list[tuple[int, ...]] = []
        self._states: dict[tuple[int, ...], KeyValues] = {}  # in the order of their last use

    def get(self, ids: Sequence[int]) -> KeyValues | None:
        """Of this very prefix."""
        key = tuple(ids)
        if key in self._states:
            self._states[key] = self._states.pop(key)
        return self._states.get(key)

    def longest(self, ids: Sequence[int]) -> tuple[KeyValues, int] | None:
        """The kept prefix that shares most whole blocks with these ids, and how many tokens those are."""
        key = tuple(ids)
        place = bisect.bisect(self._kept, key)
        shared = {kept: common(kept, key) // BLOCK * BLOCK for kept in self._kept[max(place - 1, 0) : place + 1]}
        best = max(shared, key=lambda kept: shared[kept], default=None)
        return (self._states[best], shared[best]) if best is not None and shared[best] else None

    def put(self, ids: Sequence[int], states: KeyValues) -> None:
        key = tuple(ids)
        bisect.insort(self._kept, key)
        self._states[key] = states
        while len(self._states) > 1 and sum(states.capacity for states in self._states.values()) > self.tokens:
            oldest = next(iter(self._states))
            del self._states[oldest]
            self._kept.remove(oldest)

    def clear(self) -> None:
        self._kept.clear()
        self._states.clear()
