"""What the product reaches in Lightning's loops, by the syntax tree of all its files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from cotune.callbacks import Alternate

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (
    *("storage", "programs", "prompting", "datamodules", "inference", "lightning_modules", "callbacks"),
    *("reporting", "experiments", "cotune"),
)


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def reached(tree: ast.Module, loop: str) -> set[str]:
    """Attributes taken of an attribute of this name; "" where it is taken and handed on."""
    names, whole = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr == loop:
            names.add(node.attr)
            whole.add(id(node.value))
    handed_on = {
        "" for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == loop and id(node) not in whole
    }
    return names | handed_on


def keys(tree: ast.Module) -> set[str]:
    """Constants in the product that name a part of a checkpoint's loops."""
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in texts if text == "loops" or "batch_progress" in text or "epoch_loop" in text}


def test_of_the_loops_their_public_limits_alone_are_touched() -> None:
    assert set().union(*(reached(tree, "fit_loop") for _, tree in trees())) == {"max_epochs", "epoch_loop"}
    assert set().union(*(reached(tree, "epoch_loop") for _, tree in trees())) == {"max_steps"}


def test_no_other_loop_and_no_key_of_a_checkpoints_loops_is_touched() -> None:
    for loop in ("val_loop", "batch_progress", "epoch_progress"):
        assert {str(path): found for path, tree in trees() if (found := reached(tree, loop))} == {}, loop
    assert {str(path): found for path, tree in trees() if (found := keys(tree))} == {}


def test_alternate_holds_few_things() -> None:
    assert len(vars(Alternate())) < 20
