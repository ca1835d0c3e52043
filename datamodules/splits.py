"""Splits: four disjoint sets of examples, drawn by id, so that the row order of a file has no say in them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cotune.programs import Example
from cotune.programs.faults import shown

NAMES = ("train", "dev", "val", "test")
"""train bootstraps demos and traces, dev scores candidates, val chooses between steps, test is touched once."""


@dataclass(frozen=True)
class Sizes:
    """How many examples each set gets. Only train must have some.

    Raises:
        ValueError: a size is negative or not a whole number, or train is 0.
    """

    train: int
    dev: int
    val: int
    test: int

    def __post_init__(self) -> None:
        for name in NAMES:
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 0:
                raise ValueError(f"sizes.{name} is {size!r}; a size is a whole number of examples, 0 or more.")
        if self.train == 0:
            raise ValueError("sizes.train is 0; demos and traces come from train, so it needs at least 1 example.")


@dataclass(frozen=True)
class Splits:
    """The four sets. An id stands in one of them at most, and there once.

    Raises:
        ValueError: two sets share an id, or one set has it twice.
    """

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    val: tuple[Example, ...]
    test: tuple[Example, ...]

    def __post_init__(self) -> None:
        home: dict[str, str] = {}
        for name in NAMES:
            for example in getattr(self, name):
                other = home.setdefault(example.id, name)
                if other != name:
                    raise ValueError(
                        f'example "{_name(example.id)}" is in both {other} and {name}; the sets must be disjoint.'
                    )
            row_by_id(getattr(self, name), name)


def split(
    examples: Sequence[Example],
    sizes: Sizes,
    *,
    seed: int,
    stratify: str | None = None,
    val: Sequence[Example] | None = None,
    test: Sequence[Example] | None = None,
) -> Splits:
    """Draws disjoint sets. Which example goes where depends on seed and ids only, not on the order of `examples`.

    Args:
        stratify: a label; each set then has its values in the proportion of what it is drawn from, to within rounding.
        val, test: what the set of that name is drawn from, for data that ships with its own. The others are drawn from
            `examples`.

    Raises:
        ValueError: an id stands twice, there are too few examples, or an example lacks the `stratify` label.

    >>> rows = [Example.of({"n": n}, {"even": n % 2 == 0}) for n in range(20)]
    >>> drawn = split(rows, Sizes(8, 2, 4, 6), seed=0, stratify="even")
    >>> len(drawn.test), sum(e.labels["even"] for e in drawn.test)
    (6, 3)
    """
    own = {"val": val, "test": test}
    pools = {name: pool for name, pool in own.items() if pool is not None}
    _check_disjoint({"the examples": examples, **{f"the {name} examples": pool for name, pool in pools.items()}})
    rest = [name for name in NAMES if name not in pools]
    sets = _draw(examples, {name: getattr(sizes, name) for name in rest}, seed, stratify)
    for name, pool in pools.items():
        sets |= _draw(pool, {name: getattr(sizes, name)}, seed, stratify)
    return Splits(**sets)


def apportion(size: int, counts: Sequence[int]) -> list[int]:
    """`size` seats in proportion to `counts` by largest remainder, ties to the earlier; never above a count.

    >>> apportion(50, [50, 50, 50]), apportion(3, [1, 5])
    ([17, 17, 16], [1, 2])
    """
    total = sum(counts)
    if not 0 <= size <= total:
        raise ValueError(f"cannot take {size} of {total}.")
    if total == 0:
        return [0] * len(counts)
    seats = [size * count // total for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda i: size * counts[i] % total, reverse=True)
    for i in by_remainder[: size - sum(seats)]:
        seats[i] += 1
    return seats


def row_by_id(examples: Sequence[Example], where: str) -> dict[str, int]:
    """Id -> row number, counted from 1.

    Raises:
        ValueError: two rows have one id. `where` is what the error calls the examples.
    """
    rows: dict[str, int] = {}
    for row, example in enumerate(examples, 1):
        first = rows.setdefault(example.id, row)
        if first != row:
            raise ValueError(f'rows {first} and {row} of {where} have the same id "{_name(example.id)}". {_UNIQUE}')
    return rows


def _draw(
    pool: Sequence[Example], wanted: Mapping[str, int], seed: int, stratify: str | None
) -> dict[str, tuple[Example, ...]]:
    """Set name -> as many examples as wanted, each taken from what the earlier sets left."""
    _check_enough(len(pool), wanted)
    strata = _strata(sorted(pool, key=lambda e: _order(seed, e)), stratify)
    sets: dict[str, tuple[Example, ...]] = {}
    for name, size in wanted.items():
        taken: list[Example] = []
        for stratum, count in zip(strata, apportion(size, [len(s) for s in strata]), strict=True):
            taken += stratum[:count]
            del stratum[:count]
        # By hash again, so that a prefix of the set is mixed too: 15 of 50 for a smoke run are not all of one label.
        sets[name] = tuple(sorted(taken, key=lambda e: _order(seed, e)))
    return sets


def _strata(ordered: Sequence[Example], stratify: str | None) -> list[list[Example]]:
    """The examples grouped by the value of a label, groups in the order of their values' text."""
    groups: dict[str, list[Example]] = {}
    for example in ordered:
        if stratify is not None and stratify not in example.labels:
            raise ValueError(
                f'stratify="{stratify}" is no label of example "{example.id}"; '
                f"its labels are {', '.join(example.labels) or 'none'}. Name one of these, or set stratify to null."
            )
        groups.setdefault("" if stratify is None else str(example.labels[stratify]), []).append(example)
    return [groups[value] for value in sorted(groups)]


def _order(seed: int, example: Example) -> str:
    return hashlib.sha256(f"{seed}|{example.id}".encode()).hexdigest()


def _check_enough(have: int, wanted: Mapping[str, int]) -> None:
    asked = sum(wanted.values())
    if asked > have:
        terms = {name: size for name, size in wanted.items() if size}
        said = " + ".join(f"{name} {size}" for name, size in terms.items())
        total = f" = {asked}" if len(terms) > 1 else ""
        lower = " or ".join(f"sizes.{name}" for name in terms)
        raise ValueError(
            f"too few examples: {have} exist, {said}{total} are asked. Lower {lower} by {asked - have}"
            f"{' in all' if len(terms) > 1 else ''}."
        )


_UNIQUE = (
    "If they are one row given twice, remove one; if not, give each its own id "
    "(or leave id_field out: ids are then made from the contents)."
)


def _check_disjoint(pools: Mapping[str, Sequence[Example]]) -> None:
    """Also looks at the examples that will not be drawn: a leak should not wait for an unlucky seed."""
    home: dict[str, tuple[str, int]] = {}
    for name, pool in pools.items():
        for id_, row in row_by_id(pool, name).items():
            other, other_row = home.setdefault(id_, (name, row))
            if other != name:
                raise ValueError(
                    f'example "{_name(id_)}" is both row {other_row} of {other} and row {row} of {name}. {_UNIQUE}'
                )


def _name(id_: str) -> str:
    """An id as a message shows it: ids of data may be long, or of several lines."""
    return shown(id_, by=str, limit=60)
