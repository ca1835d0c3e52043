"""A server that cotune starts ends with it, however cotune ends, and is started again when it has ended by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from cotune.inference.vllm import VLLMError, keeper
from cotune.inference.vllm.process import Process
from waiting import until

# It takes the place of Python: it is given "-m vllm… --port N", answers, and has a child as vLLM has its engine.
STAND_IN = """\
    #!{python} -I
    import http.server, os, subprocess, sys
    if "--fails" in sys.argv:
        sys.exit("no room for keys and values")
    child = subprocess.Popen(["sleep", "60"])
    open("{pids}", "a").write(f"{{os.getpid()}} {{child.pid}}\\n")
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(os.environ["TOLD"].encode())
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Answer).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    file = tmp_path / "python"
    file.write_text(textwrap.dedent(STAND_IN).format(python=sys.executable, pids=tmp_path / "pids"))
    file.chmod(0o755)
    return file


@pytest.fixture
def started(tmp_path: Path) -> Callable[[], list[int]]:
    """The process and its child, as of the last start."""
    pids = tmp_path / "pids"
    return lambda: [int(pid) for pid in pids.read_text().splitlines()[-1].split()] if pids.is_file() else []


def gone(pids: list[int]) -> bool:
    """Zombies count as gone."""
    stats = [Path(f"/proc/{pid}/stat") for pid in pids]
    return all(not stat.is_file() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z" for stat in stats)


def test_it_starts_comes_again_and_ends_with_its_children(
    stand_in: Path, tmp_path: Path, started: Callable[[], list[int]]
) -> None:
    process = Process(str(stand_in), ["--model", "m"], {"TOLD": "x"}, tmp_path / "log")
    process.wait(30)
    first = started()
    process.start()
    assert started() == first  # it runs: nothing to do
    os.kill(first[0], signal.SIGKILL)
    until(lambda: gone(first))  # its child as well
    until(lambda: process.start() or started() != first)
    process.wait(30)
    process.end()
    assert gone(started())
    assert "ended with exit code" in (tmp_path / "log").read_text()


def test_one_that_does_not_start_says_why(stand_in: Path, tmp_path: Path) -> None:
    process = Process(str(stand_in), ["--fails"], {}, tmp_path / "log")
    with pytest.raises(VLLMError, match="did not start: no room for keys and values"):
        process.wait(30)
    process.end()
    process = Process(sys.executable, [], {}, tmp_path / "log2")
    with pytest.raises(VLLMError, match=r"has no vLLM.* python3 -m venv"):
        process.wait(30)
    process.end()


def test_it_ends_when_whoever_started_it_is_killed(
    stand_in: Path, tmp_path: Path, started: Callable[[], list[int]]
) -> None:
    words = [sys.executable, "-I", keeper.__file__, str(stand_in), "0"]
    parent = (
        f"import subprocess, sys\nsubprocess.Popen({words!r}, stdin=subprocess.PIPE, start_new_session=True).wait()"
    )
    killed = subprocess.Popen([sys.executable, "-c", parent], env={**os.environ, "TOLD": "x"})
    until(lambda: bool(started()))
    killed.kill()
    killed.wait()
    until(lambda: gone(started()))
