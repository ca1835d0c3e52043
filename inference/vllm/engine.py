"""VLLMServer: completions by one or several vLLM servers, which hold the adapter that is trained here."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import weakref
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from cotune.errors import BadValueError
from cotune.inference.engine import Engine, Generated, Prompted, Weights
from cotune.inference.fields import Plan
from cotune.inference.local.prefixes import waves_by_prefix
from cotune.inference.vllm.pool import Pool
from cotune.inference.vllm.probe import probe
from cotune.inference.vllm.process import Process
from cotune.inference.vllm.row import Row
from cotune.inference.vllm.server import Serving, VLLMError
from cotune.programs.layout import Layout
from cotune.programs.lm import Sampling
from cotune.storage.served_adapter import left_behind, max_lora_rank, served_name, vllm_refusals

_START = 1800.0
"""Seconds for a server that is started here to answer: it may have weights to fetch."""
_KEPT = 3
"""Adapters whose folders are kept: the one that is used, the one before, and one that servers have been told to unload,
for one of them may still be at it."""
_LOGS = 8
"""Logs of servers started here that are kept, those written last; an error names one."""


class VLLMServer(Engine):
    """Completions by `vllm serve` processes, on this machine or others. The base model there is the one trained here.

    Each weight step's adapter goes to them under a name of its own, and every server has to prove, by a fixed text,
    that it answers as the LM in this process does: before it is used, and after each wave before anything of that is
    kept. Prompts go there as ids and ids come back; fixed texts of a form are put there by this process.

    Args:
        urls: of the servers; each is one engine (with data parallelism, every replica needs an address of its own).
        python: of an environment with vLLM. Then a server is started here, on a free port, and ended with this process.
        options: of the command line of that server, beside those that cotune sets.
        sleep: the servers give their memory back while weights are trained (vLLM's --enable-sleep-mode), so that one
            GPU serves both by turns.
        model: name of the base model there; "" for the only one.
        adapters: folder for adapters, which servers on other machines must see under the same path.
        concurrency: requests under way at once, for each server.
        timeout: seconds that one request may take.
        patience: seconds to wait for a server while none answers, or while those that do complete nothing more.
        tolerance: how far, in nats (root mean square), log-probabilities may be off on the probe.
        key_variable: name of the environment variable that holds the servers' key, if they have one.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        urls: Sequence[str] = (),
        python: str = "",
        options: Sequence[str] = (),
        sleep: bool = False,
        model: str = "",
        adapters: str = "~/.cache/cotune/adapters",
        concurrency: int = 64,
        timeout: float = 600.0,
        patience: float = 300.0,
        tolerance: float = 0.1,
        key_variable: str = "VLLM_API_KEY",
    ) -> None:
        self.urls = [_checked(url) for url in ([urls] if isinstance(urls, str) else urls)]
        if bool(python) == bool(self.urls) or len(set(self.urls)) < len(self.urls):
            raise BadValueError(
                f"urls is {self.urls}: give the addresses of one or more servers, none twice, or set python to that of "
                "an environment with vLLM to start one."
            )
        self.python, self.options, self.sleep = python, list(options), sleep
        for name, value in (("concurrency", concurrency), ("timeout", timeout), ("tolerance", tolerance)):
            if not value > 0:
                raise BadValueError(f"{name} {value} of the vLLM servers must be above 0.")
        self.model, self.adapters, self.key_variable = model, adapters, key_variable
        self.concurrency, self.timeout = concurrency, timeout
        self.patience, self.tolerance = patience, tolerance
        self._pool: Pool | None = None
        self._process: Process | None = None
        self._served: dict[str, Serving] = {}
        self._plans: dict[Layout, Plan] = {}
        self._folders: list[Path] = []
        self._named: tuple[Hashable, str] = (None, "")
        self._resting = False
        self._key = secrets.token_hex(16) if python else ""

    def start(self, weights: Weights) -> None:
        """Meets the servers and has them load and prove the adapter, so that what they refuse is known before the run.

        Raises:
            VLLMError: none answers, or one does not do what is needed.
        """
        self._weights, self._plans, self._served = weights, {}, {}
        self._named = (None, "")
        refusals = vllm_refusals(_adapter_config(weights))
        if refusals:
            raise VLLMError(
                f"vLLM cannot serve this adapter: {'; '.join(refusals)}. Use a plain LoRA (model.lm.lora), or "
                "leave model.engine out."
            )
        if self.python:
            self._launch(weights)
        pool = self._connected()
        self._about = pool.run(pool.meet(self.model))
        self._window = min(weights.window, self._about.window or weights.window)
        self._width = int(weights.model.config.get_text_config().vocab_size)
        for old in Path(self.adapters).expanduser().glob("cotune-*"):
            if left_behind(old.name):
                shutil.rmtree(old, ignore_errors=True)
        self._serving("")  # so that a server which answers by the base is recognised
        pool.run(pool.ready(self._serving("default"), log_probs=False, patience=0.0))

    def generate(self, prompts: Sequence[Prompted], sampling: Sampling, *, adapter: str) -> list[Generated]:
        """As `Engine.generate`.

        Raises:
            VLLMError: no server answers, none completes one of the prompts, or one answers by other weights.
        """
        if sampling.log_probs and sampling.top_p < 1:
            raise BadValueError(f"vLLM gives log-probabilities after top-p, so top_p must be 1, not {sampling.top_p}.")
        results = [Generated([], "", "too_long")] * len(prompts)
        rows = []
        for place, prompt in enumerate(prompts):
            plan, room = self._plan(prompt.layout), self._window - len(prompt.ids)
            if room >= plan.least:
                rows.append(Row(place, prompt, plan, sampling, room=room, width=self._width))
        if self._resting:
            torch.cuda.empty_cache()  # for the servers, which wake up
        self._resting, pool = False, self._connected()
        pool.run(pool.wave(rows, self._serving(adapter), log_probs=sampling.log_probs, patience=self.patience))
        for row in rows:
            results[row.place] = row.result
        return results

    def rest(self) -> None:
        """Where the servers are to sleep, they do until the next prompts."""
        if self.sleep and not self._resting:
            pool = self._connected()
            pool.run(pool.sleep())
            self._resting = True

    def waves(self, prompts: Sequence[Prompted]) -> list[list[int]]:
        """Prompts with much in common stand together, and so come to the same server."""
        return waves_by_prefix(prompts)

    def identity(self) -> Mapping[str, Any]:
        """Which servers there are, and how many, is not in it."""
        about = self._about
        return {**super().identity(), "served": about.model, "vllm": about.version, "window": self._window}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None, "_process": None}  # a copy connects itself

    def close(self) -> None:
        """Ends the connections, and the server if one was started here; both come again where they are needed."""
        if self._pool is not None:
            self._pool.end()
        if self._process is not None:
            self._process.end()
        self._pool = self._process = None

    def _connected(self) -> Pool:
        if self._pool is None:
            revive = {self._process.url: self._process.start} if self._process else {}
            self._pool = Pool(
                self.urls,
                os.environ.get(self.key_variable, "") or self._key,
                timeout=self.timeout,
                concurrency=self.concurrency,
                sleeps=self.sleep,
                revive=revive,
            )
            weakref.finalize(self, self._pool.end)
        return self._pool

    def _launch(self, weights: Weights) -> None:
        """Starts the server of these weights, and waits until it answers."""
        self.close()
        folder = Path(self.adapters).expanduser().resolve()
        fixed = {
            "model": weights.source,
            "served-model-name": self.model or "base",
            "dtype": str(weights.model.dtype).removeprefix("torch."),
            "max-lora-rank": str(max_lora_rank(_adapter_config(weights))),
            "max-loras": "2",
            "logprobs-mode": "processed_logprobs",
        }
        words = [word for name, value in fixed.items() for word in (f"--{name}", value)]
        words += ["--enable-lora", *["--enable-sleep-mode"] * self.sleep, *self.options]
        variables = {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_API_KEY": os.environ.get(self.key_variable, "") or self._key,
            "VLLM_NO_USAGE_STATS": "1",
            **({"VLLM_SERVER_DEV_MODE": "1"} if self.sleep else {}),
        }
        logs = sorted(folder.glob("vllm-*.log"), key=lambda log: log.stat().st_mtime)
        for old in logs[: -_LOGS + 1]:
            old.unlink(missing_ok=True)
        self._process = Process(self.python, words, variables, folder / f"vllm-{os.getpid()}.log")
        weakref.finalize(self, self._process.end)
        self.urls = [self._process.url]
        print(f"starting vLLM, which takes a minute or more; its log is {self._process.log}", flush=True)
        self._process.wait(_START)

    def _plan(self, layout: Layout) -> Plan:
        if layout not in self._plans:
            self._plans[layout] = Plan(layout, self._weights.codec)
        return self._plans[layout]

    def _serving(self, adapter: str) -> Serving:
        """The weights as they are now, saved where servers find them."""
        weights, folder, name = self._weights, None, self._about.model
        if adapter:
            name = self._name()
            folder = Path(self.adapters).expanduser().resolve() / name
        known = self._served.pop(name, None)
        probes = {name: known.probes[name] if known else probe(weights, adapter)}
        probes |= {other: serving.probes[other] for other, serving in self._served.items()}
        self._served[name] = Serving(name, folder, probes, self.tolerance)  # behind all others: the latest
        if folder is not None:
            self._save(folder)
        return self._served[name]

    def _name(self) -> str:
        """Of the adapter as it is now: by its tensors and settings, which are looked at when they have changed."""
        version = self._weights.version
        if self._named[0] != version:
            settings = json.dumps(_adapter_config(self._weights), sort_keys=True, default=sorted)
            told_apart = hashlib.sha256(f"{self._weights.fingerprint()}|{settings}".encode()).hexdigest()
            self._named = (version, served_name(told_apart))
        return self._named[1]

    def _save(self, folder: Path) -> None:
        """Writes the adapter, so that its folder is there whole or not at all; removes what is of no use any more."""
        if not folder.is_dir():
            part = folder.with_name(f".{folder.name}.{os.getpid()}")
            try:
                self._weights.save_adapter(part)
                part.rename(folder)
            except OSError as error:
                raise VLLMError(f"the adapter cannot be written to {folder} ({error.strerror}).") from error
            finally:
                shutil.rmtree(part, ignore_errors=True)
        self._folders = [*(old for old in self._folders if old != folder), folder]
        for old in self._folders[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
            self._served.pop(old.name, None)
        self._folders = self._folders[-_KEPT:]


def _adapter_config(weights: Weights) -> dict[str, Any]:
    """As adapter_config.json has it."""
    (name, *_) = weights.model.active_adapters
    return dict(weights.model.peft_config[name].to_dict())


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password or parts.query:
        raise BadValueError(
            f'"{parts.scheme}://{parts.hostname}" is not the address of a vLLM server, such as '
            '"http://127.0.0.1:8000"; put a key into the environment variable that key_variable names.'
        )
    return url.rstrip("/").removesuffix("/v1")
