"""Claims about budgets: kept to the call over all roles and kills, and looked at between waves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cotune.inference import StoredLM
from cotune.lightning_modules.text_lm import metered
from cotune.programs import (
    Budget,
    BudgetedLM,
    BudgetSpentError,
    Completion,
    Ledger,
    Request,
    RoleSpentError,
    Runner,
    Sampling,
    Usage,
)
from cotune.programs.budget import UnknownPriceError
from fakes import FakeLM, Loop, doubles, doubling, runner


def asking(*texts: object) -> list[Request]:
    return [Request([{"role": "user", "content": str(text)}]) for text in texts]


def echo(request: Request) -> str:
    return str(request.messages[-1]["content"])


class PaidLM(FakeLM):
    """Is paid a cent for each answer, gives one after the other, and fails at a text "down"."""

    def __init__(self) -> None:
        super().__init__(echo)
        self.usage = Usage()

    def answers(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[dict[int, Completion]]:
        for at, request in enumerate(requests):
            if echo(request) == "down":
                raise ConnectionError("down")
            self.usage += Usage(calls=1, tokens_in=10, dollars=0.01)
            yield {at: super().complete([request], sampling)[0]}


def bounded(lm: Any, max_calls: int | None = None, **bounds: Any) -> BudgetedLM:
    return BudgetedLM(lm, Ledger(Budget(**bounds)), max_calls=max_calls)


def test_calls_are_never_exceeded_and_those_that_it_lasts_for_are_made() -> None:
    fake = FakeLM(echo)
    lm = bounded(fake, lm_calls=5)
    lm.complete(asking(1, 2, 3), Sampling())
    with pytest.raises(BudgetSpentError, match=r"spent: budget.lm_calls 5 \(so far 5 calls, .*larger budget.lm_calls"):
        lm.complete(asking(4, 5, 6, 7), Sampling())
    assert [echo(request) for request in fake.requests] == ["1", "2", "3", "4", "5"]


def test_a_budget_that_is_just_enough_stops_nothing() -> None:
    lm = bounded(FakeLM(echo), lm_calls=3)
    assert [one.text for one in lm.complete(asking(1, 2, 3), Sampling())] == ["1", "2", "3"]
    assert lm.complete([], Sampling()) == []


def test_roles_share_a_budget_and_have_costs_and_bounds_of_their_own() -> None:
    ledger = Ledger(Budget(lm_calls=5))
    program = BudgetedLM(PaidLM(), ledger)
    teacher = BudgetedLM(PaidLM(), ledger, role="teacher", max_calls=2)
    program.complete(asking(1), Sampling())
    with pytest.raises(RoleSpentError, match="max_calls 2 of the teacher"):
        teacher.complete(asking(1, 2, 3), Sampling())
    assert {role: usage.calls for role, usage in ledger.roles.items()} == {"program": 1, "teacher": 2}
    with pytest.raises(BudgetSpentError, match=r"budget\.lm_calls 5"):
        program.complete(asking(2, 3, 4), Sampling())
    assert ledger.spent.calls == 5


@pytest.mark.parametrize(("bound", "calls"), [({"tokens": 700}, 96), ({"dollars": 0.33}, 64), ({"dollars": 0.32}, 32)])
def test_tokens_and_dollars_are_looked_at_between_waves(bound: Any, calls: int) -> None:
    lm = PaidLM()
    with pytest.raises(BudgetSpentError, match=f"{next(iter(bound))} {next(iter(bound.values()))}"):
        bounded(lm, **bound).complete(asking(*range(100)), Sampling())
    assert lm.usage.calls == calls


def test_a_bound_in_dollars_ends_at_answers_of_unknown_price() -> None:
    lm = PaidLM()
    lm.unpriced = 1  # type: ignore[attr-defined]
    asked = asking(*range(100))
    with pytest.raises(UnknownPriceError, match=r"budget.dollars 5 cannot be kept: .* of the program's .*prices"):
        bounded(lm, dollars=5).complete(asked, Sampling())
    assert lm.usage.calls == 32
    assert len(bounded(lm, lm_calls=100).complete(asked, Sampling())) == 100


def test_what_was_spent_outlives_a_kill_to_the_answer() -> None:
    kept: list[dict[str, Any]] = []
    now = [0.0]
    ledger = Ledger(keep=kept.append, clock=lambda: now[0])
    now[0] = 60.0
    next(iter(BudgetedLM(PaidLM(), ledger).answers(asking(1, 2), Sampling())))  # killed after the first answer
    now[0] = 1000.0
    resumed = Ledger(Budget(lm_calls=2, minutes=2), clock=lambda: now[0])
    resumed.load(kept[-1])
    now[0] = 1060.0
    assert (resumed.spent.calls, resumed.spent.dollars) == (1, 0.01)
    with pytest.raises(BudgetSpentError, match=r"minutes 2 .*2\.0 minutes"):
        BudgetedLM(PaidLM(), resumed).complete(asking(2), Sampling())


def test_max_calls_bound_an_lm_that_comes_with_a_store(tmp_path: Path) -> None:
    lm = PaidLM()
    lm.max_calls = 2  # type: ignore[attr-defined]
    asked, _ = metered(StoredLM(lm, str(tmp_path / "c.sqlite"), {"lm": "paid"}), Ledger(), None, role="teacher")
    with pytest.raises(RoleSpentError, match="max_calls 2 of the teacher"):
        asked.complete(asking(1, 2, 3), Sampling())


def test_time_in_which_nothing_is_paid_counts_in_the_next_start_too() -> None:
    now, kept = [0.0], list[dict[str, Any]]()
    training = Ledger(Budget(minutes=10), keep=kept.append, clock=lambda: now[0])
    for _ in range(3 * 60):
        now[0] += 1.0
        assert training.late() is None  # asked between optimiser steps
    assert [state["minutes"] for state in kept] == [1.0, 2.0, 3.0]
    resumed = Ledger(Budget(minutes=10), keep=kept.append, clock=lambda: now[0])
    resumed.load(kept[-1])
    now[0] += 7 * 60
    assert resumed.late() is not None
    again = Ledger(Budget(minutes=10), clock=lambda: now[0])
    again.load(kept[-1])
    assert again.late() is not None, "the bound that ended the run ends it again"


def test_what_was_answered_before_a_failure_is_charged() -> None:
    lm = bounded(PaidLM(), lm_calls=10)
    with pytest.raises(ConnectionError):
        lm.complete(asking(1, 2, "down"), Sampling())
    assert lm.usage.calls == 2


def test_an_lm_without_a_usage_is_charged_by_its_ids() -> None:
    lm = bounded(FakeLM(echo))
    lm.complete(asking("ab"), Sampling())
    assert (lm.usage.calls, lm.usage.tokens_in, lm.usage.tokens_out) == (1, len("user\nab"), 3)


@pytest.fixture
def counted() -> tuple[BudgetedLM, Runner]:
    lm = bounded(FakeLM(doubling), lm_calls=5)
    return lm, runner(lm, Loop(times=2))


def test_a_spent_budget_ends_a_run_and_is_no_rollouts_fault(counted: tuple[BudgetedLM, Runner]) -> None:
    lm, run = counted
    prompts = run.program.initial_prompts()
    run.run(doubles(1, 2), prompts)
    with pytest.raises(BudgetSpentError):
        run.run(doubles(3), prompts)
    assert lm.usage.calls == 5


def test_repairs_are_asked_and_charged_through_the_budget() -> None:
    fake = FakeLM(lambda request: Completion("6" if "cannot be read" in echo(request) else ""))
    lm = bounded(fake, lm_calls=2)
    (done,) = runner(lm, Loop(times=1)).run(doubles(3), Loop().initial_prompts())
    assert (done.score, lm.usage.calls) == (1, 2)


def test_a_bound_below_0_is_named() -> None:
    with pytest.raises(ValueError, match=r"budget\.dollars -1"):
        Budget(dollars=-1)
