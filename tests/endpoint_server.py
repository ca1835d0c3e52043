"""A small server of chat completions on 127.0.0.1, which answers by a function and fails as it is told to."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

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


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: EndpointServer

    def do_GET(self) -> None:
        content = json.dumps({"object": "list", "data": [{"id": "m", "object": "model"}]}).encode()
        self.send_response(200 if self.path == "/v1/models" else 404)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server_of.one(body, self.headers.get("authorization", "")) as reply:
            time.sleep(reply.wait)
        if self.path != "/v1/chat/completions":
            reply = Reply(status=404, error={"message": f"no route {self.path}"})
        self.send(reply, body)

    def send(self, reply: Reply, body: Body) -> None:
        if reply.reset:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            self.connection.close()
            return
        said = (
            {"error": dict(reply.error)} if reply.status != 200 else completion(body, reply.text) | dict(reply.changes)
        )
        content = json.dumps({name: value for name, value in said.items() if value is not None}).encode()
        content = content if reply.raw is None else reply.raw
        self.send_response(reply.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: reply.half])
        if reply.half is not None:
            self.close_connection = True

    def finish(self) -> None:
        with suppress(OSError, ValueError):  # the client has gone, or the connection was reset
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass


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
