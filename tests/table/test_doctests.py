"""The examples in the docstrings of tables run."""

from __future__ import annotations

import doctest

import pytest

from cotune.table import paper, strategies, warm_up


@pytest.mark.parametrize("module", [paper, strategies, warm_up], ids=lambda module: module.__name__)
def test_docstring_examples_run(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted
    assert not result.failed
