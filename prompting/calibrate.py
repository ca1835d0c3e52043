"""Calibrated search: what the LM says whatever it is asked is taken off its choices, and another search goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from cotune.programs import Completion, Example, Prompts, Request, Rollout, Runner, Sampling, prompts_id
from cotune.programs.calibration import offsets_of
from cotune.programs.forms import forms_of
from cotune.programs.layout import Choices, Field, Layout
from cotune.programs.program import Program
from cotune.programs.types import is_choice
from cotune.prompting.around import SearchAround, joined
from cotune.prompting.evaluate import CountingLM, Proposal, choose
from cotune.prompting.search import Found, PromptSearch, SearchTask, at_least, searched

_ROUNDS = 2
"""How often the program runs to calibrate several stages: later ones see what earlier ones answer once calibrated."""

_FIRST = 2
"""If a stage's choices have no chances in so many calls, none are to be expected, and no more runs are made."""

_NO_PLACE = "nothing was calibrated: it takes a form with a place for each field"
_NO_CHANCES = "nothing was calibrated: the LM tells no probabilities of choices; it takes an LM in this process"


class CalibratedSearch(SearchAround):
    """Calibrates the choices of every stage, lets another search improve the prompts, and calibrates its best again.

    Small LMs favour some choices whatever the input. The program runs over train inputs, without their labels, and the
    mean log-probability of each choice is subtracted (batch calibration, Zhou et al., 2024). Calibrated prompts are
    candidates like any others: they are kept only if they score better on dev. The calibration is part of the
    prompts, so rollouts, later steps and the export use it. For a program without choices only `then` runs.

    Args:
        then: the search that improves the prompts (default: `RandomDemoSearch`).
        inputs: compute a calibration from at most this many train examples.
        anew: how many of the best candidates of `then` are calibrated again, with their demos.
    """

    def __init__(self, then: PromptSearch | None = None, inputs: int = 50, anew: int = 2) -> None:
        super().__init__(then)
        at_least(2, "inputs", inputs, "it takes several inputs to see what the LM says whatever it is asked")
        at_least(0, "anew", anew, "0 keeps the calibration that the search inside began with")
        self.inputs, self.anew = inputs, anew

    def for_program(self, program: Program) -> PromptSearch:
        return self if _has_choices(program) else self.then.for_program(program)

    def most_runs(self, train: int, dev: int) -> int | None:
        most = self.then.most_runs(train, dev)
        return None if most is None else most + (2 + self.anew) * (self._runs(train) + dev) + 2 * dev

    def _runs(self, train: int) -> int:
        """Most runs of the program for one calibration."""
        return _ROUNDS * min(train, self.inputs)

    def search(self, task: SearchTask) -> Found:
        if (search := self.for_program(task.runner.program)) is not self:
            return searched(search, task)
        calls = CountingLM(task.runner.lm)
        counted = replace(task, runner=replace(task.runner, lm=calls))
        initial = self._calibrated(counted, calls, task.initial)
        if not initial.changed:
            found = searched(self.then, replace(task, lm_calls=max(0, task.lm_calls - calls.calls)))
            return replace(found, notes=(*initial.notes, *found.notes))
        proposals = [Proposal(initial.prompts, "calibrated zero-shot", prompts_id(task.initial))]
        if prompts_id(task.incumbent) != prompts_id(task.initial):
            incumbent = self._calibrated(counted, calls, task.incumbent)
            proposals.append(Proposal(incumbent.prompts, "calibrated incumbent", prompts_id(task.incumbent)))
        tried = choose(counted, proposals, notes=initial.notes)
        # Demo sets are built upon the initial prompts: the calibrated ones, where calibration pays.
        begin = initial.prompts if any(one.calibration for one in tried.prompts.values()) else task.initial
        found = searched(self.then, replace(counted, initial=begin, incumbent=tried.prompts, lm_calls=0))
        parts = [tried, found, self._anew(counted, calls, tried, found)]
        if (left := task.lm_calls - calls.calls) > 0:
            more = replace(counted, initial=begin, incumbent=parts[-1].prompts, lm_calls=left, seed=task.seed + 1)
            parts.append(searched(self.then, more))
        return joined(parts)

    def _anew(self, task: SearchTask, calls: CountingLM, tried: Found, found: Found) -> Found:
        """The best of what was found, calibrated with the demos that they have, against the best so far."""
        known = {candidate.id for candidate in tried.candidates}
        fresh = [c for c in found.candidates if c.id not in known and not c.pruned]
        best = sorted(fresh, key=lambda candidate: candidate.rank, reverse=True)[: self.anew]
        proposals = [
            Proposal(self._calibrated(task, calls, one.prompts).prompts, f"{one.why}, calibrated", one.id)
            for one in best
        ]
        return choose(replace(task, incumbent=found.prompts), proposals)

    def _calibrated(self, task: SearchTask, calls: CountingLM, prompts: Prompts) -> _Calibrated:
        """The prompts with offsets for all choices of all stages."""
        shown = {demo.source for prompt in prompts.values() for demo in prompt.demos}
        examples = [example for example in task.train if example.id not in shown][: self.inputs]
        counted = replace(task, runner=replace(task.runner, lm=_Asking(calls), metric=None, max_error_rate=1.0))
        places = _with_places(task.runner, prompts)
        if not places:
            return _Calibrated(prompts, False, (_NO_PLACE,))
        now = dict(prompts)
        for _ in range(_ROUNDS):
            done = _rollouts(counted, examples, now, places)
            told = _chances(done)
            for (stage, field), chances in told.items():
                nats = offsets_of(chances, now[stage].calibration.get(field, {}))
                now[stage] = replace(now[stage], calibration={**now[stage].calibration, field: nats})
            if len(told) < 2:
                break
        if told:
            return _Calibrated(now, True, ())
        silent = _answers(done, places) >= _FIRST and not _any_chances(done)
        never = f"nothing was calibrated: no stage filled in its choices twice (train inputs run: {len(examples)})"
        return _Calibrated(now, False, (_NO_CHANCES if silent else never,))


@dataclass(frozen=True)
class _Calibrated:
    """Prompts with calibrations; whether any choice has one; what to say."""

    prompts: Prompts
    changed: bool
    notes: tuple[str, ...]


class _Asking:
    """An LM that is asked for the chances of choices as well; what is counted is counted by the one inside."""

    def __init__(self, lm: CountingLM) -> None:
        self._lm, self.counted, self.count = lm, lm.counted, lm.count

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        return self._lm.complete([replace(one, chances=_has_place(one.layout)) for one in requests], sampling)


def _rollouts(
    task: SearchTask, examples: Sequence[Example], prompts: Prompts, places: Collection[str]
) -> list[Rollout]:
    """Runs of the examples: of all where the LM tells chances, else of those until it has had two calls to do so."""
    if task.progress is not None:
        task.progress.start(len(examples), "calibration")
    advance = None if task.progress is None else task.progress.advance
    done: list[Rollout] = []
    while len(done) < len(examples):
        told = _any_chances(done)
        if not told and _answers(done, places) >= _FIRST:
            break
        end = len(examples) if told else max(_FIRST, 2 * len(done))  # a stage behind a branch may be reached late
        done += task.runner.run(examples[len(done) : end], prompts, seed=task.seed, progress=advance)
    return done


def _with_places(runner: Runner, prompts: Prompts) -> list[str]:
    """The stages whose choices have a place of their own in the form of their prompts."""
    stages = runner.program.stages.items()
    forms = forms_of(runner.form, prompts)
    return [name for name, stage in stages if _has_place(forms[name].typed_layout(stage.signature))]


def _has_place(layout: Layout) -> bool:
    return any(isinstance(part, Field) and isinstance(part.syntax, Choices) for part in layout)


def _answers(done: Sequence[Rollout], places: Collection[str]) -> int:
    """How often the one of these stages answered that did so most often."""
    steps = (step for rollout in done for step in rollout.steps if step.stage in places)
    counts = Counter(step.stage for step in steps if step.completion.finished not in ("too_long", "refused"))
    return max(counts.values(), default=0)


def _any_chances(done: Sequence[Rollout]) -> bool:
    return any(step.completion.chances for rollout in done for step in rollout.steps)


def _has_choices(program: Program) -> bool:
    signatures = [stage.signature for stage in program.stages.values()]
    return any(is_choice(signature.type_of(name)) for signature in signatures for name in signature.outputs)


def _chances(done: Sequence[Rollout]) -> dict[tuple[str, str], list[dict[str, float]]]:
    """(stage, field) -> the chances of its choices, call by call, where there are two calls or more."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for step in (step for rollout in done for step in rollout.steps):
        for field, chances in step.completion.chances.items():
            found.setdefault((step.stage, field), []).append(dict(chances))
    return {key: calls for key, calls in found.items() if len(calls) > 1}
