"""Slices of a batch, shared out among processes; their gradients add up to the same however many share them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from cotune.datamodules.collate import Batch
from cotune.programs.ranks import Ranks
from torch import Tensor

Gradients = Sequence[Tensor | None]
"""One a parameter; None where it has no part in the loss."""

_Node = tuple[int, int]
"""The slices from the first number up to the second."""


def add_up(
    slices: Sequence[Batch],
    compute: Callable[[Batch, int], tuple[Tensor, Gradients]],
    ranks: Ranks,
    *,
    parameters: Sequence[Tensor],
    like_nK: Tensor,
) -> tuple[Tensor, Gradients]:
    """What is computed of a whole batch of n tokens.

    Sums follow a binary tree over the slices. A process adds up the largest parts of it that are all its own, and the
    others get those: so the order of all sums is one, and as many slices give the same bits in 1, 2, 4 or 8 processes.

    Args:
        compute: (slice, place of its first token) -> (m, K) log-probabilities of its m tokens, and gradients. A process
            may have no slice, and a slice no rows.
        parameters: what gradients are of; none where none are wanted.
        like_nK: anything of the log-probabilities' shape, type and device.

    Raises:
        Exception: what `compute` raises in one process is raised in all.
    """
    starts = list(accumulate((part.tokens for part in slices), initial=0))  # each slice's first token; n at the end
    nodes = [_nodes((0, len(slices)), ranks.share(len(slices), rank)) for rank in range(ranks.count)]
    found_nK = torch.zeros_like(like_nK)  # what others compute comes in at the end
    seed = torch.initial_seed()

    def of_slice(node: _Node) -> Gradients | None:
        first, end = node
        if end - first > 1:
            return None
        if not slices[first].rows:
            return [None] * len(parameters)  # more slices than rows
        if len(slices) > 1:  # what dropout draws must not depend on who draws it
            torch.manual_seed((seed + 1 + first) % 2**63)
        found_nK[starts[first] : starts[end]], gradients = compute(slices[first], starts[first])
        return gradients

    mine: list[Gradients] = []

    def compute_mine() -> list[list[bool]]:
        mine.extend(_along_tree(node, of_slice) for node in nodes[ranks.index])
        return [[one is not None for one in gradients] for gradients in mine]

    there = ranks.together(compute_mine)
    if len(slices) > 1:
        torch.manual_seed(seed)
    if ranks.count == 1:
        return found_nK, mine[0]  # one node: the whole tree
    for rank, theirs_nK in enumerate(ranks.gather_tensors(found_nK)):
        for first, end in nodes[rank]:
            found_nK[starts[first] : starts[end]] = theirs_nK[starts[first] : starts[end]]
    if not parameters:
        return found_nK, []
    known = _exchanged(nodes, mine, there, ranks, parameters)
    return found_nK, _along_tree((0, len(slices)), known.get)


def _exchanged(
    nodes: Sequence[Sequence[_Node]],
    mine: Sequence[Gradients],
    there: Sequence[Sequence[Sequence[bool]]],
    ranks: Ranks,
    parameters: Sequence[Tensor],
) -> dict[_Node, Gradients]:
    """The gradients of all processes' nodes.

    Args:
        nodes: of each process.
        mine: gradients of this one's.
        there: for each process and node, which parameters have one.
    """
    # (M, G): as many rows as any process has nodes, for a collective wants one shape of all; G numbers a gradient.
    flat = parameters[0].new_zeros(max(map(len, nodes)), sum(p.numel() for p in parameters))
    for row, gradients in zip(flat, mine, strict=False):
        row.copy_(torch.cat([_flat(g, p) for g, p in zip(gradients, parameters, strict=True)]))
    return {
        node: _unflat(row, parameters, present)
        for rank, rows in enumerate(ranks.gather_tensors(flat))
        for node, row, present in zip(nodes[rank], rows, there[rank], strict=False)
    }


def _nodes(node: _Node, share: range) -> list[_Node]:
    """The largest parts of the tree below a node that lie within a share.

    >>> _nodes((0, 8), range(0, 4)), _nodes((0, 8), range(2, 5)), _nodes((0, 8), range(0))
    ([(0, 4)], [(2, 4), (4, 5)], [])
    """
    first, end = node
    if first in share and end - 1 in share:
        return [node]
    # Cut by the number of slices alone, never by that of processes: the tree is one and the same for all of them.
    middle = (first + end) // 2
    return [] if end - first == 1 else _nodes((first, middle), share) + _nodes((middle, end), share)


def _along_tree(node: _Node, known: Callable[[_Node], Gradients | None]) -> Gradients:
    """The sum over a node's slices, of the sums that are known."""
    if (found := known(node)) is not None:
        return found
    middle = sum(node) // 2
    left, right = _along_tree((node[0], middle), known), _along_tree((middle, node[1]), known)
    return [added(a, b) for a, b in zip(left, right, strict=True)]


def added(so_far: Tensor | None, more: Tensor | None) -> Tensor | None:
    """The sum of two gradients; None is one of zeros."""
    if so_far is None or more is None:
        return more if so_far is None else so_far
    return so_far + more


def _flat(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return parameter.new_zeros(parameter.numel()) if gradient is None else gradient.reshape(-1).to(parameter)


def _unflat(row: Tensor, parameters: Sequence[Tensor], present: Sequence[bool]) -> Gradients:
    parts = torch.split(row, [p.numel() for p in parameters])
    shaped = (part.view_as(p).to(p) for part, p in zip(parts, parameters, strict=True))
    return [part if there else None for part, there in zip(shaped, present, strict=True)]
