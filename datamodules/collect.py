"""Collecting: the program's own runs on the train set, kept all, for an objective to choose from."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from cotune.datamodules.encode import Vocabulary
from cotune.datamodules.teacher import teach
from cotune.datamodules.trace import Trace
from cotune.errors import BadValueError, CotuneError
from cotune.programs import (
    LM,
    Demo,
    Example,
    Form,
    Program,
    Prompts,
    Rollout,
    Runner,
    Step,
    draw_demos,
    faults_of,
    hide_own_demos,
    labelled_demos,
    prompts_id,
)
from cotune.programs.demos import hinted, label_text
from cotune.programs.faults import KINDS, faults_to_dict
from cotune.programs.layout import Field

_FAILED = ("wrong", "format", "type", "cut")
"""Outcomes of runs that failed by what the LM wrote, or by what it could not be asked."""

_DRAW_SHARED_BY = 8
"""Examples that share one draw of demos: sharing saves prefill, more draws find more traces."""


@dataclass(frozen=True)
class Bootstrapping:
    """How traces are collected from the train set, and what training pairs are made of them.

    Attributes:
        threshold: score from which a run counts as a success (lambda in the paper; 1 for a binary metric).
        attempts: runs of an example until enough succeed. The first is with the current prompts, as in the paper.
        traces_per_example: successes that are enough. All examples have the same cap, so easy ones do not dominate; a
            success whose completions are those of an earlier one of its example does not count.
        hints: further attempts for examples without any success, which are shown the gold answer as a hint (STaR,
            Zelikman et al., 2022). Training pairs never hold the hint. Such successes are counted apart.
        gold_answers: examples still without a success give one pair all the same: the last call of the first of their
            runs that ended with a prediction, with the labels as what it wrote. Only where the labels give every output
            of that call's stage, so none where it also reasons. Counted apart; no call before it is learnt from.
        temperature: of the attempts after the first.
        fresh_demos: later attempts show this many freshly drawn demos a stage, never one of the example's own: labelled
            examples where a stage's inputs and output have labels, and earlier successes. 0 keeps the current prompts.
        pairs: prompts that stand in the training pairs: "initial" (zero-shot, as in the paper) or "current".
        balance_stages: train on as many pairs of each stage, those of rarer stages repeated within an epoch.
        cut_traces: also learn from passing runs in which a text was closed at its token limit and not by the LM; it is
            learnt as if it ended there.
        demo_share: share of the batches whose pairs carry 1 to `fresh_demos` demos of other rows, so that the tuned
            weights still know what to do with demos. 0 in the paper.
        teacher: an LM, such as an endpoint, that runs the examples which the student does not solve, once, with the
            current prompts. What passes the metric is trained on in the student's form and ids, and counted apart.
    """

    threshold: float = 1.0
    attempts: int = 10
    traces_per_example: int = 1
    hints: int = 0
    gold_answers: bool = False
    temperature: float = 0.7
    fresh_demos: int = 3
    pairs: Literal["initial", "current"] = "initial"
    balance_stages: bool = False
    cut_traces: bool = False
    demo_share: float = 0.0
    teacher: LM | None = None

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise BadValueError(f"attempts {self.attempts} is below 1.")
        if not 1 <= self.traces_per_example <= self.attempts:
            raise BadValueError(
                f"traces_per_example {self.traces_per_example} is outside 1 to attempts ({self.attempts}): an attempt "
                "gives one trace at most."
            )
        if self.hints < 0:
            raise BadValueError(f"hints {self.hints} is below 0; it is a number of attempts, 0 gives none.")
        if self.fresh_demos < 0:
            raise BadValueError(f"fresh_demos {self.fresh_demos} is below 0.")
        if not 0 < self.threshold <= 1:
            raise BadValueError(
                f"threshold {self.threshold} is outside (0, 1]; at 0 a failed run would count as a success."
            )
        if not 0 <= self.demo_share <= 1:
            raise BadValueError(f"demo_share {self.demo_share} is outside [0, 1].")
        if self.demo_share and not self.fresh_demos:
            raise BadValueError(f"demo_share {self.demo_share} needs fresh_demos above 0: it draws up to that many.")


@dataclass(frozen=True)
class Runs:
    """Runs of each example that an objective wants instead of tries until one passes.

    Attributes:
        each: runs of an example, all drawn by the same prompts, which are those of the training rows.
        temperature: of all of them.
        prompts: "initial" (the program's own, zero-shot) or "current".
    """

    each: int
    temperature: float = 1.0
    prompts: Literal["initial", "current"] = "current"

    def __post_init__(self) -> None:
        if self.each < 1:
            raise BadValueError(f"{self.each} runs an example are too few; at least 1.")
        if self.temperature < 0 or (self.temperature == 0 and self.each > 1):
            raise BadValueError(
                f"temperature {self.temperature:g} with {self.each} runs an example: all would be alike; take more."
            )


@dataclass(frozen=True)
class Attempt:
    """One run of an example in a collection, whatever came of it.

    Attributes:
        number: of the attempt, from 0.
        prompts: id of those it was run with.
        hinted: they held the gold answer.
        taught: the teacher ran it.
    """

    rollout: Rollout
    number: int
    prompts: str
    hinted: bool = False
    taught: bool = False

    @property
    def example(self) -> str:
        return self.rollout.example.id


@dataclass(frozen=True)
class Collected:
    """All runs of a collection, in the order they were made, and what training rows are made of them.

    Attributes:
        vocabulary: of the LM that ran; one without a name where it has no token ids.
    """

    attempts: tuple[Attempt, ...]
    examples: tuple[Example, ...]
    options: Bootstrapping
    program: Program
    form: Form
    vocabulary: Vocabulary = field(default_factory=Vocabulary)

    @cached_property
    def successes(self) -> tuple[Attempt, ...]:
        """The passing attempts, less those whose completions are an earlier one's of their example over again."""
        return _successes(self.attempts, self.options)

    @property
    def siblings(self) -> list[list[Attempt]]:
        """The runs of each example."""
        found: dict[str, list[Attempt]] = {}
        for attempt in self.attempts:
            found.setdefault(attempt.example, []).append(attempt)
        return list(found.values())

    def outcome(self, attempt: Attempt) -> str:
        """ "passed", "wrong", "cut" (it reached the threshold with a text closed at its limit), or a failure's kind."""
        return _outcome(attempt.rollout, self.options)

    def traces(self, attempt: Attempt) -> list[Trace]:
        """Every stage call of a run, in order."""
        return [self._trace(attempt, call, step) for call, step in enumerate(attempt.rollout.steps)]

    def gold_traces(self) -> list[Trace]:
        """A trace with the gold answer for each example without a success that can have one, if the options ask for it.

        It is of the first run that ended with a prediction and whose last stage the labels fill.
        """
        if not self.options.gold_answers:
            return []
        solved = {attempt.example for attempt in self.successes}
        first: dict[str, Trace] = {}
        for attempt in self.attempts:
            if attempt.example not in solved | first.keys() and (trace := self._gold_trace(attempt)) is not None:
                first[attempt.example] = trace
        return [first[example.id] for example in self.examples if example.id in first]

    def report(self, traces: Sequence[Trace]) -> Report:
        """The counts, of these runs and of the traces that an objective made of them."""
        solved: dict[str, Attempt] = {}
        for attempt in self.successes:
            solved.setdefault(attempt.example, attempt)
        at = Counter(attempt.number for attempt in solved.values())
        outcomes = Counter(map(self.outcome, self.attempts))
        failed = [attempt.rollout for attempt in self.attempts if self.outcome(attempt) in _FAILED]
        ends = [{step.completion.finished for step in rollout.steps} for rollout in failed]
        return Report(
            examples=len(self.examples),
            solved_at_attempt=[at[number] for number in range(1 + max((a.number for a in self.attempts), default=-1))],
            runs=len(self.attempts),
            **{name: outcomes[name] for name in ("wrong", "format", "type", *KINDS, "cut")},
            faults=faults_to_dict(faults_of([attempt.rollout for attempt in self.attempts])),
            hinted=sum(attempt.hinted for attempt in solved.values()),
            taught=sum(attempt.taught for attempt in solved.values()),
            more=len(self.successes) - len(solved),
            repeated=outcomes["passed"] - len(self.successes),
            gold=sum(trace.gold for trace in traces),
            canonical=self.vocabulary.canonical_share([trace.completion_ids for trace in traces]),
            too_long=sum("too_long" in found for found in ends),
            cut_off=sum("length" in found for found in ends),
        )

    def _trace(self, attempt: Attempt, call: int, step: Step) -> Trace:
        completion = step.completion
        drawn, forced = completion.log_probs, completion.forced
        if 0 in drawn:  # no other token was allowed there, which is as good as forced
            forced = tuple(p == 0 for p in drawn)
        return Trace(
            example=attempt.example,
            attempt=attempt.number,
            score=attempt.rollout.score,
            stage=step.stage,
            call=call,
            inputs=step.inputs,
            outputs=step.outputs,
            messages=step.messages,
            completion=completion.text,
            completion_ids=completion.completion_ids,
            complete=completion.finished == "eos",
            prompts=attempt.prompts,
            hinted=attempt.hinted,
            forced=forced,
            sampled=self._drawn_among_all(step) if drawn else (),
            closed=_closed(step),
            tokenizer=self.vocabulary.tokenizer,
            base=self.vocabulary.base,
        )

    def _drawn_among_all(self, step: Step) -> tuple[float, ...]:
        """The log-probabilities of the tokens that were drawn among all there are; 0 for the others."""
        layout = self.form.layout(self.program.stages[step.stage].signature)
        fields = {part.name: part for part in layout if isinstance(part, Field) and part.syntax is None}
        free: set[int] = set()
        for filled in step.completion.fields:
            if (part := fields.get(filled.name)) is None:
                continue
            first, ids = filled.start, step.completion.completion_ids
            while not part.may_be_empty and first < filled.end and not self.vocabulary.decode(ids[first:][:1]).strip():
                first += 1  # until something is written, the field may not end
            free |= set(range(first if part.may_be_empty else first + 1, filled.end))
        return tuple(p if place in free else 0.0 for place, p in enumerate(step.completion.log_probs))

    def _gold_trace(self, attempt: Attempt) -> Trace | None:
        """The run's last call with the labels as its outputs; None where the labels do not give all of them.

        None, too, for a run that failed: its last call need not be the program's.
        """
        rollout = attempt.rollout
        if rollout.error is not None or not rollout.steps:
            return None
        step, labels = rollout.steps[-1], rollout.example.labels
        signature = self.program.stages[step.stage].signature
        if any(labels.get(name) is None for name in signature.outputs):
            return None
        outputs = {name: label_text(signature, name, labels[name]) for name in signature.outputs}
        text = self.form.write(signature, outputs)
        return replace(
            self._trace(attempt, len(rollout.steps) - 1, step),
            outputs=outputs,
            completion=text,
            completion_ids=tuple(self.vocabulary.encode(text)),
            complete=False,
            forced=(),
            sampled=(),
            closed=False,
            gold=True,
        )


@dataclass
class Report:
    """What came of collecting: counts of examples, and of runs by outcome."""

    examples: int = 0
    solved_at_attempt: list[int] = field(default_factory=list)
    runs: int = 0
    wrong: int = 0
    format: int = 0
    type: int = 0
    """runs that ended with a text that is none of its field's type"""
    program: int = 0
    retriever: int = 0
    metric: int = 0
    cut: int = 0
    """runs that succeeded with a completion cut at max_new_tokens: not learnt from, or the LM would never end."""
    faults: dict[str, dict[str, Any]] = field(default_factory=dict)
    """the user's code's faults by kind, each with its first example, in plain types: checkpoints hold reports"""
    hinted: int = 0
    """of the solved examples, those that needed a hint"""
    taught: int = 0
    """of the solved examples, those that the teacher solved"""
    more: int = 0
    """further successes of solved examples, where `traces_per_example` asks for them"""
    repeated: int = 0
    """successes that were an earlier one of their example over again"""
    gold: int = 0
    """unsolved examples that gave a pair with the gold answer"""
    too_long: int = 0
    """of the failed runs, those that ended at a prompt that does not fit the window"""
    cut_off: int = 0
    """of the failed runs, those with a completion cut at max_new_tokens"""
    canonical: float | None = None
    """of the traces, the share whose ids are those that the tokenizer gives their text; None where nobody knows"""

    @property
    def solved(self) -> int:
        return sum(self.solved_at_attempt)

    def __str__(self) -> str:
        why = {
            "wrong answer": self.wrong,
            "closed at the limit": self.cut,
            "out of type": self.type,
            "no answer": self.format,
        }
        why |= {f"{kind} faults": getattr(self, kind) for kind in KINDS}
        failed = ", ".join(f"{count} {kind}" for kind, count in why.items() if count) or "none"
        hinted = f", {self.hinted} of them with a hint" if self.hinted else ""
        hinted += f", {self.taught} of them by the teacher" if self.taught else ""
        more = f", {self.more} further traces of them" if self.more else ""
        gold = f", {self.gold} unsolved ones with their gold answer" if self.gold else ""
        solved = f"{self.solved} of {self.examples} examples solved{hinted}"
        ids = f"; {self.canonical:.0%} of the traces as the tokenizer writes them" if self.canonical is not None else ""
        return f"{solved} in {self.runs} runs{more}{gold} (failed: {failed}){ids}"


class NoTracesError(CotuneError):
    """A weight step has nothing to learn from; its own exit code tells a table of runs."""

    exit_code = 3


def collect(
    examples: Sequence[Example],
    runner: Runner,
    prompts: Prompts,
    *,
    options: Bootstrapping,
    seed: int,
    progress: Callable[[int], None] | None = None,
    vocabulary: Vocabulary = Vocabulary(),  # noqa: B008 (frozen)
) -> Collected:
    """Runs the program on each example until enough runs succeed, or the attempts are used up; keeps all runs."""
    attempts: list[Attempt] = []
    pool: dict[str, list[Demo]] = labelled_demos(runner.program, examples, runner.form)
    # Later attempts see only the unsolved, among which faults may well be the most without being many.
    warmer = replace(runner.sampling, temperature=options.temperature, top_p=1.0)
    later = replace(runner, sampling=warmer, max_error_rate=1.0)
    wanting, solved = list(examples), 0
    while wanting:
        number = attempts[-1].number + 1 if attempts else 0
        shown = _shown(prompts, wanting, pool, options, number, seed)
        done = (later if number else runner).run(wanting, shown, seed=seed, attempt=number)
        hinting = number >= options.attempts
        attempts += [Attempt(r, number, prompts_id(p), hinting) for r, p in zip(done, shown, strict=True)]
        successes = _successes(attempts, options)
        for attempt in successes:
            if attempt.number == number:
                for step in attempt.rollout.steps:
                    pool.setdefault(step.stage, []).append(Demo(step.inputs, step.outputs, attempt.example))
        wanting = _wanting(examples, successes, options, number + 1)
        before, solved = solved, len({attempt.example for attempt in successes})
        if progress is not None:
            progress(solved - before if wanting else len(examples) - before)
    if options.teacher is not None:
        unsolved = _unsolved(examples, attempts, options)
        shown = [hide_own_demos(prompts, example.id) for example in unsolved]
        number = options.attempts + options.hints
        taught = teach(options.teacher, unsolved, runner, shown, seed=seed, attempt=number, encode=vocabulary.encode)
        attempts += [Attempt(r, number, prompts_id(p), taught=True) for r, p in zip(taught, shown, strict=False)]
    return Collected(tuple(attempts), tuple(examples), options, runner.program, runner.form, vocabulary)


def collect_runs(
    examples: Sequence[Example],
    runner: Runner,
    prompts: Prompts,
    *,
    runs: Runs,
    options: Bootstrapping,
    seed: int,
    progress: Callable[[int], None] | None = None,
    vocabulary: Vocabulary = Vocabulary(),  # noqa: B008 (frozen)
) -> Collected:
    """So many runs of each example, whatever becomes of them. Completions tell how likely each token was.

    Args:
        progress: told of each example once, after its last run.
        options: say what passes.
    """
    drawn = replace(runner.sampling, temperature=runs.temperature, top_p=1.0, log_probs=True)
    shown = [hide_own_demos(prompts, example.id) for example in examples]
    attempts: list[Attempt] = []
    for number in range(runs.each):
        told = progress if number == runs.each - 1 else None
        done = replace(runner, sampling=drawn).run(examples, shown, seed=seed, attempt=number, progress=told)
        attempts += [Attempt(r, number, prompts_id(p)) for r, p in zip(done, shown, strict=True)]
    return Collected(tuple(attempts), tuple(examples), options, runner.program, runner.form, vocabulary)


def _wanting(
    examples: Sequence[Example], successes: Sequence[Attempt], options: Bootstrapping, number: int
) -> list[Example]:
    """The examples that attempt `number` is for: those without enough successes; a hint is for those without any."""
    if number >= options.attempts + options.hints:
        return []
    enough = options.traces_per_example if number < options.attempts else 1
    found = Counter(attempt.example for attempt in successes)
    return [example for example in examples if found[example.id] < enough]


def _unsolved(examples: Sequence[Example], attempts: Sequence[Attempt], options: Bootstrapping) -> list[Example]:
    solved = {attempt.example for attempt in _successes(attempts, options)}
    return [example for example in examples if example.id not in solved]


def _shown(
    prompts: Prompts,
    examples: Sequence[Example],
    pool: Mapping[str, Sequence[Demo]],
    options: Bootstrapping,
    number: int,
    seed: int,
) -> list[Prompts]:
    """The prompts of an attempt, for each example: no run may read its own answer off a demo."""
    if number and options.fresh_demos:
        rng = random.Random(f"{seed}|{number}")
        given = fresh_prompts(prompts, examples, pool, count=options.fresh_demos, rng=rng)
    else:
        given = [hide_own_demos(prompts, example.id) for example in examples]
    if number < options.attempts:
        return given
    return [hinted(shown, example) for shown, example in zip(given, examples, strict=True)]


def fresh_prompts(
    prompts: Prompts,
    examples: Sequence[Example],
    pool: Mapping[str, Sequence[Demo]],
    *,
    count: int,
    rng: random.Random,
) -> list[Prompts]:
    """Prompts with freshly drawn demos for each example, never one of its own.

    Examples are put into groups at random, and a group has one draw, from outside it: what its examples share is
    computed once, while an attempt still sees many draws.
    """
    order = list(range(len(examples)))
    rng.shuffle(order)
    given: dict[int, Prompts] = {}
    for start in range(0, len(order), _DRAW_SHARED_BY):
        group = order[start : start + _DRAW_SHARED_BY]
        own = {examples[i].id for i in group}
        drawn = {stage: draw_demos(pool.get(stage, ()), count, rng, exclude_sources=own) for stage in prompts}
        shown = {stage: replace(p, demos=tuple(drawn[stage]) or p.demos) for stage, p in prompts.items()}
        for i in group:
            # Where there was nothing to draw a stage keeps the demos it had, and those may be the example's own.
            given[i] = hide_own_demos(shown, examples[i].id)
    return [given[i] for i in range(len(examples))]


def _successes(attempts: Sequence[Attempt], options: Bootstrapping) -> tuple[Attempt, ...]:
    found: dict[tuple[str, ...], Attempt] = {}
    for attempt in attempts:
        if _outcome(attempt.rollout, options) == "passed":
            said = (attempt.example, *(step.completion.text for step in attempt.rollout.steps))
            found.setdefault(said, attempt)
    return tuple(found.values())


def _outcome(rollout: Rollout, options: Bootstrapping) -> str:
    if rollout.error is not None:
        return rollout.error.kind
    if rollout.score < options.threshold:
        return "wrong"
    return "cut" if not options.cut_traces and any(map(_closed, rollout.steps)) else "passed"


def _closed(step: Step) -> bool:
    """Whether the completion, or a field of it, was closed at its limit and not by the LM."""
    return step.completion.finished == "length" or bool(step.closed)
