"""The page docs/engines.md does what it says, with a small server in the endpoint's place."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from cotune.inference.openai import OpenAILM
from endpoint_server import Body, serving
from pages import DOCS, blocks

PAGE = DOCS / "engines.md"


def answer(body: Body) -> str:
    """Adds, and judges."""
    asked = body["messages"][-1]["content"]
    if "verdict" in str(body["response_format"]):
        return json.dumps({"reasoning": "It holds.", "verdict": "right"})
    number = int(re.findall(r"(\d+) \+", asked)[-1])
    return json.dumps({"reasoning": "Twice the number.", "answer": 2 * number})


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__page__"}
    with serving(answer) as server:
        for block in blocks(PAGE):
            if block.language == "python":
                text = block.text.replace("http://127.0.0.1:8000/v1", server.url)
                exec(compile(text, PAGE.name, "exec"), names)
        names["lm"].close()
        names["judge"].lm.close()
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("10.0 10 calls, ")
    assert said[1].startswith("1.0 ")
    assert said[2] == "It holds."
    assert said[3].startswith("the judge contradicted itself on 0 of ")
    assert Path("calls.sqlite").is_file()


def test_its_table_shows_the_options_and_their_defaults() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, option in inspect.signature(OpenAILM).parameters.items():
        row = re.search(rf"^\| `{name}` \| ([^|]+) \|", text, re.MULTILINE)
        if row is None:
            assert name in ("model", "key_variable"), f"{name} is not in the table"
        elif isinstance(option.default, (int, float)):
            assert float(row[1]) == option.default
