"""A small server of chat completions on 127.0.0.1, which answers by a function and fails as it is told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from json_handler import JSONHandler

Body = Mapping[str, Any]


@dataclass(frozen=True)
class Reply:
    """What the server does with one request.

    Attributes:
        text: of the completion.
        status, error: anything but 200 answers with this error object.
        headers: beside the usual ones.
        changes: merged into the response's JSON; None removes a key.
        wait: seconds before it answers.
        reset: closes the connection with an RST and no answer.
        half: sends this many bytes of the body, promises all of it, and closes.
        raw: sent in place of the JSON.
    """

    text: str = ""
    status: int = 200
    error: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    wait: float = 0.0
    reset: bool = False
    half: int | None = None
    raw: bytes | None = None


def completion(body: Body, text: str) -> dict[str, Any]:
    """The JSON of a completion; its tokens are words."""
    read = sum(len(message["content"].split()) for message in body["messages"])
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": read, "completion_tokens": len(text.split()), "total_tokens": read + len(text.split())}
    return {"id": "1", "object": "chat.completion", "model": body["model"], "choices": [choice], "usage": usage}


class EndpointServer:
    """The server while it runs.

    Attributes:
        answer: request -> text or Reply; it may be replaced at any time.
        bodies, keys: what was asked, and with which Authorization, in the order of arrival.
        most: requests that were under way at once, at most.
    """

    def __init__(self, answer: Callable[[Body], str | Reply]) -> None:
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.most = 0
        self._under_way, self._lock = 0, threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_of": self}))
        self.http.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1"

    @property
    def asked(self) -> list[str]:
        """The last message of each request."""
        return [body["messages"][-1]["content"] for body in self.bodies]

    @contextmanager
    def one(self, body: dict[str, Any], key: str) -> Iterator[Reply]:
        with self._lock:
            self.bodies.append(body)
            self.keys.append(key)
            self._under_way += 1
            self.most = max(self.most, self._under_way)
            said = self.answer(body)
        try:
            yield said if isinstance(said, Reply) else Reply(said)
        finally:
            with self._lock:
                self._under_way -= 1


class _Handler(JSONHandler, BaseHTTPRequestHandler):
    server_of: EndpointServer

    def do_GET(self) -> None:
        models = {"object": "list", "data": [{"id": "m", "object": "model"}]}
        self.write(200 if self.path == "/v1/models" else 404, models)

    def do_POST(self) -> None:
        body = self.body()
        with self.server_of.one(body, self.headers.get("authorization", "")) as reply:
            time.sleep(reply.wait)
        if self.path != "/v1/chat/completions":
            reply = Reply(status=404, error={"message": f"no route {self.path}"})
        if reply.reset:
            self.reset()
            return
        said = (
            {"error": dict(reply.error)} if reply.status != 200 else completion(body, reply.text) | dict(reply.changes)
        )
        left = {name: value for name, value in said.items() if value is not None}
        self.write(reply.status, left if reply.raw is None else reply.raw, half=reply.half, headers=reply.headers)


@contextmanager
def serving(answer: Callable[[Body], str | Reply]) -> Iterator[EndpointServer]:
    """A running server on a free port."""
    server = EndpointServer(answer)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()
