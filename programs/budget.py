"""Budgets: what a run spends on its LMs, by role, and the bounds that it keeps to the call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from cotune.errors import BadValueError
from cotune.programs.lm import LM, Completion, LMUnavailableError, Request, Sampling
from cotune.programs.usage import Usage

_WAVE = 32
"""Requests between two looks at a bound that is known only afterwards: tokens, dollars and minutes."""


class BudgetSpentError(LMUnavailableError):
    """A bound is met: the run ends in order, and a larger one continues it.

    Attributes:
        bound: that is met, e.g. "budget.lm_calls 100" or "max_calls 50 of the teacher".
    """

    exit_code = 4

    def __init__(self, bound: str, spent: Usage, minutes: float) -> None:
        self.bound = bound
        option = bound.split()[0]
        super().__init__(
            f"the budget is spent: {bound} (so far {spent}, {minutes:.1f} minutes). Answers so far are kept; set a "
            f"larger {option} to resume."
        )


class UnknownPriceError(LMUnavailableError):
    """Dollars are bounded, and what the LM's answers cost is not known."""

    def __init__(self, role: str, lm: LM, dollars: float) -> None:
        super().__init__(
            f"budget.dollars {dollars:g} cannot be kept: what answers of the {role}'s {lm!r} cost is not known. Give "
            "it prices, such as {name of the model: [0.25, 2.0]} in dollars for a million tokens read and written, or "
            "bound budget.lm_calls or budget.tokens. Answers so far are kept; the same command with either resumes."
        )


class RoleSpentError(BudgetSpentError):
    """One role's LM has made the calls that it may make; others may still be asked."""


@dataclass(frozen=True)
class Budget:
    """What may be spent; None leaves a thing unbounded.

    Attributes:
        lm_calls: completions that are paid for, of all LMs; those from a store are free. Never exceeded.
        tokens: read and written. Looked at between waves of 32 requests, so the last wave may exceed it.
        dollars: likewise. An LM whose answers have no known price ends the run after a wave.
        minutes: likewise, of wall time, also between two steps of training.
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

    @property
    def only_calls(self) -> bool:
        """Whether nothing is bounded that is known only afterwards."""
        return all(bound is None for name, bound in self._bounds() if name != "lm_calls")

    def __str__(self) -> str:
        """
        >>> str(Budget(lm_calls=500, dollars=2.5))
        'lm_calls 500, dollars 2.5'
        """
        return ", ".join(f"{name} {bound}" for name, bound in self._bounds() if bound is not None)

    def _bounds(self) -> list[tuple[str, float | None]]:
        return [(name, getattr(self, name)) for name in ("lm_calls", "tokens", "dollars", "minutes")]


class Ledger:
    """What a run's LMs cost, by role, and its budget.

    Args:
        budget: of all roles together.
        keep: called with `state()` whenever something was paid for, and while minutes are bounded once in each, so that
            it outlives the process.
        clock: seconds.

    Attributes:
        asked: role -> who it is.
        roles: role -> what it has cost so far.
        between: called between answers; what it raises stops there, and what was answered is kept.
    """

    def __init__(
        self,
        budget: Budget = Budget(),
        *,
        keep: Callable[[dict[str, Any]], None] = lambda state: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget, self._keep, self._clock, self._began = budget, keep, clock, clock()
        self._kept = 0.0  # minutes, when the state was last kept
        self.asked: dict[str, str] = {}
        self.roles: dict[str, Usage] = {}
        self.between: Callable[[], None] = lambda: None

    @property
    def spent(self) -> Usage:
        """By all roles."""
        return sum(self.roles.values(), Usage())

    @property
    def minutes(self) -> float:
        """Wall time since the run began, the time before a stop included and that between not."""
        return (self._clock() - self._began) / 60

    def met(self) -> BudgetSpentError | None:
        """The bound of the budget that is met, if one is."""
        bound = self.budget.met(self.spent, self.minutes)
        return BudgetSpentError(f"budget.{bound}", self.spent, self.minutes) if bound else None

    def late(self) -> BudgetSpentError | None:
        """The bound on minutes, if it is met. Asked between units of work, it also keeps the time that they took."""
        bound = self.budget.minutes
        if bound is None:
            return None
        if self.minutes - self._kept >= 1 or self._kept < bound <= self.minutes:
            self._keep_state()
        if self.minutes < bound:
            return None
        return BudgetSpentError(f"budget.minutes {self.budget.minutes:g}", self.spent, self.minutes)

    def charge(self, role: str, usage: Usage) -> None:
        self.roles[role] = self.roles.get(role, Usage()) + usage
        if usage != Usage():
            self._keep_state()

    def counted(self) -> dict[str, float]:
        """What was spent so far, by role and kind; see `Counter`."""
        return {f"{role}|{kind}": n for role, usage in self.roles.items() for kind, n in asdict(usage).items()}

    def count(self, more: Mapping[str, float]) -> None:
        spent: dict[str, dict[str, Any]] = {}
        for name, n in more.items():
            role, kind = name.split("|")
            spent.setdefault(role, {})[kind] = n
        for role, kinds in spent.items():
            self.charge(role, Usage(**kinds))

    def check(self, role: str, max_calls: int | None) -> None:
        """Raises BudgetSpentError if nothing is left for a role."""
        if error := self.met():
            raise error
        spent = self.roles.get(role, Usage())
        if max_calls is not None and spent.calls >= max_calls:
            raise RoleSpentError(f"max_calls {max_calls} of the {role}", spent, self.minutes)

    def wave(self, role: str, max_calls: int | None) -> int | None:
        """Requests that may be asked before the next look at the bounds; None for any number."""
        left = None if max_calls is None else max_calls - self.roles.get(role, Usage()).calls
        sizes = [left, self.budget.calls_left(self.spent), None if self.budget.only_calls else _WAVE]
        return min((size for size in sizes if size is not None), default=None)

    def _keep_state(self) -> None:
        self._kept = self.minutes
        self._keep(self.state())

    def state(self) -> dict[str, Any]:
        """Plain types."""
        return {"minutes": self.minutes, "roles": {role: asdict(usage) for role, usage in self.roles.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from what an earlier process of the run had spent."""
        self._began, self._kept = self._clock() - 60 * state["minutes"], state["minutes"]
        self.roles = {role: Usage(**usage) for role, usage in state["roles"].items()}


class BudgetedLM:
    """An LM whose calls are charged to a ledger, and that stops at its bounds.

    To have what was answered free of charge, put the store outside: `StoredLM(BudgetedLM(lm, ledger), ...)`.

    Args:
        lm: any LM. One that has a `usage` is charged by what that grows by; another by its requests and ids. One whose
            answers can cost an unknown amount counts these as `unpriced`.
        role: what it is for, as costs are said: "program", "teacher", "proposer", "judge".
        max_calls: of this role; null for as many as the budget allows.
    """

    def __init__(self, lm: LM, ledger: Ledger, *, role: str = "program", max_calls: int | None = None) -> None:
        if max_calls is not None and max_calls < 0:
            raise BadValueError(f"max_calls {max_calls} of the {role} is below 0; leave it out for no bound.")
        self.lm, self.ledger, self.role, self.max_calls = lm, ledger, role, max_calls
        ledger.asked[role] = repr(lm) + (f", {max_calls} calls at most" if max_calls is not None else "")

    @property
    def identity(self) -> dict[str, Any]:
        """The LM's, if it has one."""
        return dict(getattr(self.lm, "identity", {}))

    @property
    def codec(self) -> Any:
        """The LM's; None of one without a tokenizer in this process."""
        return getattr(self.lm, "codec", None)

    @property
    def usage(self) -> Usage:
        """What the role has cost."""
        return self.ledger.roles.get(self.role, Usage())

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """The LM's completions.

        Raises:
            UnknownPriceError: dollars are bounded, and the LM does not know what its answers cost.
            BudgetSpentError: the budget does not last for all requests. Those that it lasts for have been asked, so
                that a store has them for a run with a larger budget.
        """
        found: dict[int, Completion] = {}
        for come in self.answers(requests, sampling):
            found |= come
        return [found[at] for at in range(len(requests))]

    def answers(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[dict[int, Completion]]:
        """The same by their places, as they come."""
        start = 0
        while start < len(requests):
            self.ledger.check(self.role, self.max_calls)
            size = self.ledger.wave(self.role, self.max_calls)
            wave = requests[start:] if size is None else requests[start : start + size]
            for come in self._charged(wave, sampling):
                yield {start + at: one for at, one in come.items()}
                self.ledger.between()
            self._check_price()
            start += len(wave)

    def load(self) -> None:
        """Loads the LM, if it is one that is loaded."""
        getattr(self.lm, "load", lambda: None)()

    def close(self) -> None:
        """Closes what the LM holds open."""
        getattr(self.lm, "close", lambda: None)()

    def _check_price(self) -> None:
        dollars, unpriced = self.ledger.budget.dollars, getattr(self.lm, "unpriced", None)
        if dollars is not None and unpriced:
            raise UnknownPriceError(self.role, self.lm, dollars)

    def _charged(self, wave: Sequence[Request], sampling: Sampling) -> Iterator[Mapping[int, Completion]]:
        """A wave's answers, each charged before it is given."""
        charged = _usage(self.lm)
        try:
            for come in answers_of(self.lm, wave, sampling):
                now = _usage(self.lm)
                counted = sum(map(_counted, come.values()), Usage())
                self.ledger.charge(self.role, counted if charged is None or now is None else now - charged)
                charged = now
                yield come
        finally:  # what an endpoint answered before it failed was paid as well
            if charged is not None and (now := _usage(self.lm)) is not None:
                self.ledger.charge(self.role, now - charged)


def answers_of(lm: LM, requests: Sequence[Request], sampling: Sampling) -> Iterable[Mapping[int, Completion]]:
    """Completions by their places as they come, of an LM with `answers`; of another, all at once."""
    answers = getattr(lm, "answers", None)
    if answers is None:
        return [dict(enumerate(lm.complete(requests, sampling)))]
    coming: Iterable[Mapping[int, Completion]] = answers(requests, sampling)
    return coming


def complete_within(
    lm: LM, requests: Sequence[Request], sampling: Sampling, met: Callable[[RoleSpentError], None] = lambda error: None
) -> list[Completion]:
    """A completion for each request; "refused" for those that the `max_calls` of the LM's role do not last for.

    What is answered before they are met is kept, and of the rest what a store has. `met` is told if they are.
    """
    found: dict[int, Completion] = {}
    try:
        for come in answers_of(lm, requests, sampling) if requests else ():
            found |= come
    except RoleSpentError as error:
        met(error)
        for at in sorted(set(range(len(requests))) - set(found)):
            with suppress(RoleSpentError):  # nothing more is paid for: it is raised before the LM is asked
                (found[at],) = lm.complete([requests[at]], sampling)
    return [found.get(at, Completion("", finished="refused")) for at in range(len(requests))]


def _usage(lm: LM) -> Usage | None:
    found = getattr(lm, "paid", None) or getattr(lm, "usage", None)
    return found if isinstance(found, Usage) else None


def _counted(one: Completion) -> Usage:
    return Usage(calls=1, tokens_in=len(one.prompt_ids), tokens_out=len(one.completion_ids))
