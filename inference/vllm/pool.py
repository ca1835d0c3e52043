"""Servers of one model as one: rows go to all of them, and what counts is what a server has proven afterwards."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import httpx2
from cotune.inference.loop_thread import LoopThread
from cotune.inference.vllm.row import Row
from cotune.inference.vllm.server import About, Server, ServerLostError, Serving, UnansweredError, VLLMError
from cotune.programs.lm import completed

_T = TypeVar("_T")
_LOOKS = 2.0
"""Seconds between two looks for a server, while none answers."""
_ROUNDS = 3
"""In a row in which no further completion has ended, before a wave may be given up."""


class Pool:
    """Servers, and the thread whose event loop asks them.

    Args:
        revive: address -> what starts that server again, of those that this process has started.
    """

    def __init__(
        self,
        urls: Sequence[str],
        key: str,
        *,
        timeout: float,
        concurrency: int,
        sleeps: bool = False,
        revive: Mapping[str, Callable[[], None]] = {},
    ) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        patience = httpx2.Timeout(timeout, connect=min(timeout, 10.0))
        encrypted = any(url.startswith("https:") for url in urls)  # else there are no certificates to read
        self.http = httpx2.AsyncClient(headers=headers, timeout=patience, limits=limits, verify=encrypted)
        self.servers = [Server(url, self.http, sleeps, revive.get(url, lambda: None)) for url in urls]
        self.concurrency = concurrency
        self._thread = LoopThread("vllm")
        self.loop = self._thread.loop

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Does it in the loop; where this is interrupted, so is the work."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        finally:
            future.cancel()

    def end(self) -> None:
        self._thread.end(self.http.aclose())

    async def meet(self, model: str) -> About:
        """Meets every server that answers; what they are, which is the same of all.

        Raises:
            VLLMError: none answers, or they differ.
        """
        self.model = model
        await _all(self._meet(server) for server in self.servers)
        found = {server.about: server.url for server in self.servers if server.about is not None}
        if not found:
            raise self._gone()
        if len(found) > 1:
            raise VLLMError(f"the vLLM servers differ: {'; '.join(f'{url} is {one}' for one, url in found.items())}.")
        for server in self.servers:
            if server.lost:
                print(f"{server.url} does not answer: {server.lost}. The other servers do its work until it does.")
        (about,) = found
        return about

    async def ready(self, serving: Serving, *, log_probs: bool, patience: float) -> list[Server]:
        """The servers that answer by these weights; waits where there are none.

        Raises:
            VLLMError: there is none in time, or one answers by other weights.
        """
        until, said = time.monotonic() + patience, False
        while True:
            await _all(self._prepare(server, serving, log_probs) for server in self.servers)
            live = [server for server in self.servers if not server.lost]
            if len({server.about for server in live}) > 1:
                raise VLLMError(f"the vLLM servers differ: {[server.about for server in live]}.")
            if live:
                return live
            if time.monotonic() >= until:
                raise self._gone()
            if not said:
                print(f"No vLLM server answers ({self.servers[0].lost}); waiting up to {patience:.0f} s for one.")
            said = True
            await asyncio.sleep(min(_LOOKS, max(0.0, until - time.monotonic())))

    async def wave(self, rows: Sequence[Row], serving: Serving, *, log_probs: bool, patience: float) -> None:
        """Completes the rows, in rounds. What a server wrote counts when it has proven afterwards whose weights it has.

        Raises:
            VLLMError: no server answers, or one answers by other weights; or, for `patience` and a few rounds, servers
                pass the probe and end no further row.
        """
        ended, vain, until = sum(row.ended for row in rows), 0, 0.0
        while todo := sorted((row for row in rows if not row.ended), key=lambda row: bool(row.fault)):
            servers = await self.ready(serving, log_probs=log_probs, patience=patience)
            turn = vain % len(servers)  # a row that one server has not answered begins with another
            servers = [*servers[turn:], *servers[:turn]]
            share = -(-len(todo) // len(servers))
            queues = {server: deque(todo[i * share : (i + 1) * share]) for i, server in enumerate(servers)}
            at_once = min(self.concurrency, len(todo))
            await _all(self._work(server, queues, serving) for _ in range(at_once) for server in servers)
            await _all(self._prove(server, serving) for server in servers)
            for row in todo:
                if any(server.lost for server in row.servers):
                    row.begin()
            before, ended = ended, sum(row.ended for row in rows)
            vain = vain + 1 if ended == before else 0
            if vain == 1:
                until = time.monotonic() + patience
            if vain > 1:
                await self._wait(rows, vain, until)

    async def _wait(self, rows: Sequence[Row], vain: int, until: float) -> None:
        """Waits before a further round, longer each time, after some in which nothing has ended.

        Raises:
            VLLMError: there were enough.
        """
        left = until - time.monotonic()
        lost = next((server.lost for server in self.servers if server.lost), "")
        todo = [row for row in rows if not row.ended]
        row = next((row for row in todo if row.fault), todo[0])
        fault = (row.fault or lost).rstrip(".")
        if vain >= _ROUNDS and left <= 0:
            raise VLLMError(
                f"{len(todo)} of {len(rows)} prompts are not completed, though a vLLM server passes the probe each "
                f"time: one of {len(row.prompt.ids)} tokens failed with {fault}. {_advice(fault)} What was completed "
                "before is in the store; the same command continues."
            )
        if vain == 2:
            print(f"No further completion has ended ({fault}); asking again for up to {max(0.0, left):.0f} s.")
        await asyncio.sleep(max(0.0, min(_LOOKS * 2 ** (vain - 2), left)))

    async def sleep(self) -> None:
        """Has the servers give their memory back until they are next asked."""
        await _all(server.sleep() for server in self.servers)

    async def _meet(self, server: Server) -> None:
        with suppress(ServerLostError):
            await server.meet(self.model)

    async def _prepare(self, server: Server, serving: Serving, log_probs: bool) -> None:
        with suppress(ServerLostError):
            if server.lost or server.about is None:
                server.revive()
                await server.meet(self.model)
            await server.bring(serving)
            if log_probs:
                await server.check_log_probs(serving)

    async def _prove(self, server: Server, serving: Serving) -> None:
        with suppress(ServerLostError):
            if not server.lost:
                await server.prove(serving)

    async def _work(self, server: Server, queues: Mapping[Server, deque[Row]], serving: Serving) -> None:
        """Completes rows of the server's own queue, and then of the longest, until there are none, one is not answered,
        or the server is lost."""
        while not server.lost and (row := _next(queues, server)) is not None:
            try:
                if any(other.lost for other in row.servers):
                    row.begin()
                while not row.ended:
                    body = row.request()
                    row.servers.add(server)
                    row.take(await server.complete(body, serving))
                completed()
            except UnansweredError as error:  # it may be the row's fault: the others go on, and it is last next time
                row.fault = str(error)
                return
            except ServerLostError as error:
                row.fault = str(error)
                queues[server].appendleft(row)

    def _gone(self) -> VLLMError:
        each = "; ".join(f"{server.url}: {server.lost}" for server in self.servers)
        return VLLMError(
            f"no vLLM server answers. {each}. Are they running, and are the addresses right? What was completed before "
            "is in the store; the same command continues."
        )


def _advice(fault: str) -> str:
    options = "model.engine.init_args"
    if fault.startswith("status 429"):
        return f"The server allows fewer requests than come: lower {options}.concurrency, or raise its limit."
    if fault.startswith("ReadTimeout"):
        return f"Raise {options}.timeout, or lower {options}.concurrency."
    return "Look into the server's log for what it says of that request; set it right, or leave that example out."


def _next(queues: Mapping[Server, deque[Row]], server: Server) -> Row | None:
    if queues[server]:
        return queues[server].popleft()
    longest = max(queues.values(), key=len)
    return longest.pop() if longest else None


async def _all(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Does all at once; where one fails, the others are ended."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
