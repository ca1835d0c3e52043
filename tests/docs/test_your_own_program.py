"""The page docs/your-own-program.md does what it says: its files are written and its commands are run as they stand."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import cotune
from cotune.programs import Example, Lines, Runner, Sampling, exact_match
from fakes import FakeLM

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "your-own-program.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def steps() -> list[tuple[str, str]]:
    """What a reader does, in order: ("$", command), or (file name, content) for a block after "ave this as `file`"."""
    done = []
    for block in BLOCK.finditer(PAGE):
        if block[1] == "bash":
            done += [("$", line) for line in block[2].splitlines()]
        else:
            (name,) = re.findall(r"ave this as\s+`([\w.]+)`", PAGE[: block.start()])[-1:]
            done.append((name, block[2]))
    return done


def follow(folder: Path, run: Callable[[list[str]], str]) -> dict[str, str]:
    """Does all the steps. Returns what each command printed."""
    printed = {}
    for name, content in steps():
        if name == "$":
            printed[content] = run(shlex.split(content))
        else:
            (folder / name).write_text(content, encoding="utf-8")
    return printed


def said(printed: dict[str, str], start: str) -> str:
    (text,) = (out for command, out in printed.items() if command.startswith(start))
    return text


def test_every_file_is_named_before_it_is_used() -> None:
    names = [name for name, _ in steps()]
    assert names == [
        *(
            "make_tickets.py",
            "$",
            "ticket_desk.py",
            "tickets.yaml",
            "$",
            "$",
            "$",
            "noted_desk.py",
            "new.csv",
            "$",
            "answer.py",
            "$",
        )
    ]


def test_a_note_is_what_the_next_stage_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(tmp_path, lambda command: "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    desk = importlib.import_module("noted_desk").NotedDesk()
    sys.modules.pop("noted_desk")
    lm = FakeLM(lambda request: "billing" if "paid twice" in request.messages[-1]["content"] else "paid twice")
    runner = Runner(desk, lm, form=Lines(), metric=exact_match, sampling=Sampling(), max_error_rate=0.5)
    (done,) = runner.run([Example.of({"ticket": "Help!"}, {"team": "billing"}, id="1")], desk.initial_prompts())
    assert done.prediction == {"problem": "paid twice", "team": "billing"}
    assert done.score == 1


@pytest.mark.slow
def test_the_page_works_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The scripts are processes of their own; `cotune` runs here, where all has been imported."""
    # As in an activated environment, and with nothing of this repository's tests on the path.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    monkeypatch.chdir(tmp_path)

    def run(words: list[str]) -> str:
        if words[0] == "cotune":
            here = cotune(words[1:], capsys)
            assert here.code == 0, here.err
            return here.out
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    printed = follow(tmp_path, run)
    sys.modules.pop("ticket_desk", None)  # of a folder that will be gone
    check(tmp_path, printed)
    scores = json.loads((tmp_path / "runs/tickets/summary.json").read_text())["scores"]
    assert scores["vanilla"] < max(scores.values()), "tuning helps"


def check(folder: Path, printed: dict[str, str]) -> None:
    """What the page promises of its commands."""
    assert len((folder / "tickets.csv").read_text().splitlines()) == 1 + 42
    assert "p -> w" in said(printed, "cotune fit")
    assert "⟦" in said(printed, "cotune preview")
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [answer["row"] for answer in answers] == [1, 2]
    assert all({"row", "team", "urgency", "error"} == set(answer) for answer in answers)
    assert "team" in said(printed, "python answer.py")
    assert (folder / "runs/tickets/export/adapter/adapter_config.json").is_file()
