"""Fakes with real control flow: an LM that is a function, and programs that loop, branch, stop early and fail."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cotune.programs import (
    Call,
    Completion,
    Example,
    Field,
    Fixed,
    Lines,
    Program,
    Request,
    Runner,
    Sampling,
    Signature,
    Stage,
    exact_match,
)
from cotune.prompting import SearchTask

EOS = 256
"""The id after the 256 byte values, as FakeLM writes it."""


class FakeLM:
    """An LM whose completions are a function of the request; its tokens are the bytes of the text.

    It stops at stop strings, cuts at `max_new_tokens` and refuses prompts over its window, as a real one does.

    Args:
        answer: request -> the text it would write, or a whole Completion.
        window: longest prompt in tokens (bytes); None for any length.

    Attributes:
        batches: the requests of every `complete` call.
        samplings: its sampling, call by call.
    """

    def __init__(self, answer: Callable[[Request], str | Completion], window: int | None = None) -> None:
        self.answer, self.window = answer, window
        self.batches: list[list[Request]] = []
        self.samplings: list[Sampling] = []

    @property
    def requests(self) -> list[Request]:
        return [request for batch in self.batches for request in batch]

    @property
    def calls(self) -> int:
        """Completions asked for."""
        return len(self.requests)

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.batches.append(list(requests))
        self.samplings.append(sampling)
        return [self._complete(request, sampling) for request in requests]

    def _complete(self, request: Request, sampling: Sampling) -> Completion:
        prompt = tuple("\n".join(f"{m['role']}\n{m['content']}" for m in request.messages).encode())
        if self.window is not None and len(prompt) > self.window:
            return Completion("", prompt, (), "too_long")
        written = self.answer(request)
        if isinstance(written, Completion):
            return written
        stops = [stop for part in request.layout[-1:] if isinstance(part, Field) for stop in part.stops]
        marks = [part.text.strip() for part in request.layout if isinstance(part, Fixed)]
        last = max(written.find(marks[-1]), 0) if marks else 0  # stops end the last field, not those before it
        cut = min((at for stop in stops if (at := written.find(stop, last)) >= 0), default=-1)
        text = written if cut < 0 else written[:cut]
        ids = tuple(text.encode())
        if len(ids) > sampling.max_new_tokens:
            ids = ids[: sampling.max_new_tokens]
            return Completion(bytes(ids).decode(errors="ignore"), prompt, ids, "length")
        return Completion(text, prompt, ids, "stop") if cut >= 0 else Completion(text, prompt, (*ids, EOS), "eos")


def instruction(request: Request) -> str:
    """First line of the system message: the prompt's instruction, if it is one line."""
    return request.messages[0]["content"].splitlines()[0]


def asked(request: Request, name: str) -> str:
    """An input field of the call itself (not of a demo), if its value is one line."""
    lines = request.messages[-1]["content"].splitlines()
    return next(line.removeprefix(f"{name}: ") for line in lines if line.startswith(f"{name}: "))


def shown(request: Request) -> int:
    """How many demos the request shows."""
    return sum(message["role"] == "assistant" for message in request.messages)


def doubling(request: Request) -> str:
    """What a perfect LM answers to "number -> answer" when asked to double."""
    return str(2 * int(asked(request, "number")))


def runner(lm: Any, program: Program, **changes: Any) -> Runner:
    """A runner of the program on a fake, by exact match and greedily unless said otherwise."""
    return replace(Runner(program, lm, Lines(), exact_match, Sampling()), **changes)


def search_task(
    lm: Any, program: Program, *, train: Sequence[Example], dev: Sequence[Example], **changes: Any
) -> SearchTask:
    """A search task from zero-shot prompts; changes of the runner and of the task go by their names."""
    of_runner = {name: changes.pop(name) for name in tuple(changes) if name in ("metric", "sampling", "max_error_rate")}
    prompts = {"initial": program.initial_prompts(), "incumbent": program.initial_prompts(), **changes}
    return SearchTask(runner(lm, program, **of_runner), train=train, dev=dev, **prompts)


def doubles(*numbers: int) -> list[Example]:
    """Examples of doubling, each with its number as its id: `doubles(3)` asks 3 and wants 6."""
    return [Example.of({"number": n}, {"answer": str(2 * n)}, id=str(n)) for n in numbers]


class Loop(Program):
    """Calls one stage `times` times, each on the last answer."""

    double = Stage(Signature.parse("number -> answer", instruction="Double."))

    def __init__(self, times: int = 2) -> None:
        self.times = times

    def run(self, number: int) -> Generator[Call, Mapping[str, str], Mapping[str, Any]]:
        value: Any = number
        for _ in range(self.times):
            value = (yield self.double(number=value))["answer"]
        return {"answer": value}


class Branch(Program):
    """Even numbers go to `halve`, odd ones to `double`, 0 straight home."""

    halve = Stage(Signature.parse("number -> answer", instruction="Halve."))
    double = Stage(Signature.parse("number -> answer", instruction="Double."))

    def run(self, number: int) -> Generator[Call, Mapping[str, str], Mapping[str, Any]]:
        if number == 0:
            return {"answer": "0"}
        stage = self.double if number % 2 else self.halve
        return (yield stage(number=number))
