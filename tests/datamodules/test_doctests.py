"""Every example in a docstring of datamodules runs and is true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import cotune.datamodules
import pytest

MODULES = sorted(module.name for module in pkgutil.iter_modules(cotune.datamodules.__path__, "cotune.datamodules."))


@pytest.mark.parametrize("name", MODULES)
def test_doctests_are_true(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
