"""Every example in a docstring runs and is true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import cotune

PACKAGES = ("programs", "prompting", "datamodules", "inference", "lightning_modules", "callbacks", "table", "report")
MODULES = sorted(
    module.name
    for package in (cotune, *(importlib.import_module(f"cotune.{name}") for name in PACKAGES))
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    if module.name != "cotune.__main__"
)
EXAMPLES = {name: doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name)) for name in MODULES}


@pytest.mark.parametrize("name", [name for name in MODULES if any(found.examples for found in EXAMPLES[name])])
def test_doctests_are_true(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_doctests_to_run() -> None:
    assert sum(len(found.examples) for parts in EXAMPLES.values() for found in parts) >= 40
