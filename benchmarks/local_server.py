"""An OpenAI-compatible server of an LM in this process: requests that wait together are one batch."""

from __future__ import annotations

import hashlib
import json
import queue
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from cotune.lightning_modules import LanguageModel
from cotune.programs import Completion, Request, Sampling
from cotune.programs.layout import FREE, Field, Layout, Schema

from cotune.front import write_json

_GATHER = 0.05
"""Seconds for which a first request waits for others."""

Waiting = tuple[Request, Sampling, "Future[Completion]"]


class LocalServer(ThreadingHTTPServer):
    """A running server, on this machine's loopback address; a context manager.

    It knows chat completions, greedy or drawn at a temperature, and `response_format`: a JSON schema is held to, token
    by token. Equal requests at a temperature above 0 are drawn anew each time, in an order that a repeated run repeats.

    Attributes:
        url: what an OpenAI client takes as its base.
        name: of the model.
    """

    daemon_threads = True
    request_queue_size = 256
    name = "lm"

    def __init__(self, lm: LanguageModel) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self._lm, self._waiting, self._drawn = lm, queue.Queue[Waiting](), Counter[str]()
        self._alone = threading.Lock()
        for work in (self.serve_forever, self._complete):
            threading.Thread(target=work, daemon=True).start()

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """The response to the JSON of a request."""
        sampling = Sampling(
            temperature=float(body.get("temperature") or 0.0),
            max_new_tokens=int(body.get("max_completion_tokens") or body.get("max_tokens") or 256),
        )
        messages = [{"role": m["role"], "content": m["content"]} for m in body["messages"]]
        request = Request(messages, layout=_layout(body.get("response_format")), seed=self._seed(messages, sampling))
        done: Future[Completion] = Future()
        self._waiting.put((request, sampling, done))
        said = done.result()
        read, wrote = len(said.prompt_ids), len(said.completion_ids)
        return {
            "id": "completion",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.name,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": said.text},
                    "finish_reason": "length" if said.finished in ("length", "too_long") else "stop",
                }
            ],
            "usage": {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote},
        }

    def _seed(self, messages: list[dict[str, str]], sampling: Sampling) -> int:
        said = json.dumps(messages)
        with self._alone:
            self._drawn[said] += sampling.temperature > 0
            said += str(self._drawn[said])
        return int.from_bytes(hashlib.sha256(said.encode()).digest()[:4], "big")

    def _complete(self) -> None:
        while True:
            waiting = [self._waiting.get()]
            time.sleep(_GATHER)
            while not self._waiting.empty():
                waiting.append(self._waiting.get())
            alike: defaultdict[Sampling, list[Waiting]] = defaultdict(list)
            for one in waiting:
                alike[one[1]].append(one)
            for sampling, batch in alike.items():
                try:
                    completions = self._lm.complete([request for request, _, _ in batch], sampling)
                    for (_, _, done), completion in zip(batch, completions, strict=True):
                        done.set_result(completion)
                except Exception as error:  # told to each client, and the server goes on
                    for _, _, done in batch:
                        done.set_exception(error)

    def __enter__(self) -> LocalServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        try:
            said, status = self.server.answer(body), 200
        except Exception as error:
            said, status = {"error": {"message": f"{type(error).__name__}: {error}", "type": "server_error"}}, 500
        write_json(self, status, said)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: thousands of lines are no figure."""


def _layout(asked: dict[str, Any] | None) -> Layout:
    if not asked or asked["type"] == "text":
        return FREE
    schema = asked["json_schema"]["schema"] if asked["type"] == "json_schema" else {"type": "object"}
    return (Field("json", syntax=Schema(json.dumps(schema))),)
