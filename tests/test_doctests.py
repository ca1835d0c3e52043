"""Every example in a docstring runs and is true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import cotune

MODULES = sorted(
    module.name for module in pkgutil.walk_packages(cotune.__path__, "cotune.") if module.name != "cotune.__main__"
)
EXAMPLES = {name: doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name)) for name in MODULES}


@pytest.mark.parametrize("name", [name for name in MODULES if any(found.examples for found in EXAMPLES[name])])
def test_doctests_are_true(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_doctests_to_run() -> None:
    assert sum(len(found.examples) for parts in EXAMPLES.values() for found in parts) >= 40
