"""A few hundred made-up inputs a target; `make faults` runs ten thousand of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from faults import inputs


@pytest.mark.parametrize("target", list(inputs.STRATEGIES), ids=lambda target: target.__name__)
def test_no_input_ends_in_a_traceback(target: Callable[[Any], None]) -> None:
    count = 20 if target is inputs.configs else 100
    assert inputs.check(target, count) >= count // 2
