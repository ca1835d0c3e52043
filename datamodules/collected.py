"""What a collection holds: every run of it, the traces that come of them, and the counts of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from cotune.datamodules.bootstrapping import Bootstrapping
from cotune.datamodules.encode import Vocabulary
from cotune.datamodules.trace import Trace
from cotune.programs import (
    Example,
    Form,
    Program,
    Rollout,
    Step,
    faults_of,
)
from cotune.programs.demos import label_text, speaks_of_hint
from cotune.programs.faults import KINDS, faults_to_dict
from cotune.programs.layout import Field
from cotune.programs.types import is_choice

_FAILED = ("wrong", "format", "type", "cut", "retold")
"""Outcomes of runs that failed by what the LM wrote, or by what it could not be asked."""


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
        forms: stage -> that of its prompt.
        vocabulary: of the LM that ran; one without a name where it has no token ids.
    """

    attempts: tuple[Attempt, ...]
    examples: tuple[Example, ...]
    options: Bootstrapping
    program: Program
    forms: Mapping[str, Form]
    vocabulary: Vocabulary = field(default_factory=Vocabulary)

    @cached_property
    def successes(self) -> tuple[Attempt, ...]:
        """The passing attempts, less those whose completions are an earlier one's of their example over again."""
        return passing(self.attempts, self.options)

    @property
    def judged(self) -> list[Attempt]:
        """The attempts whose score tells of what the LM wrote: not those that the user's own code broke off."""
        return [one for one in self.attempts if one.rollout.error is None or one.rollout.error.kind not in KINDS]

    @property
    def siblings(self) -> list[list[Attempt]]:
        """The judged runs of each example."""
        found: dict[str, list[Attempt]] = {}
        for attempt in self.judged:
            found.setdefault(attempt.example, []).append(attempt)
        return list(found.values())

    def outcome(self, attempt: Attempt) -> str:
        """ "passed", "wrong", a failure's kind, or why a run that reached the threshold teaches nothing: "cut" (a text
        was closed at its limit) or "retold" (it speaks of the hint)."""
        return _outcome(attempt, self.options)

    def traces(self, attempt: Attempt) -> list[Trace]:
        """Every stage call of a run, in order."""
        return [self._trace(attempt, call, step) for call, step in enumerate(attempt.rollout.steps)]

    def gold_traces(self) -> list[Trace]:
        """A trace with the gold answer for each example without a success that can have one, if the options allow it.

        It is of the first run that ended with a prediction and whose last stage the labels fill. Labels that the form
        cannot write so that they are read back have none: no LM could write them.
        """
        return [trace for trace, writable in self._gold if writable]

    @cached_property
    def _gold(self) -> list[tuple[Trace, bool]]:
        """The traces with gold answers in the order of the examples, and whether the form can write each."""
        if self.options.gold_answers is False or (self.options.gold_answers == "auto" and not self.successes):
            return []
        solved = {attempt.example for attempt in self.successes}
        first: dict[str, Trace] = {}
        for attempt in self.attempts:
            if attempt.example not in solved | first.keys() and (trace := self._gold_trace(attempt)) is not None:
                first[attempt.example] = trace
        made = [first[example.id] for example in self.examples if example.id in first]
        signatures = {name: stage.signature for name, stage in self.program.stages.items()}
        return [(one, not self.forms[one.stage].unwritable(signatures[one.stage], one.outputs)) for one in made]

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
            **{name: outcomes[name] for name in ("wrong", "format", "type", *KINDS, "cut", "retold")},
            faults=faults_to_dict(faults_of([attempt.rollout for attempt in self.attempts])),
            hinted=sum(attempt.hinted for attempt in solved.values()),
            taught=sum(attempt.taught for attempt in solved.values()),
            more=len(self.successes) - len(solved),
            repeated=outcomes["passed"] - len(self.successes),
            gold=sum(trace.gold for trace in traces),
            unwritable=sum(not writable for _, writable in self._gold),
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
        layout = self.forms[step.stage].typed_layout(self.program.stages[step.stage].signature)
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
        if self.options.gold_answers == "auto" and not all(is_choice(signature.type_of(n)) for n in signature.outputs):
            return None
        outputs = {name: label_text(signature, name, labels[name]) for name in signature.outputs}
        text = self.forms[step.stage].write(signature, outputs)
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
    retold: int = 0
    """runs that succeeded with a hint and speak of it: not learnt from, or the LM would speak of hints it has not"""
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
    unwritable: int = 0
    """unsolved examples that gave none because the form cannot write the gold answer so that it is read back"""
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
            "right but cut at the limit": self.cut,
            "speaking of the hint": self.retold,
            "out of type": self.type,
            "no answer": self.format,
        }
        why |= {f"{kind} faults": getattr(self, kind) for kind in KINDS}
        failed = ", ".join(f"{count} {kind}" for kind, count in why.items() if count) or "none"
        hinted = f", {self.hinted} of them with a hint" if self.hinted else ""
        hinted += f", {self.taught} of them by the teacher" if self.taught else ""
        more = f", {self.more} further traces of them" if self.more else ""
        gold = f", {self.gold} unsolved ones with their gold answer" if self.gold else ""
        gold += f", {self.unwritable} gold answers left out (the form cannot write them)" if self.unwritable else ""
        solved = f"{self.solved} of {self.examples} examples solved{hinted}"
        cut = f"; {self.cut_off} of these were cut at model.sampling.max_new_tokens" if self.cut_off else ""
        return f"{solved} in {self.runs} runs{more}{gold} (failed: {failed}{cut})"


def passing(attempts: Sequence[Attempt], options: Bootstrapping) -> tuple[Attempt, ...]:
    """The attempts that passed; of equal completions of one example the first."""
    found: dict[tuple[str, ...], Attempt] = {}
    for attempt in attempts:
        if _outcome(attempt, options) == "passed":
            said = (attempt.example, *(step.completion.text for step in attempt.rollout.steps))
            found.setdefault(said, attempt)
    return tuple(found.values())


def _outcome(attempt: Attempt, options: Bootstrapping) -> str:
    rollout = attempt.rollout
    if rollout.error is not None:
        return rollout.error.kind
    if rollout.score < options.threshold:
        return "wrong"
    if not options.cut_traces and any(map(_closed, rollout.steps)):
        return "cut"
    return "retold" if attempt.hinted and speaks_of_hint(rollout) else "passed"


def _closed(step: Step) -> bool:
    """Whether the completion, or a field of it, was closed at its limit and not by the LM."""
    return step.completion.finished == "length" or bool(step.closed)
