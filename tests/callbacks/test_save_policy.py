"""When a run saves, by a clock that the test sets."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from cotune.callbacks.save_policy import SavePolicy
from cotune.callbacks.saver import Saver
from cotune.callbacks.stop_signals import StopSignals
from cotune.programs.ranks import Ranks
from side_by_side import side_by_side


class Clock:
    """Seconds that move only when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_every_so_many_steps() -> None:
    policy = SavePolicy(3)
    policy.began(4)
    assert [step for step in range(4, 9) if policy.due(step)] == [7, 8]
    policy.saved(7, 0.1)
    assert [step for step in range(7, 12) if policy.due(step)] == [10, 11]
    assert policy.due_at_boundary(7, stored=True), "who asks for steps gets the boundaries as well"


def test_auto_keeps_saving_under_two_percent_of_the_time() -> None:
    policy = SavePolicy("auto", clock=(clock := Clock()))
    saving = 0.0
    for step in range(100_000):
        clock.now += 0.01
        if policy.due(step):
            clock.now += 0.05
            saving += 0.05
            policy.saved(step, 0.05)
    assert 0.01 < saving / clock.now < 0.02


def test_auto_lets_a_boundary_pass_only_where_completions_are_kept() -> None:
    policy = SavePolicy("auto", clock=(clock := Clock()))
    policy.saved(1, 1.0)
    clock.now += 1
    assert not policy.due_at_boundary(1, stored=True)
    assert policy.due_at_boundary(1, stored=False)


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="save_every 0 is below 1"):
        SavePolicy(0)


# -- several processes


class Noting(Saver):
    """Notes that it is to save, in place of doing it."""

    def __init__(self, policy: SavePolicy) -> None:
        super().__init__(policy, None)
        self.saves = 0

    def save(self, trainer: Any) -> None:
        self.saves += 1


class Step:
    """What a saver asks of a trainer, after an optimiser step."""

    def __init__(self, ranks: Ranks) -> None:
        self.lightning_module, self.datamodule, self.global_step = self, None, 1
        self.ranks = ranks


def test_the_first_process_decides_when_all_save() -> None:
    def step(ranks: Ranks) -> int:
        saver = Noting(SavePolicy(1 if ranks.first else 2))  # as if the others' clocks said otherwise
        saver.step_ended(Step(ranks))  # type: ignore[arg-type]
        saver.save_unless_too_soon(Step(ranks), stored=True)  # type: ignore[arg-type]
        return saver.saves

    assert side_by_side(3, step) == [2, 2, 2]


def test_a_signal_to_one_process_saves_and_ends_all() -> None:
    savers: list[Noting] = []

    def step(ranks: Ranks) -> None:
        savers.append(saver := Noting(SavePolicy(9)))
        saver.stopping = signals = StopSignals()
        signals.requested = signal.SIGTERM if ranks.index == 1 else None
        saver.step_ended(Step(ranks))  # type: ignore[arg-type]
        saver.step_begins(Step(ranks))  # type: ignore[arg-type]

    found = side_by_side(3, step)
    assert [getattr(one, "exit_code", None) for one in found] == [143] * 3
    assert [saver.saves for saver in savers] == [1, 1, 1]
