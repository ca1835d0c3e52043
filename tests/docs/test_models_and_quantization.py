"""The page docs/models-and-quantization.md: its table is what was measured, and its commands are ones that exist."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from cotune.commands.export import parser

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "models-and-quantization.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results" / "quantization-cpu.json"


def test_the_table_is_the_one_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("quantization_table", ROOT / "benchmarks" / "quantization.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)  # where its dataclasses look for their names
    spec.loader.exec_module(script)
    assert script.table(json.loads(RESULTS.read_text(encoding="utf-8"))) in PAGE


@pytest.mark.parametrize("line", re.findall(r"^cotune export .*", PAGE, re.MULTILINE))
def test_its_commands_parse(line: str) -> None:
    _, _, *words = shlex.split(line, comments=True)
    assert parser().parse_args(words).run == "runs/iris"


def test_its_options_exist() -> None:
    from inspect import signature

    from cotune.lightning_modules import LanguageModel

    named = set(re.findall(r"model\.lm\.(\w+)", PAGE))
    assert named
    assert named <= set(signature(LanguageModel.__init__).parameters)
