"""Claims about budgets: kept to the call, looked at between waves, and free for what was paid before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from cotune.programs import (
    Budget,
    BudgetedLM,
    BudgetSpentError,
    Completion,
    Request,
    Runner,
    Sampling,
    Usage,
)
from fakes import FakeLM, Loop, doubles, doubling, runner


def asking(*texts: object) -> list[Request]:
    return [Request([{"role": "user", "content": str(text)}]) for text in texts]


def echo(request: Request) -> str:
    return str(request.messages[-1]["content"])


class StoringLM(FakeLM):
    """Knows what it has answered, and is paid a cent for each new answer; it fails at a text "down"."""

    def __init__(self) -> None:
        super().__init__(echo)
        self.usage, self.answered = Usage(), dict[str, Completion]()

    def known(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion | None]:
        return [self.answered.get(echo(request)) for request in requests]

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        for request in requests:
            if echo(request) == "down":
                raise ConnectionError("down")
            (self.answered[echo(request)],) = super().complete([request], sampling)
            self.usage += Usage(calls=1, tokens_in=10, dollars=0.01)
        return [self.answered[echo(request)] for request in requests]


def test_calls_are_never_exceeded_and_those_that_it_lasts_for_are_made() -> None:
    fake = FakeLM(echo)
    lm = BudgetedLM(fake, Budget(lm_calls=5))
    lm.complete(asking(1, 2, 3), Sampling())
    with pytest.raises(BudgetSpentError, match=r"budget is spent: lm_calls 5 \(so far 5 calls, .*set a larger budget"):
        lm.complete(asking(4, 5, 6, 7), Sampling())
    assert [echo(request) for request in fake.requests] == ["1", "2", "3", "4", "5"]


def test_a_budget_that_is_just_enough_stops_nothing() -> None:
    lm = BudgetedLM(FakeLM(echo), Budget(lm_calls=3))
    assert [one.text for one in lm.complete(asking(1, 2, 3), Sampling())] == ["1", "2", "3"]
    assert lm.complete([], Sampling()) == []


def test_what_is_known_is_free_when_nothing_is_left() -> None:
    storing = StoringLM()
    storing.complete(asking(1, 2), Sampling())
    lm = BudgetedLM(storing, Budget(lm_calls=1))
    assert [one.text for one in lm.complete(asking(1, 3, 2), Sampling())] == ["1", "3", "2"]
    assert [one.text for one in lm.complete(asking(2, 1, 3), Sampling())] == ["2", "1", "3"]
    assert lm.spent.calls == 1


@pytest.mark.parametrize(("bound", "calls"), [({"tokens": 700}, 96), ({"dollars": 0.33}, 64), ({"dollars": 0.32}, 32)])
def test_tokens_and_dollars_are_looked_at_between_waves(bound: Any, calls: int) -> None:
    storing = StoringLM()
    with pytest.raises(BudgetSpentError, match=f"{next(iter(bound))} {next(iter(bound.values()))}"):
        BudgetedLM(storing, Budget(**bound)).complete(asking(*range(100)), Sampling())
    assert storing.usage.calls == calls


def test_minutes_are_counted_on_through_a_stop() -> None:
    now = iter([0.0, 30.0, 70.0, 70.0])
    lm = BudgetedLM(FakeLM(echo), Budget(minutes=2), minutes=1, clock=lambda: next(now))
    lm.complete(asking(1), Sampling())
    with pytest.raises(BudgetSpentError, match=r"minutes 2 .*2\.2 minutes"):
        lm.complete(asking(2), Sampling())


def test_a_larger_budget_goes_on_from_what_was_spent() -> None:
    spent = BudgetedLM(FakeLM(echo), Budget(lm_calls=2))
    with pytest.raises(BudgetSpentError):
        spent.complete(asking(1, 2, 3), Sampling())
    lm = BudgetedLM(FakeLM(echo), Budget(lm_calls=3), spent=spent.spent)
    lm.complete(asking(3), Sampling())
    with pytest.raises(BudgetSpentError):
        lm.complete(asking(4), Sampling())


def test_what_was_answered_before_a_failure_is_charged() -> None:
    storing = StoringLM()
    lm = BudgetedLM(storing, Budget(lm_calls=10))
    with pytest.raises(ConnectionError):
        lm.complete(asking(1, 2, "down"), Sampling())
    assert lm.spent.calls == 2


def test_an_lm_without_a_usage_is_charged_by_its_ids() -> None:
    lm = BudgetedLM(FakeLM(echo), Budget())
    lm.complete(asking("ab"), Sampling())
    assert (lm.spent.calls, lm.spent.tokens_in, lm.spent.tokens_out) == (1, len("user\nab"), 3)


@pytest.fixture
def counted() -> tuple[BudgetedLM, Runner]:
    lm = BudgetedLM(FakeLM(doubling), Budget(lm_calls=5))
    return lm, runner(lm, Loop(times=2))


def test_a_spent_budget_ends_a_run_and_is_no_rollouts_fault(counted: tuple[BudgetedLM, Runner]) -> None:
    lm, run = counted
    prompts = run.program.initial_prompts()
    run.run(doubles(1, 2), prompts)
    with pytest.raises(BudgetSpentError):
        run.run(doubles(3), prompts)
    assert lm.spent.calls == 5


def test_repairs_are_asked_and_charged_through_the_budget() -> None:
    fake = FakeLM(lambda request: Completion("6" if "cannot be read" in echo(request) else ""))
    lm = BudgetedLM(fake, Budget(lm_calls=2))
    (done,) = runner(lm, Loop(times=1)).run(doubles(3), Loop().initial_prompts())
    assert (done.score, lm.spent.calls) == (1, 2)


def test_a_bound_below_0_is_named() -> None:
    with pytest.raises(ValueError, match=r"budget\.dollars -1"):
        Budget(dollars=-1)
