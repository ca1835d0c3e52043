"""Budgets: bounds on what a run may spend on an LM, kept to the call."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cotune.errors import BadValueError
from cotune.programs.lm import LM, Completion, LMUnavailableError, Request, Sampling
from cotune.programs.usage import Usage

_WAVE = 32
"""Requests between two looks at a bound that is known only afterwards: tokens, dollars and minutes."""


class BudgetSpentError(LMUnavailableError):
    """A bound of the budget is met: the run ends in order, and a larger budget continues it."""


@dataclass(frozen=True)
class Budget:
    """What may be spent; None leaves a thing unbounded.

    Attributes:
        lm_calls: completions that are paid for; those from a store are free. Never exceeded.
        tokens: read and written. Looked at between waves of 32 requests, so the last wave may exceed it.
        dollars: likewise; needs an LM that knows its prices.
        minutes: likewise, of wall time.
    """

    lm_calls: int | None = None
    tokens: int | None = None
    dollars: float | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        for name, bound in self._bounds():
            if bound is not None and not bound >= 0:
                raise BadValueError(f"budget.{name} {bound} is below 0; leave it out for no bound.")

    def calls_left(self, spent: Usage) -> int | None:
        """Calls that may still be paid for; None for any number.

        >>> Budget(lm_calls=10).calls_left(Usage(calls=7))
        3
        """
        return None if self.lm_calls is None else max(0, self.lm_calls - spent.calls)

    def met(self, spent: Usage, minutes: float) -> str:
        """The first bound that is met, as "lm_calls 100"; "" while there is something left of everything.

        >>> Budget(tokens=1000, dollars=2).met(Usage(tokens_in=900, tokens_out=100), minutes=3)
        'tokens 1000'
        """
        so_far = {"lm_calls": spent.calls, "tokens": spent.tokens, "dollars": spent.dollars, "minutes": minutes}
        for name, bound in self._bounds():
            if bound is not None and so_far[name] >= bound:
                return f"{name} {bound:g}" if isinstance(bound, float) else f"{name} {bound}"
        return ""

    def _bounds(self) -> list[tuple[str, float | None]]:
        return [(name, getattr(self, name)) for name in ("lm_calls", "tokens", "dollars", "minutes")]


class BudgetedLM:
    """An LM that counts what it spends and stops at a budget.

    Args:
        lm: any LM. One that has a `usage` is charged by what that grows by; another by its requests and ids. One with
            `known(requests, sampling)` says which completions it has already: they are given even when nothing is left.
        spent, minutes: what the run had spent before it was stopped and resumed.
        clock: seconds.

    Attributes:
        spent: so far.
    """

    def __init__(
        self,
        lm: LM,
        budget: Budget,
        *,
        spent: Usage = Usage(),  # noqa: B008 (frozen)
        minutes: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lm, self.budget, self.spent = lm, budget, spent
        self._clock, self._began = clock, clock() - 60 * minutes

    @property
    def minutes(self) -> float:
        """Wall time since the run began, the time before a stop included and that between not."""
        return (self._clock() - self._began) / 60

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """The LM's completions.

        Raises:
            BudgetSpentError: the budget does not last for all requests. Those that it lasts for have been asked, so
                that a store has them for a run with a larger budget.
        """
        known = getattr(self.lm, "known", None)
        found: list[Completion | None] = list(known(requests, sampling)) if known else [None] * len(requests)
        wanted = [at for at, one in enumerate(found) if one is None]
        while wanted:
            if bound := self.budget.met(self.spent, self.minutes):
                raise BudgetSpentError(self._message(bound))
            wave = wanted[: self._wave()]
            for at, one in zip(wave, self._charged([requests[at] for at in wave], sampling), strict=True):
                found[at] = one
            wanted = wanted[len(wave) :]
        return [one for one in found if one is not None]

    def _wave(self) -> int | None:
        bounded = any(bound is not None for name, bound in self.budget._bounds() if name != "lm_calls")
        sizes = [self.budget.calls_left(self.spent), _WAVE if bounded else None]
        return min((size for size in sizes if size is not None), default=None)

    def _charged(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        before: Usage | None = getattr(self.lm, "usage", None)
        done: list[Completion] = []
        try:
            done = self.lm.complete(requests, sampling)
        finally:  # what an endpoint answered before it failed was paid as well
            after: Usage | None = getattr(self.lm, "usage", None)
            if isinstance(before, Usage) and isinstance(after, Usage):
                self.spent += after - before
            else:
                self.spent += sum(map(_counted, done), Usage())
        return done

    def _message(self, bound: str) -> str:
        return (
            f"the budget is spent: {bound} (so far {self.spent}, {self.minutes:.1f} minutes). What was answered is "
            f"kept; set a larger budget.{bound.split()[0]} to go on from there."
        )


def _counted(one: Completion) -> Usage:
    return Usage(calls=1, tokens_in=len(one.prompt_ids), tokens_out=len(one.completion_ids))
