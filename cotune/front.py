"""A small HTTP server that answers programs' inputs, in the words of OpenAI's chat completions."""

from __future__ import annotations

import hmac
import json
import queue
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cotune.datamodules.files import DataError
from cotune.datamodules.rows import example_from_json
from cotune.errors import CotuneError
from cotune.programs import Example, Rollout
from cotune.programs.types import plain
from cotune.tuned import Tuned, program_inputs

_MOST_AT_ONCE = 256
"""Questions that go through the program together."""
_LONGEST = 4 << 20
"""Bytes of a request."""
_IDLE = 30.0
"""Seconds that a client may be silent in the middle of a request."""


class RefusedError(Exception):
    """A request that is not answered: its status, what is wrong, and a word for programs."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's errors look."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}


class Asking:
    """The one thread that runs a program, on all questions together that wait for it.

    Args:
        tuned: the program.
    """

    def __init__(self, tuned: Tuned) -> None:
        self._tuned = tuned
        self._waiting: queue.Queue[tuple[Example, Future[Rollout]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="asking", daemon=True)
        self._thread.start()

    def ask(self, example: Example) -> Rollout:
        """Waits for what the program makes of it.

        Raises:
            CotuneError: the LM cannot be asked.
        """
        answer: Future[Rollout] = Future()
        self._waiting.put((example, answer))
        return answer.result()

    def end(self) -> None:
        """Answers what waits, and ends."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        last = False
        while not last:
            taken = [self._waiting.get()]
            while taken[-1] is not None and len(taken) < _MOST_AT_ONCE and not self._waiting.empty():
                taken.append(self._waiting.get())
            last = taken[-1] is None
            asked = [one for one in taken if one is not None]
            try:
                rollouts = self._tuned.rollouts([example for example, _ in asked]) if asked else []
            except Exception as error:  # each of those who wait is to know
                for _, answer in asked:
                    answer.set_exception(error)
            else:
                for (_, answer), rollout in zip(asked, rollouts, strict=True):
                    answer.set_result(rollout)


class Front(ThreadingHTTPServer):
    """Listens from the start, and answers once it has been given a program: `/v1/models`, `/v1/chat/completions`.

    The one message of a request, a user's, is the JSON object of the program's inputs, or plain text where there is one
    input. The answer is the JSON object of its outputs. Prompts and sampling are the program's own.

    Args:
        host, port: to listen on; port 0 takes a free one.
        name: of the program, as a model.
        key: that requests must bear; "" for none.

    Raises:
        OSError: the address cannot be had.
    """

    daemon_threads = False  # who is being answered is waited for

    def __init__(self, host: str, port: int, *, name: str, key: str = "") -> None:
        super().__init__((host, port), _Handler)
        self.name, self._key, self._began = name, key, int(time.time())
        self._asking: Asking

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says what broke, unless it is a client that hung up or reads no more."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def give(self, tuned: Tuned) -> None:
        """Answers by this program."""
        self._asking = Asking(tuned)
        self._required, self._optional = program_inputs(tuned.module.program)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, name="front", daemon=True).start()

    def end(self) -> None:
        """Takes no more requests, answers those that are there, and closes."""
        self.shutdown()
        self.server_close()
        self._asking.end()

    def get(self, path: str) -> dict[str, Any]:
        if path == "/health":
            return {}
        known = {"id": self.name, "object": "model", "created": self._began, "owned_by": "cotune"}
        if path == "/v1/models":
            return {"object": "list", "data": [known]}
        if path == f"/v1/models/{self.name}":
            return known
        raise RefusedError(404, f"there is no {path}; there are /v1/models and /v1/chat/completions.", "not_found")

    def post(self, path: str, body: Any) -> dict[str, Any]:
        if path != "/v1/chat/completions":
            raise RefusedError(404, f"there is no {path}; there is /v1/chat/completions.", "not_found")
        example = self._example(body)
        try:
            rollout = self._asking.ask(example)
        except CotuneError as error:
            raise RefusedError(503, str(error), "unavailable") from error
        if rollout.error is not None:
            raise RefusedError(422, f"the program gave no answer: {rollout.error.message}", rollout.error.kind)
        said = json.dumps(plain(rollout.prediction or {}), ensure_ascii=False)
        read = sum(len(step.completion.prompt_ids) for step in rollout.steps)
        written = sum(len(step.completion.completion_ids) for step in rollout.steps)
        message = {"role": "assistant", "content": said, "refusal": None}
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.name,
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
        }

    def check_key(self, header: str) -> None:
        if self._key and not hmac.compare_digest(header.removeprefix("Bearer ").encode(), self._key.encode()):
            raise RefusedError(401, "the request has no key, or a wrong one.", "invalid_api_key")

    def _example(self, body: Any) -> Example:
        """The program's inputs."""
        if not isinstance(body, Mapping):
            raise RefusedError(400, "a request is a JSON object with model and messages.", "invalid_json")
        if body.get("model") != self.name:
            raise RefusedError(404, f'there is no model "{body.get("model")}", only "{self.name}".', "model_not_found")
        if body.get("stream") or body.get("n") not in (None, 1) or body.get("tools"):
            raise RefusedError(400, "stream, n above 1 and tools are not served.", "unsupported")
        match body.get("messages"):
            case [{"role": "user", "content": str(text)}] | [
                {"role": "user", "content": [{"type": "text", "text": str(text)}]}
            ]:
                return self._example_of(text)
        raise RefusedError(
            400, f"messages must be one message of the user with text: {self._wanted()}.", "invalid_messages"
        )

    def _example_of(self, text: str) -> Example:
        names = [*self._required, *self._optional]
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict) or (len(names) == 1 and not given.keys() & set(names)):
            if len(names) != 1:
                raise RefusedError(400, f"the message is no JSON object: {self._wanted()}.", "invalid_inputs")
            given = {names[0]: text}
        if unknown := given.keys() - set(names):
            raise RefusedError(400, f"{', '.join(sorted(unknown))}: no input; {self._wanted()}.", "invalid_inputs")
        try:
            return example_from_json(json.dumps(given), columns={n: n for n in names}, required=self._required)
        except DataError as error:
            raise RefusedError(400, f"{str(error).rstrip('.')}; {self._wanted()}.", "invalid_inputs") from error
        except RecursionError as error:
            raise RefusedError(400, f"an input is nested too deeply; {self._wanted()}.", "invalid_inputs") from error

    def _wanted(self) -> str:
        optional = f" and, if you like, {', '.join(self._optional)}" if self._optional else ""
        return f"it holds the program's inputs as JSON, {', '.join(self._required)}{optional}"


def write_json(handler: BaseHTTPRequestHandler, status: int, value: Any) -> None:
    """Answers a request with a value that JSON holds."""
    # Half a surrogate pair, from a client, becomes the escape that JSON has for it.
    content = json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace")
    handler.send_response(status)
    handler.send_header("content-type", "application/json")
    handler.send_header("content-length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


class _Handler(BaseHTTPRequestHandler):
    server: Front
    timeout = _IDLE

    def do_GET(self) -> None:
        self._answer(lambda: self.server.get(self.path))

    def do_POST(self) -> None:
        self._answer(lambda: self.server.post(self.path, self._body()))

    def _body(self) -> Any:
        length = self.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > _LONGEST:
            raise RefusedError(413, f"a request needs a Content-Length, at most {_LONGEST} bytes.", "too_large")
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise RefusedError(400, f"the request is no JSON: {error}.", "invalid_json") from error

    def _answer(self, work: Any) -> None:
        try:
            if self.path != "/health":
                self.server.check_key(self.headers.get("authorization", ""))
            status, said = 200, work()
        except RefusedError as error:
            status, said = error.status, error.body
        except Exception as error:
            status, said = 500, RefusedError(500, f"{type(error).__name__}: {error}", "broken").body
        write_json(self, status, said)

    def log_message(self, format: str, *args: Any) -> None:
        pass
