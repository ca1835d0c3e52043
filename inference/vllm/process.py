"""A vLLM server that cotune starts in an environment of its own, and that ends with this process."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from cotune.inference.vllm import keeper
from cotune.inference.vllm.server import VLLMError
from cotune.storage.served_adapter import HOW_TO_INSTALL

_SHOWN = 12
"""Last lines of a server's log that an error shows."""
_OF_THIS_PYTHON = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


class Process:
    """One server on a free port of this machine's loopback address.

    Args:
        python: of the environment that has vLLM.
        options: of its command line, address and port apart.
        variables: of its environment, beside those of this process.
        log: file that its output is appended to.

    Attributes:
        url: of the server, once it answers; its port stays when it is started again.

    Raises:
        VLLMError: there is no such Python.
    """

    def __init__(self, python: str, options: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
        found = shutil.which(os.path.expanduser(python))
        if found is None:
            raise VLLMError(f'there is no Python "{python}" to start vLLM with. Make an environment: {HOW_TO_INSTALL}')
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.url, self.log = f"http://127.0.0.1:{port}", log
        server = [found, "-m", "vllm.entrypoints.openai.api_server", *options, "--host", "127.0.0.1", "--port", port]
        self._command = [sys.executable, "-I", keeper.__file__, *server]
        inherited = {name: value for name, value in os.environ.items() if name not in _OF_THIS_PYTHON}
        self._variables = {**inherited, **variables}
        self._keeper: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Starts it, unless it runs; does not wait for it."""
        if self._keeper is not None and self._keeper.poll() is None:
            return
        self.end()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._keeper = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._variables,
                start_new_session=True,  # Ctrl-C is for this process, which ends the server in order
            )

    def wait(self, seconds: float) -> None:
        """Until it answers.

        Raises:
            VLLMError: it ended, or took too long; with what it said last.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return
            if self._keeper is None or self._keeper.poll() is not None:
                raise VLLMError(f"the vLLM server did not start: {self._said()} All of it is in {self.log}.")
            time.sleep(0.2)
        raise VLLMError(f"the vLLM server did not answer within {seconds:.0f} s: {self._said()} See {self.log}.")

    def end(self) -> None:
        """Ends it and its children, and waits for that."""
        if self._keeper is None or self._keeper.stdin is None:
            return
        with contextlib.suppress(OSError):
            self._keeper.stdin.close()
        try:
            self._keeper.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self._keeper.pid, signal.SIGKILL)
            self._keeper.wait()

    def _said(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.is_file() else []
        if any("No module named" in line and "vllm" in line for line in lines[-_SHOWN:]):
            return f"its environment has no vLLM. To make one: {HOW_TO_INSTALL}."
        return " | ".join(line.strip() for line in lines[-_SHOWN:] if line.strip())[-1500:]
