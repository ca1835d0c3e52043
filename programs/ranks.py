"""Ranks: the processes of a run, and what they must say to one another. One process is the plain case."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast

from cotune.errors import CotuneError

_T = TypeVar("_T")


class RanksDifferError(CotuneError):
    """The processes of a run were about to do different things."""


class RankLostError(CotuneError, RuntimeError):
    """Another process of the run has ended, and this one cannot go on without it."""


class RankFailedError(CotuneError, RuntimeError):
    """Another process of the run failed with an error that cannot be raised here as it was."""


class Counter(Protocol):
    """What counts in each process, and is to be the same in all of them: calls, tokens, dollars."""

    def counted(self) -> dict[str, float]:
        """The counts so far, by name."""
        ...

    def count(self, more: Mapping[str, float]) -> None:
        """Adds what another process has counted."""
        ...


class Ranks:
    """The processes of a run. All of them call the same methods in the same order, whatever happened in one of them.

    This is the only process there is; subclasses know others, and override `gather`.

    Attributes:
        count: how many there are.
        index: which of them this is, from 0. The first writes the run's files.
        counters: what `share_out` keeps equal in all.
    """

    count = 1
    index = 0
    counters: Sequence[Counter] = ()

    @property
    def first(self) -> bool:
        return self.index == 0

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, in their order; what JSON holds, sequences as lists."""
        return [value]

    def gather_tensors(self, mine: Any) -> list[Any]:
        """A tensor of each process, in their order, on its device; all of one shape."""
        return [mine]

    def share(self, size: int, rank: int | None = None) -> range:
        """The places, of so many, that are this process's to do, or another's; a process may have none.

        >>> Ranks().share(3)
        range(0, 3)
        """
        rank = self.index if rank is None else rank
        return range(rank * size // self.count, (rank + 1) * size // self.count)

    def agree(self, what: str, text: str) -> None:
        """Makes sure that all processes are about to do the same.

        Args:
            what: a name for it, for the message.
            text: all that it follows from.

        Raises:
            RanksDifferError: another process gives another text; raised in all.
        """
        if self.count == 1:
            return
        given = self.gather((what, hashlib.sha256(text.encode(errors="replace")).hexdigest()))
        if other := next((rank for rank, one in enumerate(given) if one != given[0]), None):
            raise RanksDifferError(
                f"nothing was run, because processes differ: process {other} is about to {given[other][0]}, process 0 "
                f"to {given[0][0]}, not with the same content. Something in the program, the search or the data "
                "differs between processes: the order of a set or of files, the clock, an unseeded random draw. Sort "
                "or seed it, and start the same command again; PYTHONHASHSEED=0 fixes the order of sets."
            )

    def together(self, call: Callable[[], _T]) -> list[_T]:
        """What `call` gives in each process, as `gather` has it.

        What it raises in one process is raised in all, once all have come to the end.
        """
        if self.count == 1:
            return [call()]
        error: BaseException | None = None
        given: tuple[str, Any]
        try:
            given = ("done", call())
        except BaseException as raised:  # whatever it is, the others wait for this process
            error, given = raised, ("raised", _sent(raised))
        found = self.gather(given)
        for rank, (how, what) in enumerate(found):
            if how == "raised":
                agreed = error if rank == self.index and error is not None else _received(what, rank)
                agreed.in_all_ranks = True  # type: ignore[attr-defined]  # so that one of them says it
                raise agreed
        return [what for _, what in found]

    def share_out(self, call: Callable[[], _T], *more: Any) -> list[_T]:
        """As `together`; and what the counters, and those among `more`, counted meanwhile is counted in all."""
        counters = [*self.counters, *(one for one in more if hasattr(one, "counted") and one not in self.counters)]
        before = [one.counted() for one in counters]
        found = self.together(lambda: (call(), [_since(o.counted(), b) for o, b in zip(counters, before, strict=True)]))
        for _, counts in (one for rank, one in enumerate(found) if rank != self.index):
            for counter, counted in zip(counters, counts, strict=True):
                counter.count(counted)
        return [done for done, _ in found]

    def once(self, call: Callable[[], _T]) -> _T:
        """What `call` gives in the first process; the others do not call it."""
        found: list[Any] = self.together(lambda: call() if self.first else None)
        return cast(_T, found[0])


def _since(now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0) for name, value in now.items()}


def _sent(error: BaseException) -> dict[str, Any]:
    """An error as text, and with its type's name, arguments and attributes where JSON can hold them."""
    kind, text = type(error), f"{type(error).__name__}: {error}"
    whole = {"module": kind.__module__, "name": kind.__qualname__, "args": list(error.args), "vars": vars(error)}
    try:
        return {"text": text, **json.loads(json.dumps(whole))}
    except (TypeError, ValueError):  # what it holds on to is the user's
        return {"text": text}


def _received(sent: Mapping[str, Any], rank: int) -> BaseException:
    kind = getattr(sys.modules.get(sent.get("module", "")), sent.get("name", ""), None)
    if not isinstance(kind, type) or not issubclass(kind, BaseException):
        return RankFailedError(f"process {rank} failed: {sent['text']}")
    error = kind.__new__(kind, *sent["args"])  # not made anew: its arguments are what it made of others
    error.args = tuple(sent["args"])
    vars(error).update(sent["vars"])
    return error
