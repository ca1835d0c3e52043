"""What vLLM servers are worth to a run: beside the engine in this process, one against two, and how a pool grows.

The pool's growth is measured on stand-ins that answer after a fixed time, since real servers on one machine share its
cores. Real ones have a thread each. Tokens are compared before a ratio is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from cotune.inference.engine import Engine, Prompted
from cotune.inference.local import LocalEngine
from cotune.inference.vllm import VLLMServer
from cotune.inference.vllm.probe import Probe, probe
from cotune.inference.vllm.process import Process
from cotune.lightning_modules import LanguageModel, LoRA
from cotune.programs.lm import Sampling

from benchmarks.environments import interpreter
from benchmarks.jobs import JOBS, make_batch
from benchmarks.peers import VLLM, vllm_environment
from benchmarks.report import RESULTS, Report
from benchmarks.rollouts import agreement

NEAR_LINEAR = 0.85
"""Least share of n times the speed that n servers are to reach."""
_TOKEN = 100  # what stand-ins write


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    told = {name: vars(options)[name] for name in ("jobs", "prompts", "eager", "rows", "latency", "urls")}
    report = Report("served", details={**told, "threads": 1, "load average at the start": os.getloadavg()[0]})
    torch.set_num_threads(1)
    lm = LanguageModel(device="cpu", lora=LoRA(r=8, alpha=16))
    lm.load(seed=0)
    if "stand-ins" in options.parts:
        _growth(report, lm, options)
    if "vllm" in options.parts:
        _beside(report, lm, options)
    report.details["load average at the end"] = os.getloadavg()[0]
    report.write(Path(options.output))


def _growth(report: Report, lm: LanguageModel, options: argparse.Namespace) -> None:
    """A wave of one-token completions on 1, 2, 4 and 8 stand-ins that answer one request at a time."""
    prompts = [[_TOKEN + i, _TOKEN] for i in range(options.rows)]
    first = 0.0
    for count in (1, 2, 4, 8):
        with tempfile.TemporaryDirectory() as folder, stand_ins(probe(lm, "default"), probe(lm, ""), count) as urls:
            engine = VLLMServer(urls, adapters=folder, concurrency=1)
            engine.start(lm)
            _LATENCY.seconds = options.latency
            seconds, _ = _timed(engine, prompts, new=1)
            _LATENCY.seconds = 0.0
            engine.close()
        first = first or seconds
        speed = first / seconds
        target = None if count == 1 else NEAR_LINEAR * count
        report.add(f"{count} stand-ins of {options.latency:g} s: speed beside one", [speed], "x", target=target)


def _beside(report: Report, lm: LanguageModel, options: argparse.Namespace) -> None:
    """Jobs of rollouts.py, cold, on the engine here, on one server and on two."""
    local = LocalEngine()
    local.start(lm)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        urls = options.urls or _servers(Path(folder), lm, options, running)
        served = []
        for count in (1, 2):
            served.append(VLLMServer(urls[:count], adapters=f"{folder}/adapters"))
            served[-1].start(lm)
            running.callback(served[-1].close)
        for name in options.jobs:
            job, took = JOBS[name].smaller(options.prompts), list[float]()
            for engine in (local, *served):  # kernels are chosen on first use
                batch = make_batch(job.smaller(2), lm.encode, salt=-len(engine.identity()))
                _timed(engine, batch.ids, new=batch.new)
            for salt, engine in enumerate(served, 1):  # a batch of its own for each: nothing of it is cached
                batch = make_batch(job, lm.encode, salt=salt)
                here, expected = _timed(local, batch.ids, new=batch.new)
                there, found = _timed(engine, batch.ids, new=batch.new)
                took.append(there)
                share = agreement(found, expected)
                report.details.setdefault("measured", {})[f"{name}, {salt} vLLM"] = {
                    "rows": len(found),
                    "seconds here": here,
                    "seconds there": there,
                    "agreement": share,
                }
                report.add(f"{name}: speed of {salt} vLLM beside the engine here", [here / there], "x")
            report.add(f"{name}: speed of 2 vLLM beside 1", [took[0] / took[1]], "x")


def _timed(engine: Engine, ids: Sequence[Sequence[int]], *, new: int) -> tuple[float, list[list[int]]]:
    """Seconds of a greedy batch, and the ids that were written."""
    began = time.perf_counter()
    found = engine.generate([Prompted(one) for one in ids], Sampling(max_new_tokens=new), adapter="default")
    return time.perf_counter() - began, [one.ids for one in found]


def _servers(folder: Path, lm: LanguageModel, options: argparse.Namespace, running: ExitStack) -> list[str]:
    """Two servers with one thread each, each with its own cache."""
    python = options.python or str(interpreter(VLLM))
    variables = {
        **vllm_environment(1, kv_gib=2),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # not both on the first core
        "OMP_NUM_THREADS": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    words = ["--model", lm.source, "--served-model-name", "base", "--dtype", "float32", "--enable-lora"]
    words += ["--max-lora-rank", "8", "--max-loras", "2", "--max-num-seqs", "64", "--max-model-len", "4096"]
    words += ["--enforce-eager"] * options.eager
    started = []
    for number in (1, 2):
        server = Process(python, words, variables, folder / f"{number}.log")
        running.callback(server.end)
        server.wait(1800)  # one after the other: the first fills caches on disk
        started.append(server.url)
    return started


class _Latency:
    seconds = 0.0


_LATENCY = _Latency()


@contextmanager
def stand_ins(own: Probe, base: Probe, count: int) -> Iterator[list[str]]:
    """Servers with the protocol that cotune uses, which answer a completion after a fixed time, one at a time.

    Args:
        own, base: what they answer on the probe.
    """
    made = [_StandIn(own, base) for _ in range(count)]
    for server in made:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield [f"http://127.0.0.1:{server.server_port}" for server in made]
    for server in made:
        server.shutdown()
        server.server_close()


class _StandIn(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, own: Probe, base: Probe) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.own, self.base, self.alone = own, base, threading.Lock()

    def completed(self, body: dict[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = {"token_ids": [_TOKEN], "prompt_token_ids": body["prompt"]}
        if "prompt_logprobs" in body:
            known = self.base if body["model"] == "base" else self.own
            written = [float(known.steps[i, token]) for i, token in enumerate(known.written)]
            read = [{str(token): {"logprob": float(p)}} for token, p in zip(known.ids[1:], known.read, strict=True)]
            choice = {"token_ids": list(known.written), "prompt_token_ids": body["prompt"]}
            choice |= {"logprobs": {"token_logprobs": written}, "prompt_logprobs": [None, *read]}
        else:
            with self.alone:
                time.sleep(_LATENCY.seconds)
        return {"model": body["model"], "choices": [choice]}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _StandIn

    def do_GET(self) -> None:
        models = {"data": [{"id": "base", "parent": None, "max_model_len": 4096}]}
        self._send(models if self.path == "/v1/models" else {"version": "stand-in"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self._send(self.server.completed(body) if self.path == "/v1/completions" else {})

    def _send(self, said: dict[str, Any]) -> None:
        content = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser("benchmarks.served", description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--parts", nargs="+", choices=("stand-ins", "vllm"), default=["stand-ins", "vllm"])
    made.add_argument("--rows", type=int, default=32, help="completions for the stand-ins")
    made.add_argument("--latency", type=float, default=0.5, help="seconds a request of a stand-in")
    made.add_argument("--jobs", nargs="+", default=["main", "short", "two stages"], choices=list(JOBS))
    made.add_argument("--prompts", type=int, default=16, help="most prompts a job")
    made.add_argument("--python", default="", help="of an environment with vllm-cpu; the pinned one without it")
    made.add_argument("--urls", nargs=2, default=[], help="two servers of the embedded LM that run already")
    made.add_argument(
        "--eager", action="store_true", help="servers that compile nothing: they start sooner, run slower"
    )
    made.add_argument("--output", default=str(RESULTS / "served.json"))
    return made.parse_args(arguments)


if __name__ == "__main__":
    main()
