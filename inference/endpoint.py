"""Endpoint: chat completions over HTTP, many at once, asked again until they are answered or cannot be."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import random
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from cotune.errors import BadValueError, MissingPackageError
from cotune.inference.loop_thread import LoopThread
from cotune.inference.try_error import TryError, answer_fault, connection_fault, status_fault
from cotune.programs.lm import LMUnavailableError, completed

HOSTED = "https://api.openai.com/v1"

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 8.0
"""Seconds before the second try; they double from try to try, up to the longest."""
_LONGEST_ORDER = 600.0
"""Seconds that a Retry-After may order. A longer one means that this run has no use of the endpoint today."""

_MAX_REFUSED = 8
"""Requests refused before any was answered: more would be refused too."""

_AGAIN = (408, 409, 425, 429)
_OPTIONAL = ("response_format", "seed", "stop", "top_p", "temperature", "max_tokens", "max_completion_tokens")
"""What a request can do without, and an endpoint may not know."""


class EndpointError(LMUnavailableError):
    """The endpoint does not answer, or will not: what, where and what to do. Answers that were stored are kept."""


@dataclass(frozen=True)
class Answer:
    """What an endpoint answered. Tokens and dollars are None where it did not say."""

    text: str
    finish: str
    model: str
    tokens_in: int | None
    tokens_out: int | None
    dollars: float | None


@dataclass(frozen=True)
class Refusal:
    """A request that will not be answered, however often it is sent, while others are."""

    why: str
    too_long: bool = False


class Endpoint:
    """A connection to the chat completions of one server. Its thread and client start at the first request.

    Args:
        url: of the API, up to and with its version ("http://127.0.0.1:8000/v1").
        model: named in messages only; requests name it themselves.
        key_variable: the environment variable that holds the key. Local servers need none.
        concurrency: requests under way at once.
        timeout: seconds for one try.
        tries: of one request, before the endpoint counts as gone.
        first_wait: seconds before the second try.

    Attributes:
        retries: requests that were sent again, so far.
        without: parameters that the endpoint has turned out not to take; they are left out.
        without_formats: response formats likewise, as JSON.

    Raises:
        ImportError: the openai client is not installed.
        ValueError: an option is out of its range, or the URL holds a secret.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        concurrency: int = 16,
        timeout: float = 120.0,
        tries: int = 6,
        first_wait: float = _FIRST_WAIT,
    ) -> None:
        _check_url(url)
        if not key_variable.isidentifier():
            raise BadValueError(
                "key_variable is not the name of an environment variable; a key itself is never an option."
            )
        for name, value in (("concurrency", concurrency), ("tries", tries), ("timeout", timeout)):
            if not value > 0 or (name != "timeout" and value != int(value)):
                raise BadValueError(f"{name} {value} of the endpoint must be above 0.")
        _client_library()
        self.url, self.model, self.key_variable = url.rstrip("/"), model, key_variable
        self.concurrency, self.timeout, self.tries, self.first_wait = concurrency, timeout, tries, first_wait
        self.retries = 0
        self.without: set[str] = set()
        self.without_formats: set[str] = set()
        self._live: _Live | None = None
        self._answered, self._refused, self._not_before = 0, 0, 0.0
        self._gone, self._known = False, False
        self._jitter = random.Random()  # seeded by the system: processes that were turned away together come back apart

    def answers(
        self, bodies: Sequence[Mapping[str, Any]], *, known: bool = False
    ) -> Iterator[list[tuple[int, Answer | Refusal]]]:
        """The answers with their places among the requests, as they come: each time, all that have come since.

        Args:
            known: it has answered such requests before, in an earlier process.

        Raises:
            EndpointError: after all that was under way has ended, and what was answered has been given.
        """
        arrived: queue.SimpleQueue[tuple[int, Answer | Refusal] | None] = queue.SimpleQueue()
        live, self._known = self._connected(), self._known or known
        work = asyncio.run_coroutine_threadsafe(self._all(live, bodies, arrived.put), live.loop)
        work.add_done_callback(lambda _: arrived.put(None))
        try:
            ended = False
            while not ended:
                come = [arrived.get()]
                while not arrived.empty():
                    come.append(arrived.get())
                ended = None in come
                there = [one for one in come if one is not None]
                completed(len(there))
                yield there
            work.result()
        finally:
            work.cancel()

    def clean(self, text: str) -> str:
        """The text in one line, without the key, and no longer than a message should be."""
        key = os.environ.get(self.key_variable, "")
        text = " ".join((text.replace(key, "***") if key else text).split())
        return text if len(text) <= 300 else text[:299] + "…"

    def close(self) -> None:
        """Ends the connection; the next request makes a new one."""
        if self._live is not None:
            self._live.end()
            self._live = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_live": None}  # a copy connects itself

    def _connected(self) -> _Live:
        if self._live is None:
            key = os.environ.get(self.key_variable, "")
            if not key and self.url == HOSTED:
                raise EndpointError(
                    f"{self.url} needs a key: set the environment variable {self.key_variable} to it, or give the "
                    "endpoint of a server that needs none."
                )
            self._live = _Live(self.url, key or "none", self.timeout, self.concurrency)
            weakref.finalize(self, self._live.end)
        return self._live

    async def _all(
        self, live: _Live, bodies: Sequence[Mapping[str, Any]], report: Callable[[tuple[int, Answer | Refusal]], None]
    ) -> None:
        """Asks everything. After a failure that concerns all, nothing new is begun, and what is under way may end."""
        self._gone, failures = False, []

        async def one(place: int) -> None:
            async with live.places:
                if not self._gone:
                    try:
                        report((place, await self._ask(live, bodies[place])))
                    except EndpointError as error:
                        self._gone = True
                        failures.append(error)

        await asyncio.gather(*(one(place) for place in range(len(bodies))))
        if failures:
            raise failures[0]

    async def _ask(self, live: _Live, body: Mapping[str, Any]) -> Answer | Refusal:
        """One request, tried until it is answered, refused, or the endpoint is given up."""
        off: set[str] = set()  # what this request does without
        answered, tries, alone = self._answered, 0, False
        while True:
            await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
            sent = self._sent(body, off)
            try:
                answer = await self._try(live, sent)
            except TryError as error:
                fault = error
            else:
                self._leave_out(off, body)
                return answer
            if fault.status in (400, 413, 422):
                if blamed := next((name for name in _OPTIONAL if name in sent and fault.blames(name)), ""):
                    off.add(blamed)
                elif "response_format" in sent and not fault.too_long:
                    off.add("response_format")  # servers refuse a schema in many words
                else:
                    return self._refusal(fault)
                continue
            if fault.may_be_content and (self._worked or fault.flagged) and await self._works(live, sent, answered):
                return self._refusal(fault)
            tries += 1
            self._check(fault)
            if tries >= self.tries or self._gone:
                others = self._worked and fault.status != 429 and not self._gone
                if not others or not await self._works(live, sent, answered):
                    raise self._error(f"{fault}, after {tries} tries", fault.way_out(self.concurrency))
                if alone:  # others were answered before its last try and after it: it is this request
                    return Refusal(self.clean(f"{fault} ({tries} tries)"))
                alone = True
            answered = self._answered
            self.retries += 1
            await self._wait(fault, tries)

    async def _try(self, live: _Live, sent: Mapping[str, Any]) -> Answer:
        """Sends it once; raises TryError."""
        try:
            answer = await asyncio.wait_for(live.send(sent), self.timeout)
        except asyncio.TimeoutError:
            look_at = (
                "is it running, and is the address right? A slow one needs a higher timeout or a lower concurrency."
            )
            raise TryError(f"no answer within {self.timeout:g} s", look_at=look_at) from None
        self._answered += 1
        return answer

    async def _works(self, live: _Live, sent: Mapping[str, Any], answered: int) -> bool:
        """Whether others were answered since `answered` were; if none was, whether a greeting is answered now."""
        if self._answered > answered:
            return True
        self.retries += 1
        greeting = {**sent, "messages": [{"role": "user", "content": "Say hello."}]}
        try:
            await self._try(live, self._sent(greeting, {"response_format"}))
        except TryError:
            return False
        return True

    @property
    def _worked(self) -> bool:
        return self._answered > 0 or self._known

    def _refusal(self, fault: TryError) -> Refusal:
        self._refused += not fault.too_long
        if self._refused >= _MAX_REFUSED and not self._worked:
            raise self._error(f"it refuses every request, {fault}", "what this server takes, and the LM's options.")
        return Refusal(self.clean(str(fault)), fault.too_long)

    def _sent(self, body: Mapping[str, Any], off: set[str]) -> dict[str, Any]:
        """The request without what the endpoint does not take, and without what it is to do without."""
        without = self.without | off
        if json.dumps(body.get("response_format")) in self.without_formats:
            without |= {"response_format"}
        sent = {name: value for name, value in body.items() if name not in without}
        if "max_tokens" in body and "max_tokens" in without and "max_completion_tokens" not in without:
            sent["max_completion_tokens"] = body["max_tokens"]
        return sent

    def _check(self, fault: TryError) -> None:
        """Raises for what no further try will change."""
        if fault.status == 401 or fault.may_be_content:
            where = "is it the right one" if os.environ.get(self.key_variable) else "it is not set"
            raise self._error(
                str(fault), f"the key is read from the environment variable {self.key_variable}: {where}?"
            )
        if fault.spent:
            raise self._error(str(fault), "the account is out of credit; add some and start the same command again.")
        if fault.status == 404:
            raise self._error(
                str(fault), "does the address end with the API's version (/v1), and does the server have that model?"
            )
        if fault.wait > _LONGEST_ORDER:
            raise self._error(f"{fault}; it asks to wait {fault.wait:.0f} s", "start the same command again later.")
        if fault.status and fault.status not in _AGAIN and fault.status < 500:
            raise self._error(str(fault), "is it an endpoint with chat completions?")

    async def _wait(self, fault: TryError, tries: int) -> None:
        """Waits before the next try, longer each time; what the server orders holds for all requests."""
        if fault.wait:
            self._not_before = max(self._not_before, time.monotonic() + fault.wait)
        wait = min(self.first_wait * 2 ** (tries - 1), _LONGEST_WAIT)
        await asyncio.sleep(fault.wait + wait * self._jitter.uniform(0.5, 1.0))

    def _leave_out(self, off: set[str], body: Mapping[str, Any]) -> None:
        """Notes what a request was answered without; a response format is one of many, each with its own schema."""
        for name in sorted(off - self.without):
            instead = "max_completion_tokens is sent instead" if name == "max_tokens" else "it is left out"
            if name == "response_format":
                form = json.dumps(body[name])
                if form in self.without_formats:
                    continue
                self.without_formats.add(form)
                instead += f" where this schema is asked for: {form}"
            else:
                self.without.add(name)
            print(self.clean(f'{self.url}: "{self.model}" does not take {name}; {instead}.'))

    def _error(self, what: str, way_out: str) -> EndpointError:
        return EndpointError(
            self.clean(f'{self.url} does not answer for model "{self.model}": {what}.')
            + f" What to look at: {way_out} What was answered before is in the store, if there is one."
        )


class _Live:
    """The client and the thread whose event loop it runs in."""

    def __init__(self, url: str, key: str, timeout: float, concurrency: int) -> None:
        self.openai = _client_library()
        self.client = self.openai.AsyncOpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=0)
        self.places = asyncio.Semaphore(concurrency)
        self._thread = LoopThread("endpoint")
        self.loop = self._thread.loop

    async def send(self, body: Mapping[str, Any]) -> Answer:
        """One try; raises TryError."""
        rest = {name: value for name, value in body.items() if name not in ("model", "messages")}
        try:
            raw = await self.client.chat.completions.with_raw_response.create(
                model=body["model"], messages=body["messages"], extra_body=rest
            )
        except self.openai.APIStatusError as error:
            raise status_fault(error) from None
        except self.openai.APIConnectionError as error:
            raise connection_fault(error) from None
        return _answer(raw.content)

    def end(self) -> None:
        self._thread.end(self.client.close())


def _answer(content: bytes) -> Answer:
    """Reads a response's body; a body that holds no completion is a fault like a broken connection."""
    said: Any = None
    try:
        said = json.loads(content)
        choice = said["choices"][0]
        message = choice["message"]
        text = message.get("content") or ""
        if not isinstance(text, str):
            raise TypeError("its content is no text")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise answer_fault(content, said, error) from None
    usage = said.get("usage") if isinstance(said.get("usage"), dict) else {}
    cost = usage.get("cost")
    dollars = float(cost) if isinstance(cost, (int, float)) and cost >= 0 else None
    return Answer(
        text,
        finish=str(choice.get("finish_reason")),
        model=str(said.get("model") or ""),
        tokens_in=_count(usage.get("prompt_tokens")),
        tokens_out=_count(usage.get("completion_tokens")),
        dollars=dollars,
    )


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        raise BadValueError(
            f"the endpoint's URL at {parts.hostname} holds a user, a password or a query; put a key into the "
            "environment variable that key_variable names."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadValueError(f'endpoint "{url}" is no http or https URL; e.g. "http://127.0.0.1:8000/v1".')


def _client_library() -> Any:
    try:
        import openai
    except ImportError as error:
        raise MissingPackageError('OpenAILM needs the openai client: pip install "cotune[openai]".') from error
    return openai
