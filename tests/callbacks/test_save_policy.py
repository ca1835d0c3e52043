"""When a run saves, by a clock that the test sets."""

from __future__ import annotations

import pytest
from cotune.callbacks.save_policy import SavePolicy


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
