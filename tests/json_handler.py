"""What the servers of the tests do alike with a connection: JSON, half an answer, none at all."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import Any

NONE: Mapping[str, str] = {}


class JSONHandler(BaseHTTPRequestHandler):
    """A request whose body is JSON, and its answer."""

    protocol_version = "HTTP/1.1"

    def body(self) -> Any:
        return json.loads(self.rfile.read(int(self.headers["content-length"])))

    def write(
        self, status: int, said: Any, *, half: int | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answers with JSON, or with bytes as they are.

        Args:
            half: sends this many bytes, promises all, and closes; None sends all.
        """
        content = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(status)
        given = {"content-type": "application/json", "content-length": str(len(content)), **(headers or {})}
        for name, value in given.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[:half])
        if half is not None:
            self.close_connection = True

    def reset(self) -> None:
        """Closes the connection with an RST and no answer."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def finish(self) -> None:
        with suppress(OSError, ValueError):  # the client has gone, or the connection was reset
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass
