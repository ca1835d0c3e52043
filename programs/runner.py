"""Runner: runs many examples through a program together, one LM batch for each round of pending calls."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from cotune.errors import BadValueError
from cotune.programs.calibration import calibrated
from cotune.programs.example import Example
from cotune.programs.faults import check_errors, quoted, raised
from cotune.programs.form import Form, ParseError, Unreadable
from cotune.programs.forms import form_of
from cotune.programs.judging import judged
from cotune.programs.lm import LM, Completion, Message, Request, Sampling
from cotune.programs.metrics import Metric
from cotune.programs.program import Call, NamedValues, Program, Stage
from cotune.programs.prompt import Prompts, prompts_id
from cotune.programs.ranks import Ranks
from cotune.programs.retrieval import RetrieverError
from cotune.programs.rollout import Failure, Kind, Rollout, Step, rollout_of_plain, rollout_to_plain
from cotune.programs.run_state import class_state, own_copy
from cotune.programs.score import Score
from cotune.programs.signature import Signature
from cotune.programs.types import FieldTypeError, plain


@dataclass(frozen=True)
class Runner:
    """Everything that decides how a program runs on an example, prompts and seed apart.

    Attributes:
        program, lm, form: what runs, on which LM, and how its stages talk to it.
        metric: None leaves every score at 0: for predictions on data without labels.
        sampling: how completions are drawn.
        max_error_rate: share of examples on which the user's code may fail; each is scored 0 and recorded.
        ranks: processes that share the examples out: program, LM and metric see each example in one of them alone.
    """

    program: Program
    lm: LM
    form: Form
    metric: Metric | None
    sampling: Sampling
    max_error_rate: float = 0.5
    ranks: Ranks = Ranks()  # noqa: RUF009 (without state)

    def run(
        self,
        examples: Sequence[Example],
        prompts: Prompts | Sequence[Prompts],
        *,
        seed: int = 0,
        attempt: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> list[Rollout]:
        """Runs the program on every example, in lockstep: each round of pending calls is one LM batch.

        Each run has its own copy of the program and of the inputs: no other run sees what it writes there. Attributes
        of the program that are lists, dicts or sets are copied with all that is in them, but for what can be called,
        such as a retriever. Other objects are shared.

        Args:
            prompts: one set of prompts for all, or one for each example.
            seed, attempt: with stage and example they seed each call's draws, so the batch has no influence on them.
            progress: told, after each round, how many examples have newly ended.

        Returns:
            One rollout an example, in the order of the examples. A bad rollout is data, not an exception.

        Raises:
            FaultyProgramError: program, retriever or metric failed on more than `max_error_rate` of the examples.
            RanksDifferError: another process is about to run something else.
        """
        sets = [prompts] * len(examples) if isinstance(prompts, Mapping) else list(prompts)
        if len(sets) != len(examples):
            raise BadValueError(
                f"{len(sets)} sets of prompts for {len(examples)} examples; give one, or one per example."
            )
        run = functools.partial(self._run, seed=seed, attempt=attempt, progress=progress)
        if self.ranks.count == 1:
            done = run(examples, sets)
        else:
            described = _described(examples, sets, seed, attempt, self.sampling)
            self.ranks.agree(f"run {len(examples)} examples", described)
            done = self._shared(run, examples, sets)
            _report(progress, len(examples) - len(self.ranks.share(len(examples))))
        check_errors(done, max_error_rate=self.max_error_rate)
        return done

    def _shared(
        self, run: Callable[..., list[Rollout]], examples: Sequence[Example], sets: Sequence[Prompts]
    ) -> list[Rollout]:
        """The rollouts of all processes, each of which runs its share."""
        mine = self.ranks.share(len(examples))
        ours, given = [examples[at] for at in mine], [sets[at] for at in mine]
        parts = self.ranks.share_out(lambda: [rollout_to_plain(one) for one in run(ours, given)], self.lm)
        found = (one for part in parts for one in part)
        return [rollout_of_plain(one, example) for one, example in zip(found, examples, strict=True)]

    def _run(
        self,
        examples: Sequence[Example],
        sets: Sequence[Prompts],
        seed: int,
        attempt: int,
        progress: Callable[[int], None] | None,
    ) -> list[Rollout]:
        """The rollouts of this process's examples."""
        signatures = {name: stage.signature for name, stage in self.program.stages.items()}
        shared = class_state(self.program)
        runs = [_Run(self.program, example) for example in examples]
        pending = [(run, given) for run, given in zip(runs, sets, strict=True) if run.advance(None)]
        _report(progress, len(runs) - len(pending))
        while pending:
            forms = [form_of(self.form, given[run.call.stage]) for run, given in pending]
            requests = [
                run.request(form, signatures[run.call.stage], given, _call_seed(seed, run, attempt))
                for (run, given), form in zip(pending, forms, strict=True)
            ]
            completions = self._completions(
                [(form, signatures[run.call.stage]) for (run, _), form in zip(pending, forms, strict=True)], requests
            )
            before = len(pending)
            pending = [
                (run, given)
                for (run, given), form, request, completion in zip(pending, forms, requests, completions, strict=True)
                if run.take(form, signatures[run.call.stage], request, completion)
            ]
            _report(progress, before - len(pending))
        if changed := [name for name, size in class_state(self.program).items() if size != shared.get(name)]:
            warnings.warn(
                f"{type(self.program).__name__}.{changed[0]} belongs to the class, and a run changed it. All runs "
                "share it, so scores depend on what ran before, with other prompts and weights. Assign it in __init__ "
                "to give each run its own.",
                stacklevel=1,  # so that it is said once
            )
        pairs = [(run.example, run.prediction or {}) for run in runs if run.error is None]
        scores = iter(judged(pairs, self.metric, self.program))
        return [run.rollout(run.error or next(scores)) for run in runs]

    def _completions(self, asked: Sequence[tuple[Form, Signature]], requests: Sequence[Request]) -> list[Completion]:
        """The LM's completions. What cannot be read is asked for once more, if the LM is one that only gives text."""
        completions = list(self.lm.complete(requests, self.sampling))
        read = list(zip(asked, completions, strict=True))
        faults = {at: fault for at, (how, one) in enumerate(read) if (fault := _fault(*how, one))}
        repairs = {at: asked[at][0].repair(asked[at][1], fault) for at, fault in faults.items()}
        again = [_repair(requests[at], completions[at].text, message) for at, message in repairs.items()]
        answers = self.lm.complete(again, self.sampling) if again else []
        for at, answer in zip(faults, answers, strict=True):
            if not _fault(*asked[at], answer) and answer.finished not in ("too_long", "refused"):
                completions[at] = replace(answer, repaired=True)
        return completions


def _described(
    examples: Sequence[Example], sets: Sequence[Prompts], seed: int, attempt: int, sampling: Sampling
) -> str:
    """All that a run follows from, program and LM apart."""
    ids = {id(one): prompts_id(one) for one in sets}
    return repr(([e.id for e in examples], [ids[id(one)] for one in sets], seed, attempt, sampling))


def _call_seed(seed: int, run: _Run, attempt: int) -> int:
    """A 63-bit seed from what the call is, not from when or beside what it runs."""
    text = f"{seed}|{run.example.id}|{run.call.stage}|{len(run.steps)}|{attempt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class _Run:
    """A rollout under way: the program's generator, the call it waits on, the steps behind it."""

    call: Call

    def __init__(self, program: Program, example: Example) -> None:
        self.program, self.example = program, example
        self.own = own_copy(program)
        self.generator: Generator[Call, Any, Any] | None = None
        self.steps: list[Step] = []
        self.prediction: Mapping[str, Any] | None = None
        self.error: Failure | None = None

    def advance(self, outputs: Any) -> bool:
        """Runs the program to its next call; None starts it. False when it has ended, well or badly."""
        try:
            call = self._generator().send(outputs)
        except StopIteration as stop:
            self._finish(stop.value)
        except Unreadable as error:
            self._fail("format", f"{type(self.program).__name__}.run: {error}")
        except RetrieverError as error:
            self._fail("retriever", str(error))
        except (MemoryError, KeyboardInterrupt):  # not the example's doing
            raise
        except (Exception, SystemExit) as error:  # the user's code: what it raises is recorded, counted and shown
            self._fail("program", f"{type(self.program).__name__}.run raised {raised(error)}")
        else:
            return self._accept(call)
        return False

    def _generator(self) -> Generator[Call, Any, Any]:
        if self.generator is None:
            made: Any = self.own.run(**copy.deepcopy(dict(self.example.inputs)))
            if not isinstance(made, Generator):
                message = f"{made.not_yielded()}" if isinstance(made, Call) else "yield the stage calls"
                raise TypeError(f"run is not a generator, it returned {quoted(made)}; {message}")
            self.generator = made
        return self.generator

    def _accept(self, call: Any) -> bool:
        """Takes what the program yielded as the call that it waits on."""
        if not isinstance(call, Call) or call.stage not in list(self.program.stages):
            wrong = f"{quoted(call)}, which is not a call of one of its stages"
            if isinstance(call, Stage):
                wrong = f'the stage "{call.name}" itself; write: {call.as_called()}'
            self._fail("program", f"run() yielded {wrong}")
        elif fault := _unsayable(call.inputs):
            self._fail("program", f'run() called stage "{call.stage}" with {fault}')
        elif len(self.steps) >= self.program.max_calls:
            self._fail(
                "program",
                f"run() made {len(self.steps)} calls and wants another, more than "
                f"{type(self.program).__name__}.max_calls allows; mend the loop, or set max_calls higher in the class",
            )
        else:
            self.call = call
            return True
        return False

    def request(self, form: Form, signature: Signature, prompts: Prompts, seed: int) -> Request:
        prompt = prompts[self.call.stage]
        layout = calibrated(form.typed_layout(signature), prompt.calibration)
        return Request(
            form.render(signature, prompt, self.call.inputs), seed=seed, layout=layout, scores=self.call.scores
        )

    def take(self, form: Form, signature: Signature, request: Request, completion: Completion) -> bool:
        """Records the completion as a step and resumes the program with its outputs. False when the run has ended."""
        step = Step(self.call.stage, self.call.inputs, {}, request.messages, completion)
        values: dict[str, Any] = {}
        try:
            if completion.finished == "too_long":
                raise ParseError("the prompt is longer than the model's context window")
            if completion.finished == "refused":
                raise ParseError("the endpoint refused the request")
            texts, values = _read(form, signature, completion)
            step = replace(step, outputs={name: texts[name] for name in signature.outputs})
        except ParseError as error:
            self._fail("format", f'stage "{self.call.stage}": {error}')
        except FieldTypeError as error:
            self._fail("type", f'stage "{self.call.stage}": {error}')
        if self.call.scores and self.error is None:
            values["scores"] = completion.scores
            if not completion.scores:
                self._fail("program", f'stage "{self.call.stage}" asks for scores, and {_NO_SCORES}')
        self.steps.append(step)
        return self.error is None and self.advance(NamedValues(values))

    def _finish(self, prediction: Any) -> None:
        if isinstance(prediction, Call):
            self._fail("program", f"run() returned a call: {prediction.not_yielded()}")
        elif not isinstance(prediction, Mapping):
            message = f"returned {quoted(prediction)}; return a mapping of named values, e.g. the last outputs"
            self._fail("program", f"run() {message}")
        elif isinstance(found := _recordable(prediction), NamedValues):
            self.prediction = found
        else:
            self._fail("program", f"run() returned a prediction that no file can hold: {found}")

    def rollout(self, judged: Score | Failure) -> Rollout:
        """The record of this run, with the metric's score or with what went wrong."""
        score, error = (Score(0.0), judged) if isinstance(judged, Failure) else (judged, None)
        return Rollout(
            self.example,
            tuple(self.steps),
            self.prediction,
            score.value,
            error,
            score.feedback,
            objectives=dict(score.objectives),
            stages=dict(score.stages),
        )

    def _fail(self, kind: Kind, message: str) -> None:
        self.error = Failure(kind, message)
        if self.generator is not None:
            # Now, and not whenever it is collected. Its clean-up may raise, but the rollout says already why it failed.
            with suppress(Exception):
                self.generator.close()


_NO_SCORES = (
    "there are none: they need an LM in this process, and a form with a place for each field, which JSON is not"
)


def _read(form: Form, signature: Signature, completion: Completion) -> tuple[dict[str, str], dict[str, Any]]:
    """The outputs as texts and as values; raises ParseError or FieldTypeError."""
    texts = form.read(signature, completion)
    asked = form.used(signature).outputs
    return texts, {n: signature.value(n, texts[n]) if n in asked else texts[n] for n in signature.outputs}


def _fault(form: Form, signature: Signature, completion: Completion) -> str:
    """What stops a text without ids from being read, and might not a second time; "" for nothing."""
    if completion.completion_ids or completion.finished in ("too_long", "refused"):
        return ""
    try:
        _read(form, signature, completion)
    except (ParseError, FieldTypeError) as error:
        return str(error)
    return ""


def _repair(request: Request, text: str, message: str) -> Request:
    """The request for another try, after a completion of this text."""
    asked: list[Message] = [{"role": "user", "content": message}]
    text = text.encode(errors="replace").decode()  # half a surrogate pair cannot be sent
    if text.strip():  # endpoints refuse an empty turn
        return replace(request, messages=[*request.messages, {"role": "assistant", "content": text}, *asked])
    *before, last = request.messages
    return replace(request, messages=[*before, {**last, "content": f"{last['content']}\n\n{message}"}])


def _unsayable(inputs: Any) -> str:
    """What stops a call's inputs from being shown to an LM; "" for nothing. `Stage.__call__` makes texts of values, but
    a `Call` may be made by hand, and a text from elsewhere may be no valid Unicode."""
    if not isinstance(inputs, Mapping):
        return f"the inputs {quoted(inputs)}, which are no mapping"
    for name, value in inputs.items():
        if not isinstance(value, str):
            return f"{quoted(name)} of type {type(value).__name__}, which is no text; make calls by calling the stage"
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"half a surrogate pair in {quoted(name)}, at character {error.start}: no text in UTF-8 holds one"
    return ""


def _recordable(prediction: Mapping[Any, Any]) -> NamedValues | str:
    """A copy of a prediction; or what stops it from being copied, or written as JSON (logs and `cotune predict` do)."""
    found = NamedValues()
    name: Any = None
    try:
        for name, value in prediction.items():
            if isinstance(value, Call):
                return str(value.not_yielded())
            if not isinstance(name, str):
                return f"its key {quoted(name)} is no text"
            found[name] = copy.deepcopy(value)
            json.dumps(plain({name: value}), ensure_ascii=False).encode()
    except MemoryError:
        raise
    except Exception as error:  # the values are the user's, and so is what their methods raise
        return f"{raised(error)}, at {quoted(name)}; return plain values, such as text, numbers, lists and dicts"
    return found


def _report(progress: Callable[[int], None] | None, ended: int) -> None:
    if progress is not None and ended:
        progress(ended)
