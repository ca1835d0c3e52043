"""`cotune` as processes forked from one that has imported everything: each can be killed, and none imports anew.

`python -m forked` is that one: it forks for each line of its input that holds a job, and tells what became of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import nursery
from faults.small_run import Job

TESTS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Started:
    """A process that runs `cotune`."""

    parent: Parent
    pid: int
    log: Path

    @property
    def code(self) -> int | None:
        """Its exit code, minus the signal for one that was killed; None while it runs."""
        found: int | None = self.parent.ask(pid=self.pid)
        return found

    @property
    def text(self) -> str:
        """What it wrote, errors included."""
        return self.log.read_text() if self.log.exists() else ""  # it is the process that makes the file

    def ended(self, seconds: float = 120.0) -> int:
        """Its exit code, once it has ended."""
        deadline = time.monotonic() + seconds
        while (code := self.code) is None:
            assert time.monotonic() < deadline, self.text
            time.sleep(0.01)
        return code


class Parent:
    """The process that forks them. It has never trained: a fork of one that has cannot."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "forked"]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, words: Sequence[str], folder: Path) -> Started:
        """Runs `cotune` with these words in the folder."""
        log = folder / f"log-{len(list(folder.glob('log-*.txt')))}.txt"
        return Started(self, self.ask(words=list(words), folder=str(folder)), log)

    def ask(self, **what: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(what), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def _serve() -> None:
    nursery.imported()
    children: dict[int, nursery.Child] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if "pid" in asked:
            print(json.dumps(children[asked["pid"]].code), flush=True)
        else:
            child = nursery.fork(Job(tuple(asked["words"]), Path(asked["folder"])))
            children[child.pid] = child
            print(child.pid, flush=True)


if __name__ == "__main__":
    _serve()
