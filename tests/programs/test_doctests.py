"""Every example in a docstring of programs runs and is true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import cotune.programs
import pytest

MODULES = sorted(module.name for module in pkgutil.iter_modules(cotune.programs.__path__, "cotune.programs."))


@pytest.mark.parametrize("name", MODULES)
def test_doctests_are_true(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_doctests_to_run() -> None:
    assert sum(doctest.testmod(importlib.import_module(name)).attempted for name in MODULES) >= 15
