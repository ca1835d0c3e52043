"""Splits: four disjoint sets of examples, drawn by id, so that the row order of a file has no say in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from cotune.errors import BadValueError
from cotune.programs import Example
from cotune.programs.faults import quoted

NAMES = ("train", "dev", "val", "test")
"""train bootstraps demos and traces, dev scores candidates, val chooses between steps, test is touched once."""

Duplicates = Literal["refuse", "drop", "keep"]
"""What becomes of rows with the inputs of another row: an error, left out, or taken as they are."""


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
                raise BadValueError(f"sizes.{name} is {size!r}; a size is a whole number of examples, 0 or more.")
        if self.train == 0:
            raise BadValueError("sizes.train is 0; demos and traces come from train, so it needs at least 1 example.")


@dataclass(frozen=True)
class Splits:
    """The four sets. An id stands in one of them at most, and there once.

    Attributes:
        notes: what the user should know of how they came about, a line each.
        rest: what was drawn into no set and is no test example, for folds.
        fold_test: test as it is with folds: drawn from all, so that no other set's size counts. None: as `test`.

    Raises:
        ValueError: two sets share an id, or one set has it twice.
    """

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    val: tuple[Example, ...]
    test: tuple[Example, ...]
    notes: tuple[str, ...] = ()
    rest: tuple[Example, ...] = field(default=(), compare=False, repr=False)
    fold_test: tuple[Example, ...] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        home: dict[str, str] = {}
        for name in NAMES:
            for example in getattr(self, name):
                other = home.setdefault(example.id, name)
                if other != name:
                    raise BadValueError(
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
    duplicates: Duplicates = "refuse",
    where: str = "the examples",
) -> Splits:
    """Draws disjoint sets. Which example goes where depends on seed and ids only, not on the order of `examples`.

    Args:
        stratify: a label; each set then has its values in the proportion of what it is drawn from, to within rounding.
        val, test: what the set of that name is drawn from, for data that ships with its own. The others are drawn from
            `examples`.
        duplicates: of examples with equal inputs "drop" takes one: test's before val's before the others', and then
            that of the smallest id.
        where: what messages call `examples`.

    Raises:
        ValueError: an id stands twice, inputs do and that is refused, there are too few examples, or an example lacks
            the `stratify` label.

    >>> rows = [Example.of({"n": n}, {"even": n % 2 == 0}) for n in range(20)]
    >>> drawn = split(rows, Sizes(8, 2, 4, 6), seed=0, stratify="even")
    >>> len(drawn.test), sum(e.labels["even"] for e in drawn.test)
    (6, 3)
    """
    own = {"val": val, "test": test}
    names = {where: "", **{f"the {name} examples": name for name, pool in own.items() if pool is not None}}
    pools, notes = _settled({name: own[part] or () if part else examples for name, part in names.items()}, duplicates)
    rest = [name for name in NAMES if name not in names.values()]
    sets = _draw(pools[where], {name: getattr(sizes, name) for name in rest}, seed, stratify, where)
    for name, part in names.items():
        if part:
            sets |= _draw(pools[name], {part: getattr(sizes, part)}, seed, stratify, name)
    drawn = {example.id for examples in sets.values() for example in examples}
    left = (e for name, part in names.items() if part != "test" for e in pools[name] if e.id not in drawn)
    outside = {"outside": len(pools[where]) - sizes.test, "test": sizes.test}
    fold_test = _draw(pools[where], outside, seed, stratify, where)["test"] if test is None else None
    return Splits(**sets, notes=tuple(notes), rest=tuple(left), fold_test=fold_test)


def rotated(splits: Splits, *, fold: int, folds: int, seed: int) -> Splits:
    """Other train, dev and val sets: of so many parts that all but test is dealt into, also what was drawn into no set,
    one is val and the next one dev. Over all folds each example is in each of them once. Labels are spread evenly.
    Test is `fold_test`, the same in all folds.

    >>> rows = tuple(Example.of({"n": n}, {"even": n % 2 == 0}) for n in range(10))
    >>> folds = [rotated(Splits(rows[:6], rows[6:8], rows[8:], ()), fold=k, folds=5, seed=0) for k in range(5)]
    >>> sorted(e.inputs["n"] for one in folds for e in one.val), [len(one.train) for one in folds]
    ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [6, 6, 6, 6, 6])

    Raises:
        ValueError: fewer than 3 folds, no such fold, or fewer examples than folds.
    """
    test = splits.test if splits.fold_test is None else splits.fold_test
    held_out = {example.id for example in test}
    drawn = (*splits.train, *splits.dev, *splits.val, *splits.test, *splits.rest)
    pool = [example for example in drawn if example.id not in held_out]
    pool.sort(key=lambda e: (str(dict(e.labels)), _order(seed, e)))
    if not 3 <= folds <= len(pool) or not 0 <= fold < folds:
        raise BadValueError(
            f"fold {fold} of {folds} folds, over {len(pool)} examples: folds must be at least 3 (train, dev and val) "
            "and at most the number of examples; fold counts from 0 and must be below folds."
        )
    parts = [tuple(sorted(pool[k::folds], key=lambda e: _order(seed, e))) for k in range(folds)]
    train = [e for k in range(2, folds) for e in parts[(fold + k) % folds]]
    return replace(
        splits,
        train=tuple(sorted(train, key=lambda e: _order(seed, e))),
        dev=parts[(fold + 1) % folds],
        val=parts[fold],
        test=test,
        notes=(*splits.notes, f"fold {fold} of {folds}: val and dev are one part each of all {len(pool)} but test"),
        rest=(),
        fold_test=None,
    )


def leak_notes(splits: Splits) -> list[str]:
    """How many examples of dev, val and test have the inputs of an example that comes before them: a line, or none."""
    counts, seen = {}, {_inputs_key(example) for example in splits.train} - {""}
    for name in NAMES[1:]:
        keys = [_inputs_key(example) for example in getattr(splits, name)]
        counts[name] = sum(key in seen for key in keys)
        seen |= set(keys) - {""}
    leak = [f"{count} of {len(getattr(splits, name))} {name}" for name, count in counts.items() if count]
    if not leak:
        return []
    return [
        f"leakage: {', '.join(leak)} examples have the inputs of an example in an earlier set (train, dev, val, test); "
        "data.duplicates drop leaves such rows out"
    ]


def _inputs_key(example: Example) -> str:
    """What two examples share that ask the same; "" where there are no inputs."""
    return json.dumps(example.inputs, sort_keys=True, default=str) if example.inputs else ""


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
            raise BadValueError(f'rows {first} and {row} of {where} have the same id "{_name(example.id)}". {_UNIQUE}')
    return rows


def _draw(
    pool: Sequence[Example], wanted: Mapping[str, int], seed: int, stratify: str | None, where: str
) -> dict[str, tuple[Example, ...]]:
    """Set name -> as many examples as wanted, each taken from what the earlier sets left."""
    _check_enough(len(pool), wanted, where)
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
            raise BadValueError(
                f'stratify="{stratify}" is no label of example "{example.id}"; '
                f"its labels are {', '.join(example.labels) or 'none'}. Name one of these, or set stratify to null."
            )
        groups.setdefault("" if stratify is None else str(example.labels[stratify]), []).append(example)
    return [groups[value] for value in sorted(groups)]


def _order(seed: int, example: Example) -> str:
    return hashlib.sha256(f"{seed}|{example.id}".encode()).hexdigest()


def _check_enough(have: int, wanted: Mapping[str, int], where: str) -> None:
    asked = sum(wanted.values())
    if asked > have:
        terms = {name: size for name, size in wanted.items() if size}
        message = " + ".join(f"{name} {size}" for name, size in terms.items())
        total = f" = {asked}" if len(terms) > 1 else ""
        lower = " or ".join(f"sizes.{name}" for name in terms)
        raise BadValueError(
            f"too few examples: {have} in {where}, but {message}{total} are needed. Lower {lower} by {asked - have}"
            f"{' in all' if len(terms) > 1 else ''}."
        )


_UNIQUE = (
    "If they are one row given twice, remove one; if not, give each its own id "
    "(or leave id_field out: ids are then made from the contents)."
)


def _settled(
    pools: Mapping[str, Sequence[Example]], duplicates: Duplicates
) -> tuple[dict[str, list[Example]], list[str]]:
    """The pools with ids that stand once, duplicates dealt with, and what to say of them.

    All that could be drawn is looked at, not only what will be: a leak should not wait for an unlucky seed.
    """
    repeats = _repeats(pools)
    if repeats and duplicates == "refuse":
        raise BadValueError(_refused(pools, repeats))
    dropped = {place for place, _ in repeats} if duplicates == "drop" else set()
    kept: dict[str, list[Example]] = {}
    used: dict[str, Example] = {}
    for name, pool in pools.items():
        kept[name] = [_own_id(e, used) for at, e in enumerate(pool) if (name, at) not in dropped]
    _check_disjoint(kept)
    total = sum(map(len, pools.values()))
    one = len(repeats) == 1
    what = f"{'is' if one else 'are'} {'left out' if dropped else 'kept'}"
    message = f"{len(repeats)} of {total} rows {'has' if one else 'have'} the inputs of another"
    message = f"{message} ({_labels_too(pools, repeats)}) and {what}"
    return kept, [message] if repeats else []


_Place = tuple[str, int]
"""Name of a pool, and a place in it."""


def _repeats(pools: Mapping[str, Sequence[Example]]) -> list[tuple[_Place, _Place]]:
    """Each example that has the inputs of another, and that other one: of test before val before the rest, and of the
    smallest id there."""
    groups: dict[str, list[_Place]] = {}
    for name in reversed(list(pools)):  # the rest come first in it
        for at in sorted(range(len(pools[name])), key=lambda i: (pools[name][i].id, i)):
            if key := _inputs_key(pools[name][at]):
                groups.setdefault(key, []).append((name, at))
    return [(place, places[0]) for places in groups.values() for place in places[1:]]


def _refused(pools: Mapping[str, Sequence[Example]], repeats: Sequence[tuple[_Place, _Place]]) -> str:
    """Names the first repeat, as a reader of the file meets it."""
    order = list(pools)
    first = min(repeats, key=lambda pair: sorted((order.index(name), at) for name, at in pair)[::-1])
    (one, row), (other, other_row) = sorted(first, key=lambda place: (order.index(place[0]), place[1]))
    rows = (
        f"rows {row + 1} and {other_row + 1}" if one == other else f"row {row + 1} and row {other_row + 1} of {other}"
    )
    equal = pools[one][row].labels == pools[other][other_row].labels
    how = "are equal" if equal else "have the same inputs and different labels"
    such = f"{len(repeats)} row{'s are' if len(repeats) > 1 else ' is'} such"
    return (
        f"{one}, {rows} {how} ({such}: {_labels_too(pools, repeats)}). A repeated example may be in train and test: "
        "data.duplicates drop takes each once, data.duplicates keep takes all and says how many leak."
    )


def _labels_too(pools: Mapping[str, Sequence[Example]], repeats: Sequence[tuple[_Place, _Place]]) -> str:
    same = sum(pools[a][i].labels == pools[b][j].labels for (a, i), (b, j) in repeats)
    return f"{same} with equal labels, {len(repeats) - same} with others"


def _own_id(example: Example, used: dict[str, Example]) -> Example:
    """The example; with a number behind its id where an equal one has it already."""
    id_, number = example.id, 1
    while id_ in used and used[id_] == replace(example, id=id_):
        number += 1
        id_ = f"{example.id}-{number}"
    made = replace(example, id=id_)
    used.setdefault(id_, made)
    return made


def _check_disjoint(pools: Mapping[str, Sequence[Example]]) -> None:
    home: dict[str, tuple[str, int]] = {}
    for name, pool in pools.items():
        for id_, row in row_by_id(pool, name).items():
            other, other_row = home.setdefault(id_, (name, row))
            if other != name:
                raise BadValueError(
                    f'example "{_name(id_)}" is both row {other_row} of {other} and row {row} of {name}. {_UNIQUE}'
                )


def _name(id_: str) -> str:
    """An id as a message shows it: ids of data may be long, or of several lines."""
    return quoted(id_, by=str, limit=60)
