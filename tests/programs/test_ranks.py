"""Several processes: each example in one of them, and afterwards all of them know the same."""

from __future__ import annotations

import datetime
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from cotune.programs import (
    BudgetSpentError,
    Example,
    FaultyProgramError,
    Ledger,
    LMUnavailableError,
    Signature,
    Stage,
    Usage,
)
from cotune.programs.ranks import RankFailedError, Ranks, RanksDifferError
from cotune.prompting.evaluate import CountingLM
from fakes import FakeLM, Loop, doubles, doubling, runner
from side_by_side import ThreadRanks, side_by_side

EXAMPLES = doubles(*range(1, 8))


@pytest.mark.parametrize("count", [2, 4, 9])  # of the nine, two have no example
def test_several_ranks_make_the_rollouts_of_one_and_each_example_is_run_once(count: int) -> None:
    program = Loop(times=2)
    alone = runner(FakeLM(doubling), program).run(EXAMPLES, program.initial_prompts())
    lms = [FakeLM(doubling) for _ in range(count)]
    told: list[list[int]] = [[] for _ in range(count)]

    def run(ranks: Ranks) -> Any:
        mine = runner(lms[ranks.index], program, ranks=ranks)
        return mine.run(EXAMPLES, program.initial_prompts(), progress=told[ranks.index].append)

    assert side_by_side(count, run) == [alone] * count
    assert sum(len(batch) for lm in lms for batch in lm.batches) == 2 * len(EXAMPLES)
    assert [sum(one) for one in told] == [len(EXAMPLES)] * count


def test_predictions_are_sent_as_files_hold_them() -> None:
    class Dated(Loop):
        def run(self, number: int) -> Any:
            yield self.double(number=number)
            return {"on": datetime.date(2024, 7, number), "answer": number}

    def run(ranks: Ranks) -> Any:
        return runner(FakeLM(doubling), Dated(), metric=None, ranks=ranks).run(EXAMPLES, Dated().initial_prompts())

    first, second = side_by_side(2, run)
    assert first == second
    assert isinstance(first, list)
    assert first[6].prediction == {"on": "2024-07-07", "answer": 7}


def test_ranks_that_are_about_to_do_different_things_all_end_with_one_message() -> None:
    lm = FakeLM(doubling)

    def run(ranks: Ranks) -> Any:
        order = EXAMPLES[::-1] if ranks.index == 1 else EXAMPLES  # as if taken from a set
        return runner(lm, Loop(), ranks=ranks).run(order, Loop().initial_prompts())

    found = side_by_side(3, run)
    assert [type(one) for one in found] == [RanksDifferError] * 3
    assert len({str(one) for one in found}) == 1
    assert "process 1 is about to run 7 examples, process 0" in str(found[0])
    assert lm.batches == []


def test_a_program_that_follows_the_order_of_a_set_ends_all_and_a_sorted_one_runs() -> None:
    """The orders are those of processes whose hashes differ, as they do where PYTHONHASHSEED is not set."""
    labels = [f"label {n}" for n in range(20)]
    script = f"print(*{{{', '.join(map(repr, labels))}}}, sep=', ')"

    def order(seed: int) -> str:
        return subprocess.run(
            [sys.executable, "-S", "-c", script], env={"PYTHONHASHSEED": str(seed)}, capture_output=True, text=True
        ).stdout

    orders = [order(1), order(2)]
    assert orders[0] != orders[1]

    def run(told: Callable[[str], str]) -> Any:
        def one(ranks: Ranks) -> Any:
            class Labelled(Loop):
                double = Stage(Signature.parse("number -> answer", instruction=told(orders[ranks.index])))

            return runner(FakeLM(doubling), Labelled(), ranks=ranks).run(EXAMPLES, Labelled().initial_prompts())

        return side_by_side(2, one)

    assert [type(one) for one in run(str)] == [RanksDifferError] * 2
    assert [len(one) for one in run(lambda text: str(sorted(text.strip().split(", "))))] == [len(EXAMPLES)] * 2


class _SpentError(LMUnavailableError):
    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")
        self.other = other


class _UnsendableError(RuntimeError):
    def __init__(self) -> None:
        super().__init__("cannot be sent")
        self.held = lambda: 0


@pytest.mark.parametrize(
    ("error", "elsewhere"),
    [
        (_SpentError(1, 2), _SpentError),
        (BudgetSpentError("budget.lm_calls 3", Usage(), 1.0), BudgetSpentError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (_UnsendableError(), RankFailedError),
    ],
)
def test_what_is_raised_in_one_rank_is_raised_in_all(error: BaseException, elsewhere: type[BaseException]) -> None:
    def fails(request: Any) -> str:
        raise error

    def run(ranks: Ranks) -> Any:
        lm = FakeLM(fails if ranks.index == 1 else doubling)
        return runner(lm, Loop(), ranks=ranks).run(EXAMPLES, Loop().initial_prompts())

    first, second, third = side_by_side(3, run)
    assert second is error
    for one in (first, third):
        assert type(one) is elsewhere
        assert str(error) in str(one)
        assert getattr(one, "in_all_ranks", False)
        assert vars(one).get("other") == vars(error).get("other")


def test_programs_that_fail_in_one_rank_count_against_all_examples() -> None:
    class Fails(Loop):
        def run(self, number: int) -> Any:
            if number > 4:  # all that the second of two has
                raise ValueError("broken")
            return (yield from super().run(number))

    def run(share: float) -> Any:
        return lambda ranks: runner(FakeLM(doubling), Fails(), ranks=ranks, max_error_rate=share).run(
            EXAMPLES, Fails().initial_prompts()
        )

    for done in side_by_side(2, run(0.5)):
        assert isinstance(done, list)
        assert [one.error is None for one in done] == [True] * 4 + [False] * 3
    assert [type(one) for one in side_by_side(2, run(0.2))] == [FaultyProgramError] * 2


def test_calls_and_costs_are_known_in_all_ranks() -> None:
    class Judged:
        def __init__(self, ledger: Ledger) -> None:
            self.ledger = ledger

        def __call__(self, example: Example, prediction: Mapping[str, Any]) -> float:
            self.ledger.charge("judge", Usage(calls=1, dollars=0.5))
            return 1.0

    def run(ranks: ThreadRanks) -> Any:
        ledger = Ledger()
        ranks.counters = (ledger,)
        counting = CountingLM(FakeLM(doubling))
        counted = replace(runner(counting, Loop(times=2), ranks=ranks), metric=Judged(ledger))
        counted.run(EXAMPLES, Loop().initial_prompts())
        return counting.calls, ledger.roles["judge"]

    assert side_by_side(3, run) == [(14, Usage(calls=7, dollars=3.5))] * 3


def test_one_rank_asks_for_all() -> None:
    asked: list[int] = []

    def once(ranks: Ranks) -> int:
        return ranks.once(lambda: asked.append(ranks.index) or 7)  # type: ignore[func-returns-value]

    assert side_by_side(3, once) == [7, 7, 7]
    assert asked == [0]
