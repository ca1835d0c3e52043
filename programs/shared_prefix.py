"""How many leading tokens texts share."""

from __future__ import annotations

from collections.abc import Sequence


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading ids are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all prompts share, leaving each at least one of its own.

    >>> shared_prefix([[1, 2, 3], [1, 2, 4, 5]]), shared_prefix([[1, 2], [1, 2]])
    (2, 1)
    """
    ordered = [tuple(prompt) for prompt in prompts]  # what the extremes of the order share, all share
    return min(common(min(ordered), max(ordered)), min(map(len, ordered)) - 1)
