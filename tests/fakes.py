"""Fakes with real control flow: programs that loop, branch, stop early and fail, and an LM that is a function."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cotune.programs import (
    Call,
    Example,
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

from cotune.testing import EOS, FakeLM, asked, instruction, shown

__all__ = [
    "EOS",
    "Branch",
    "FakeLM",
    "Loop",
    "asked",
    "doubles",
    "doubling",
    "instruction",
    "runner",
    "search_task",
    "shown",
]


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
