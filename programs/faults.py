"""Faults: what the user's own parts got wrong in rollouts, counted by kind and shown with one example each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cotune.errors import CotuneError
from cotune.programs.rollout import Kind, Rollout

KINDS: tuple[Kind, ...] = ("program", "retriever", "metric")
"""Whose the faults are. Failures of format and type are none: there it is the LM that wrote what cannot be read, or
what is no value of its field's type."""


@dataclass(frozen=True)
class Fault:
    """How often one of the user's parts failed, and how it did so first.

    Attributes:
        count: rollouts; an example that is run again counts again.
        example: id of the first example.
        message: what was said there, in one line.
    """

    count: int
    example: str
    message: str

    def __str__(self) -> str:
        return f"{self.count} time{'s' * (self.count != 1)}, first on example {self.example}: {self.message}"


Faults = Mapping[str, Fault]
"""Kind -> fault, for the kinds that occurred."""


class FaultyProgramError(CotuneError):
    """The user's program, retriever or metric failed on so many examples that scores would mean nothing."""


def faults_of(done: Iterable[Rollout]) -> dict[str, Fault]:
    """The faults among rollouts, by kind; format failures are not among them."""
    found: dict[str, Fault] = {}
    for rollout in done:
        if rollout.error is not None and rollout.error.kind in KINDS:
            one = Fault(1, rollout.example.id, rollout.error.message)
            found = merged(found, {str(rollout.error.kind): one})
    return found


def merged(*parts: Faults) -> dict[str, Fault]:
    """Faults of several passes together: counts are added, the first example stays.

    >>> merged({"metric": Fault(1, "a", "it returned nan")}, {"metric": Fault(2, "b", "it returned 7")})
    {'metric': Fault(count=3, example='a', message='it returned nan')}
    """
    found: dict[str, Fault] = {}
    for part in parts:
        for kind, fault in part.items():
            first = found.get(kind)
            found[kind] = fault if first is None else replace(first, count=first.count + fault.count)
    return found


def faults_to_dict(faults: Faults) -> dict[str, dict[str, Any]]:
    """Plain types, for JSON and checkpoints."""
    return {kind: asdict(fault) for kind, fault in faults.items()}


def faults_from_dict(data: Mapping[str, Mapping[str, Any]]) -> dict[str, Fault]:
    """Faults by kind, from plain types as JSON has them."""
    return {kind: Fault(**fault) for kind, fault in data.items()}


def check_errors(done: Sequence[Rollout], *, max_error_rate: float) -> None:
    """Stops what would be scored by broken parts.

    Raises:
        FaultyProgramError: the user's code failed on more than `max_error_rate` of the rollouts. The message shows one
            example of each kind.
    """
    found = faults_of(done)
    total = sum(fault.count for fault in found.values())
    if total > max_error_rate * len(done):
        failed = ", ".join(
            f"the {kind} failed on {fault.count} of {len(done)} examples" for kind, fault in found.items()
        )
        firsts = ". ".join(
            f"The {kind}'s first is example {fault.example}: {fault.message}" for kind, fault in found.items()
        )
        raise FaultyProgramError(
            f"{failed}, more than max_error_rate {max_error_rate:g} allows. {firsts}. "
            "Fix the code, or raise model.max_error_rate: such examples then score 0 and the run continues."
        )


def quoted(value: Any, *, by: Callable[[Any], str] = repr, limit: int = 300) -> str:
    """A value of the user's code in one line that any log can hold: cut, without memory addresses.

    >>> quoted("two\\nlines"), quoted("x" * 9, limit=5)
    ("'two\\\\nlines'", "'xxx…")
    """
    try:
        text = by(value)
    except Exception as error:  # its own __repr__ is the user's code too
        text = f"<{type(value).__name__}, which cannot be shown: {type(error).__name__}>"
    text = " ".join(text.encode(errors="backslashreplace").decode().split())
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", text)  # addresses differ between runs
    return text if len(text) <= limit else text[: limit - 1] + "…"


def raised(error: BaseException) -> str:
    """An exception of the user's code, as `shown` shows it."""
    return f"{type(error).__name__}: {quoted(error, by=str)}"
