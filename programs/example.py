"""Examples: what a program is asked, and the labels of its final answer."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from cotune.errors import WrongTypeError


@dataclass(frozen=True)
class Example:
    """One row of data.

    Attributes:
        id: stable name of the row; splits, seeds and diagnosis go by it.
        inputs: keyword arguments of `Program.run`.
        labels: what the metric compares the final prediction with. Nothing here is about intermediate stages.
    """

    id: str
    inputs: Mapping[str, Any]
    labels: Mapping[str, Any]

    def __new__(cls, *args: Any, **named: Any) -> Example:
        unknown = [name for name in named if name not in ("id", "inputs", "labels")]
        if unknown:
            raise WrongTypeError(
                f'Example has the arguments inputs and labels, not "{unknown[0]}". Write '
                f'Example.of({{"{unknown[0]}": ...}}, {{"answer": ...}}): the inputs first, then the labels.'
            )
        return super().__new__(cls)

    if not TYPE_CHECKING:  # which is to go on finding such slips itself

        def __getattr__(self, name: str) -> NoReturn:
            holding = [part for part in ("inputs", "labels") if name in vars(self).get(part, ())]
            hint = f'; write example.{holding[0]}["{name}"]' if holding else ""
            raise AttributeError(f'an Example has id, inputs and labels, and no attribute "{name}"{hint}')

    @classmethod
    def of(cls, inputs: Mapping[str, Any], labels: Mapping[str, Any], *, id: str = "") -> Example:
        """An example whose id, when none is given, is a hash of its content.

        >>> Example.of({"question": "1+1"}, {"answer": "2"}).id
        '823ad695d12b'
        """
        return cls(str(id) or content_id(inputs, labels), dict(inputs), dict(labels))


def content_id(*parts: Any) -> str:
    """Twelve hex digits of the SHA-256 of JSON-like parts, the same in every process; what JSON has not is its text."""
    return hashlib.sha256(_json(parts).encode()).hexdigest()[:12]


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, default=_stable)


def _stable(value: Any) -> Any:
    """What stands in an id for a value that JSON has not."""
    # The order of a set follows the hashes of its items, which differ between processes unless they are numbers.
    if isinstance(value, (set, frozenset)) and len(value) > 1 and not all(isinstance(n, (int, float)) for n in value):
        return sorted(map(_json, value))
    return re.sub(r" at 0x[0-9a-fA-F]+(?=>)", "", str(value))  # an address is another one in the next process
