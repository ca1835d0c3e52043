"""The state of a program: each run has its own."""

from __future__ import annotations

import copy
from collections import deque
from contextlib import suppress
from typing import Any

from cotune.programs.program import Program

_CONTAINERS = (list, deque, dict, set, bytearray)


def own_copy(program: Program) -> Program:
    """The program with lists, dicts and sets of its own: runs advance side by side, and may keep state on `self`."""
    own, known = copy.copy(program), dict[int, Any]()  # id -> copy: what stands twice, or in itself, does so in it
    for name, value in vars(program).items():
        if isinstance(value, (tuple, *_CONTAINERS)):
            with suppress(Exception):  # what cannot be copied is shared, as other objects are
                vars(own)[name] = _own_value(value, known)
    return own


def _own_value(value: Any, known: dict[int, Any]) -> Any:
    """A copy; but what can be called, as retrievers can, is shared: each copy would build its index anew."""
    if id(value) in known:
        return known[id(value)]
    if type(value) is tuple:
        return tuple(_own_value(item, known) for item in value)
    if not isinstance(value, _CONTAINERS):
        with suppress(Exception):
            return value if callable(value) else copy.deepcopy(value, known)
        return value
    own = known[id(value)] = copy.copy(value)
    if isinstance(own, (list, deque, dict)):
        for at, item in own.items() if isinstance(own, dict) else enumerate(own):
            own[at] = _own_value(item, known)
    return own


def class_state(program: Program) -> dict[str, int]:
    """Name -> size of the lists, dicts and sets of a program's class, which all its runs share."""
    found: dict[str, int] = {}
    for cls in reversed(type(program).__mro__):
        values = ((name, value) for name, value in vars(cls).items() if not name.startswith("__"))
        found |= {name: len(value) for name, value in values if isinstance(value, (list, dict, set, bytearray))}
    return {name: size for name, size in found.items() if name not in vars(program)}
