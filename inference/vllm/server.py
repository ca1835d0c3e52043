"""One vLLM server over HTTP: requests that are sent again, the adapters it holds, and the proof that they answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from cotune.inference.vllm.probe import Probe, disagreement, reading_of, request
from cotune.programs.lm import LMUnavailableError
from cotune.storage.served_adapter import left_behind

_TRIES = 4
"""Of one request, before the server counts as gone for now."""
_FIRST_WAIT = 0.2
"""Seconds before the second try; they double."""
_AGAIN = (408, 425, 429)
_LOADS, _UNLOADS = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
_KEPT = 2
"""Adapters that stay loaded: the one that is used and the one before."""

GREEDY = {"temperature": 0.0, "top_p": 1.0}
_PLAIN = {
    # All of them, or a server fills in what the model's generation_config.json says.
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "return_token_ids": True,
}


class VLLMError(LMUnavailableError):
    """No vLLM server answers, none completes a request, or one answers by other weights than those that are trained.
    Nothing of the wave that was under way is kept; completions that were stored before are."""


class ServerLostError(Exception):
    """A server does not answer at present, for this reason."""


class UnansweredError(Exception):
    """A server answers a request with an error each time it is tried, for this reason."""


class RefusedError(Exception):
    """A server will not do what it is asked, however often: its status and what it says."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"status {status}, {said}")
        self.status, self.said = status, said


@dataclass(frozen=True)
class About:
    """What a server says of itself: the base model's name there, its window in tokens (0 if it does not say), and the
    version of vLLM."""

    model: str
    window: int
    version: str


@dataclass(frozen=True)
class Serving:
    """Weights to be answered by.

    Attributes:
        name: of the adapter at the servers, or the base model's.
        folder: of the adapter; None for the base alone.
        probes: what each of the weights that a server may hold says in this process, by name, this one's among them.
        tolerance: of the probe, in nats.
    """

    name: str
    folder: Path | None
    probes: Mapping[str, Probe]
    tolerance: float


@dataclass(frozen=True)
class Written:
    """Ids that a server wrote, and the log-probability of each, where that was asked for."""

    ids: Sequence[int]
    log_probs: Sequence[float] = ()


@dataclass(eq=False)
class Server:
    """A vLLM server.

    Attributes:
        url: of the server, without /v1.
        lost: why it does not answer at present; "" while it does.
        proven: names of weights that it has proven to answer by since it was last met, those used last at the end.
        about: what it says of itself, once it has been met.
        sleeps: it is to sleep while weights are trained.
        revive: starts it again where it has ended, if this process is to.
    """

    url: str
    http: httpx2.AsyncClient
    sleeps: bool = False
    revive: Callable[[], None] = lambda: None
    lost: str = ""
    proven: list[str] = field(default_factory=list)
    about: About | None = None
    _normalises: bool = False
    _asleep: bool = False

    async def meet(self, model: str) -> About:
        """Asks what it is, and wakes it. Whatever it had proven, it has to prove again. Adapters that processes left
        there which have ended are unloaded.

        Args:
            model: name of the base there; "" for the only one.

        Raises:
            VLLMError: it has no such model, or is no vLLM.
        """
        self.lost, self.proven, self._normalises = "", [], False
        try:
            listed = (await self.ask("/v1/models"))["data"]
            version = str((await self.ask("/version"))["version"])
        except (RefusedError, KeyError, TypeError) as error:
            raise VLLMError(
                f"{self.url} is not a vLLM server ({error!r}): it must answer /v1/models and /version."
            ) from None
        bases = {one["id"]: one for one in listed if not one.get("parent")}
        if (model not in bases) if model else (len(bases) != 1):
            raise VLLMError(
                f'{self.url} serves {", ".join(bases) or "no model"}, not "{model}". Set '
                "model.engine.init_args.model to a model that it serves."
            )
        name = model or next(iter(bases))
        found = About(name, int(bases[name].get("max_model_len") or 0), version)
        if self.about not in (None, found):
            raise VLLMError(f"{self.url} is now a different server: {self.about} before, {found} now.")
        self.about = found
        await self._wake()
        for old in filter(left_behind, (one["id"] for one in listed)):
            await self._unload(old)
        return found

    async def sleep(self) -> None:
        """Has it give its memory back until it is next asked for something."""
        if self.sleeps and not (self._asleep or self.lost):
            with contextlib.suppress(ServerLostError):
                await self._of_sleep("/sleep?level=1", {})
                self._asleep = True

    async def _wake(self) -> None:
        """Wakes it, whoever had put it to sleep. It has to prove anew what it answers by."""
        if not self.sleeps:
            return
        if (await self._of_sleep("/is_sleeping")).get("is_sleeping"):
            await self._of_sleep("/wake_up", {})
        self._asleep, self.proven = False, []

    async def _of_sleep(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What it answers in matters of sleep.

        Raises:
            VLLMError: it knows none.
        """
        try:
            return dict(await self.ask(path, body))
        except (RefusedError, TypeError, ValueError) as error:
            raise VLLMError(
                f"{self.url} cannot sleep ({error}). Start it with --enable-sleep-mode and the variable "
                "VLLM_SERVER_DEV_MODE=1, or leave model.engine.init_args.sleep out."
            ) from None

    async def bring(self, serving: Serving) -> None:
        """Has it load the weights unless it holds them, and proves that it answers by them.

        Raises:
            VLLMError: it does not take them, or answers by others.
            ServerLostError: it has gone.
        """
        if self._asleep:
            await self._wake()
        if serving.name in self.proven:
            return
        if serving.folder is not None:
            await self._load(serving.name, serving.folder)
        await self.prove(serving)
        self.proven.append(serving.name)
        adapters = [name for name in self.proven if self.about is None or name != self.about.model]
        for old in adapters[:-_KEPT]:
            self.proven.remove(old)
            await self._unload(old)

    async def prove(self, serving: Serving) -> None:
        """Asks the probe.

        Raises:
            VLLMError: it answers by other weights than those in this process. Says by which.
            ServerLostError: it has gone.
        """
        probe = serving.probes[serving.name]
        body = {"model": serving.name, **GREEDY, **_PLAIN, **request(probe.ids)}
        try:
            said = await self.ask("/v1/completions", body)
            reading = reading_of(said["choices"][0])
            wrong = disagreement(reading, serving.name, serving.probes, serving.tolerance)
        except (RefusedError, KeyError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, RefusedError):
                self._check_forgotten(serving, error)
            wrong = f"it gives no log-probabilities ({error!r})"
        if wrong:
            raise VLLMError(
                f'{self.url} does not answer with the weights of this process. Asked for "{serving.name}" on the '
                f"probe, {wrong}. Check that it serves the same base in the same precision (--dtype, no quantization); "
                "model.engine.init_args.tolerance sets how far rounding may differ."
            )

    async def check_log_probs(self, serving: Serving) -> None:
        """Refuses a server whose log-probabilities are not among the allowed tokens, at the sampling's temperature.

        Raises:
            VLLMError, ServerLostError
        """
        if self._normalises:
            return
        one = {"prompt": [0], "max_tokens": 1, "logprobs": 0, "allowed_token_ids": [0]}
        try:
            written = await self.complete({**GREEDY, **one}, serving)
        except UnansweredError as error:
            raise self._lose(str(error)) from None
        if abs(written.log_probs[0]) > 0.01:
            raise VLLMError(
                f"{self.url} reports log-probabilities without the temperature and the field's constraint. "
                "Start it with --logprobs-mode processed_logprobs."
            )
        self._normalises = True

    async def complete(self, body: Mapping[str, Any], serving: Serving) -> Written:
        """One completion by these weights.

        Raises:
            VLLMError: it gives no ids, answers as another model, or refuses.
            UnansweredError: it answers each try with an error. It is not lost: the next probe tells whether it works.
            ServerLostError: it has gone, or has been restarted and lost the adapter.
        """
        asked = {"model": serving.name, **_PLAIN, **body}
        try:
            said = await self._tried("/v1/completions", asked)
        except RefusedError as error:
            self._check_forgotten(serving, error)
            raise VLLMError(f'{self.url} refuses a request to "{serving.name}": {error}.') from None
        if (written := written_of(said, asked)) is not None:
            return written
        raise VLLMError(
            f'{self.url} was asked for token ids from "{serving.name}" and answered {str(said)[:200]}: no ids, those '
            "of another prompt, or another model. cotune needs vLLM 0.22 or newer, and no proxy that changes requests."
        )

    def _check_forgotten(self, serving: Serving, error: RefusedError) -> None:
        """Counts a server that does not know the adapter any more as lost, so that it is met anew."""
        if serving.folder is not None and (error.status == 404 or serving.name in error.said):
            raise self._lose(f"it has lost the adapter ({error})") from None

    async def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON that answers a POST, or a GET where there is no body; tried a few times.

        Raises:
            RefusedError: no other try will change the answer.
            ServerLostError: it does not answer; `lost` says so from now on.
        """
        try:
            return await self._tried(path, body)
        except UnansweredError as error:
            raise self._lose(str(error)) from None

    def _lose(self, why: str) -> ServerLostError:
        """Counts the server as lost; the error to raise."""
        self.lost, self.proven = why, []
        return ServerLostError(why)

    async def _tried(self, path: str, body: Mapping[str, Any] | None) -> Any:
        """As `ask`; raises UnansweredError where the last try was answered with an error."""
        for tries in range(_TRIES):
            answered = False
            try:
                response = await self.http.request("GET" if body is None else "POST", self.url + path, json=body)
                if response.status_code == 200:
                    return {} if path in (_LOADS, _UNLOADS) else response.json()
                said = _message(response)
                if (response.status_code < 500 and response.status_code not in _AGAIN) or path == _LOADS:
                    raise RefusedError(response.status_code, said)
                fault, answered = f"status {response.status_code}, {said}", True
            except (httpx2.HTTPError, ValueError) as error:
                fault = f"{type(error).__name__}: {error}".rstrip(": ")
                tries += _TRIES * isinstance(error, httpx2.ReadTimeout)  # a try takes long enough
            if self.lost or tries >= _TRIES - 1:
                break
            await asyncio.sleep(_FIRST_WAIT * 2**tries)
        if answered and not self.lost:
            raise UnansweredError(fault)
        raise self._lose(fault)

    async def _unload(self, name: str) -> None:
        with contextlib.suppress(RefusedError):  # it has forgotten it by itself
            await self.ask(_UNLOADS, {"lora_name": name})

    async def _load(self, name: str, folder: Path) -> None:
        try:
            await self.ask(_LOADS, {"lora_name": name, "lora_path": str(folder)})
        except RefusedError as error:
            if "already been loaded" in error.said:  # by a run that was killed; the probe tells what it is
                return
            fixes = {
                "greater than max_lora_rank": "start it with a higher --max-lora-rank, or lower model.lm.lora.r",
                "No adapter found": "it cannot read that folder: model.engine.init_args.adapters is to be one that "
                "both machines see",
                "Not Found": "start it with --enable-lora and the variable VLLM_ALLOW_RUNTIME_LORA_UPDATING=True",
                "not enabled": "start it with --enable-lora",
            }
            fix = next((fix for text, fix in fixes.items() if text in error.said), "see the server's log")
            raise VLLMError(f"{self.url} does not load the adapter in {folder}: {error}. What to do: {fix}.") from None


def written_of(said: Any, asked: Mapping[str, Any]) -> Written | None:
    """What was written; None where the answer holds no ids, or is not an answer to this."""
    try:
        (choice,) = said["choices"]
        ids, read = choice["token_ids"], choice["prompt_token_ids"]
        log_probs = choice["logprobs"]["token_logprobs"] if "logprobs" in asked else []
    except (KeyError, TypeError, ValueError):
        return None
    listed = isinstance(ids, list) and bool(ids) and all(type(one) is int for one in ids)
    right = listed and read == asked["prompt"] and said.get("model") == asked["model"]
    whole = "logprobs" not in asked or len(log_probs) == len(ids)
    return Written(ids, log_probs) if right and whole else None


def _message(response: httpx2.Response) -> str:
    """What an error says, in one line."""
    try:
        said = response.json()
    except ValueError:
        return " ".join(response.text.split())[:300]
    error = said.get("error", said) if isinstance(said, dict) else said
    text = (error.get("message") or error.get("detail") or error) if isinstance(error, dict) else error
    return " ".join(str(text).split())[:300]
