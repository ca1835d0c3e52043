"""Rollouts: many examples run through a program together, one LM batch for each round of pending calls."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cotune.programs.example import Example
from cotune.programs.lm import LM, Completion, Request, Sampling
from cotune.programs.metrics import Metric
from cotune.programs.program import Call, Program
from cotune.programs.prompt import Prompts
from cotune.programs.template import ParseError, Template


@dataclass(frozen=True)
class Step:
    """One stage call of a rollout, with everything that training on it needs."""

    stage: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    messages: Sequence[Mapping[str, str]]
    completion: Completion


@dataclass(frozen=True)
class Failure:
    """Why a rollout has no valid score. A format failure is the LM's; the other two are the user's code."""

    kind: Literal["format", "program", "metric"]
    message: str


@dataclass(frozen=True)
class Rollout:
    """One run of a program on one example.

    `score` is in [0, 1], and 0 wherever there is an `error`. `steps` holds the calls that were made, the one whose
    completion did not parse included, its `outputs` empty.
    """

    example: Example
    steps: tuple[Step, ...]
    prediction: Mapping[str, Any] | None
    score: float
    error: Failure | None = None


class FaultyProgramError(RuntimeError):
    """The user's program or metric raised on so many examples that scores would mean nothing."""


def rollouts(
    program: Program,
    examples: Sequence[Example],
    *,
    lm: LM,
    prompts: Prompts | Sequence[Prompts],
    template: Template,
    metric: Metric | None,
    sampling: Sampling,
    seed: int = 0,
    attempt: int = 0,
    max_error_rate: float = 0.5,
    progress: Callable[[int], None] | None = None,
) -> list[Rollout]:
    """Runs the program on every example, in lockstep: each round of pending calls is one LM batch.

    Args:
        prompts: one set of prompts for all, or one for each example.
        metric: None leaves every score at 0: for predictions on data without labels.
        seed, attempt: with stage and example they seed each call's draws, so the batch has no influence on them.
        max_error_rate: share of examples on which the user's code may raise.
        progress: told, after each round, how many examples have newly ended.

    Returns:
        One rollout an example, in the order of the examples. A bad rollout is data, not an exception.

    Raises:
        FaultyProgramError: the program or the metric raised on more than `max_error_rate` of the examples.
    """
    sets = [prompts] * len(examples) if isinstance(prompts, Mapping) else list(prompts)
    if len(sets) != len(examples):
        raise ValueError(f"{len(sets)} sets of prompts for {len(examples)} examples; give one, or one for each.")
    signatures = {name: stage.signature for name, stage in program.stages.items()}
    runs = [_Run(program, example) for example in examples]
    pending = [(run, given) for run, given in zip(runs, sets, strict=True) if run.advance(None)]
    _report(progress, len(runs) - len(pending))
    while pending:
        requests = [
            run.request(template, signatures[run.call.stage], given, call_seed(seed, run, attempt))
            for run, given in pending
        ]
        completions = lm.generate(requests, sampling)
        before = len(pending)
        pending = [
            (run, given)
            for (run, given), request, completion in zip(pending, requests, completions, strict=True)
            if run.take(template, signatures[run.call.stage], request, completion)
        ]
        _report(progress, before - len(pending))
    done = [_scored(run, metric) for run in runs]
    check_errors(done, max_error_rate=max_error_rate)
    return done


def call_seed(seed: int, run: _Run, attempt: int) -> int:
    """A 63-bit seed from what the call is, not from when or beside what it runs."""
    text = f"{seed}|{run.example.id}|{run.call.stage}|{len(run.steps)}|{attempt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def check_errors(done: Sequence[Rollout], *, max_error_rate: float) -> None:
    """Raises FaultyProgramError if the user's code failed on more than `max_error_rate` of the rollouts."""
    faults = [r for r in done if r.error is not None and r.error.kind != "format"]
    if len(faults) > max_error_rate * len(done):
        first = faults[0]
        assert first.error is not None
        raise FaultyProgramError(
            f"the {first.error.kind} raised on {len(faults)} of {len(done)} examples, more than max_error_rate "
            f"{max_error_rate:g} allows. The first is example {first.example.id}: {first.error.message}"
        )


def mean_score(done: Sequence[Rollout]) -> float:
    """Mean score, 0 for no rollouts."""
    return math.fsum(r.score for r in done) / len(done) if done else 0.0


class _Run:
    """A rollout under way: the program's generator, the call it waits on, the steps behind it."""

    call: Call

    def __init__(self, program: Program, example: Example) -> None:
        self.program, self.example = program, example
        self.generator: Generator[Call, Any, Any] | None = None
        self.steps: list[Step] = []
        self.prediction: Mapping[str, Any] | None = None
        self.error: Failure | None = None

    def advance(self, outputs: Any) -> bool:
        """Runs the program to its next call; None starts it. False when it has ended, well or badly."""
        try:
            if self.generator is None:
                self.generator = self.program.run(**self.example.inputs)
            call = self.generator.send(outputs)
        except StopIteration as stop:
            self._finish(stop.value)
            return False
        except Exception as error:  # the user's code: what it raises is recorded, counted and shown
            self.error = Failure("program", f"{type(self.program).__name__}.run raised {_said(error)}")
            return False
        if not isinstance(call, Call) or call.stage not in self.program.stages:
            self.error = Failure("program", f"run() yielded {call!r}, which is not a call of one of its stages")
            return False
        self.call = call
        return True

    def request(self, template: Template, signature: Any, prompts: Prompts, seed: int) -> Request:
        messages = template.render(signature, prompts[self.call.stage], self.call.inputs)
        return Request(messages, template.stops(signature), seed)

    def take(self, template: Template, signature: Any, request: Request, completion: Completion) -> bool:
        """Records the completion as a step and goes on with its outputs. False when the rollout has ended."""
        step = Step(self.call.stage, self.call.inputs, {}, request.messages, completion)
        try:
            if completion.finished == "too_long":
                raise ParseError("the prompt is longer than the model's context window")
            step = replace(step, outputs=template.parse(signature, completion.text))
        except ParseError as error:
            self.error = Failure("format", f'stage "{self.call.stage}": {error}')
        self.steps.append(step)
        return self.error is None and self.advance(step.outputs)

    def _finish(self, prediction: Any) -> None:
        if isinstance(prediction, Mapping):
            self.prediction = prediction
        else:
            self.error = Failure(
                "program", f"run() returned {prediction!r}; return a mapping of named values, e.g. the last outputs"
            )


def _scored(run: _Run, metric: Metric | None) -> Rollout:
    score, error = 0.0, run.error
    if error is None and metric is not None and run.prediction is not None:
        try:
            score = _valid_score(metric(run.example, run.prediction))
        except Exception as raised:  # the user's code, as above
            error = Failure("metric", f"the metric raised {_said(raised)}")
    return Rollout(run.example, tuple(run.steps), run.prediction, score, error)


def _valid_score(score: Any) -> float:
    if isinstance(score, (str, bytes)) or score is None:
        raise TypeError(f"it returned {score!r}, which is not a number in [0, 1]")
    value = float(score)
    if not 0 <= value <= 1:  # NaN fails this too
        raise ValueError(f"it returned {value!r}, which is not a number in [0, 1]")
    return value


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _report(progress: Callable[[int], None] | None, ended: int) -> None:
    if progress is not None and ended:
        progress(ended)
