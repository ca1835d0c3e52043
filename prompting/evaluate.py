"""Scoring candidates on dev: each prompts once, and no further than the winner needs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from types import MappingProxyType
from typing import Any

from cotune.errors import BadValueError
from cotune.programs import (
    LM,
    Completion,
    Example,
    Faults,
    Prompts,
    Request,
    Rollout,
    Sampling,
    faults_of,
    prompts_id,
)
from cotune.programs.faults import check_errors, merged, quoted
from cotune.prompting.racing import contenders
from cotune.prompting.search import UNREADABLE, BadPromptsError, Candidate, Found, SearchTask, check_prompts

_STRIDE = 16
"""Examples between two looks at a race. Fewer drop candidates sooner, and the best one more often."""


_MAX_REPEATS = 100


@dataclass(frozen=True)
class Proposal:
    """Prompts to be tried; see `Candidate` for `parent` and `why`."""

    prompts: Prompts
    why: str
    parent: str = ""


def choose(
    task: SearchTask,
    proposals: Sequence[Proposal],
    *,
    chunk: int = 64,
    racing: float | None = None,
    notes: Sequence[str] = (),
    faults: Faults = MappingProxyType({}),
) -> Found:
    """Scores the incumbent and then every proposal, and keeps the best (`Candidate.rank`); ties go to the earlier.

    Equal prompts are scored once: a later equal is left out and noted.

    Args:
        chunk: examples an LM batch. Pruning decides between chunks, so a small one prunes sooner.
        racing: None scores one candidate after the other and prunes only what cannot win any more. A confidence, such
            as 0.98, runs all of them side by side on the same examples and drops those that are behind with that
            confidence (see `racing.contenders`): about half the rollouts from 100 examples on, and now and then the
            best candidate is dropped for one nearly as good. The incumbent always runs to the end, so the result is
            still never worse on dev. Dev should stand in random order.
        notes, faults: of what the search did before; those that arise here are added.

    Raises:
        FaultyProgramError: as `score_candidate`.
        ValueError: chunk is below 1, racing is outside (0.5, 1), or a proposal's prompts are none of the program's.
    """
    for proposal in proposals:
        _check(proposal, task)
    # Incumbent first: ties keep the prompts we already trusted.
    kept, repeats = _distinct([Proposal(task.incumbent, "incumbent"), *proposals])
    if racing is None:
        best, scored = _one_by_one(task, kept, chunk)
    else:
        best, scored = _race(task, kept, racing)
        repeats += [
            f'"{one.why}" dropped by racing after {len(one.scores)} of {len(task.dev)} dev examples'
            for one in scored
            if one.pruned
        ]
    notes = (*notes, *repeats, *error_notes(scored, len(task.dev)))
    faults = merged(faults, *(candidate.faults for candidate in scored))
    return Found(best.prompts, best.score, tuple(scored), notes, faults)


def go_on(
    task: SearchTask, found: Found, proposals: Iterable[Proposal], *, until: Callable[[], bool], chunk: int = 64
) -> Found:
    """Scores further proposals after a search, one by one, until enough has been done; ties go to the earlier.

    Ends at a full score, which nothing beats. Gives up, with a note, after a hundred proposals in a row that have been
    tried before.
    """
    tried, scored, notes, repeats = {c.id for c in found.candidates}, list(found.candidates), list(found.notes), 0
    best = next(candidate for candidate in scored if candidate.id == prompts_id(found.prompts))
    faults = found.faults
    for proposal in proposals:
        if until() or repeats == _MAX_REPEATS or _beaten([], len(task.dev), best):
            break
        if prompts_id(proposal.prompts) in tried:
            repeats += 1
            continue
        candidate = score_candidate(task, proposal, beat=best, chunk=chunk)
        repeats, faults = 0, merged(faults, candidate.faults)
        tried.add(candidate.id)
        scored.append(candidate)
        if not candidate.pruned and candidate.rank > best.rank:
            best = candidate
        if task.progress is not None:
            task.progress.candidate(len(scored) - 1, len(scored), candidate, best.score)
    if _beaten([], len(task.dev), best):
        notes.append("ended with a full score on dev")
    elif not until():
        notes.append(f"there were no more candidates to try after {len(scored)}")
    notes += error_notes(scored[len(found.candidates) :], len(task.dev))
    return Found(best.prompts, best.score, tuple(scored), tuple(notes), faults)


class CountingLM:
    """An LM that counts its calls, those answered from a store included.

    Attributes:
        calls: so far.
    """

    def __init__(self, lm: LM) -> None:
        self._lm, self.calls = lm, 0

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.calls += len(requests)
        return self._lm.complete(requests, sampling)

    @property
    def codec(self) -> Any:
        """The LM's; None of one without a tokenizer in this process."""
        return getattr(self._lm, "codec", None)

    def counted(self) -> dict[str, float]:
        """The calls so far; see `Counter`."""
        return {"calls": self.calls}

    def count(self, more: Mapping[str, float]) -> None:
        self.calls += int(more["calls"])
        if isinstance(self._lm, CountingLM):  # which made the same calls, and whose count nobody else keeps
            self._lm.count(more)


def _one_by_one(task: SearchTask, kept: Sequence[Proposal], chunk: int) -> tuple[Candidate, list[Candidate]]:
    """The best candidate and all of them, each scored as far as it can still win."""
    best: Candidate | None = None
    scored: list[Candidate] = []
    for index, proposal in enumerate(kept):
        candidate = score_candidate(task, proposal, beat=best, chunk=chunk)
        scored.append(candidate)
        if best is None or (not candidate.pruned and candidate.rank > best.rank):
            best = candidate
        if task.progress is not None:
            task.progress.candidate(index, len(kept), candidate, best.score)
    assert best is not None  # the incumbent is always there
    return best, scored


def _race(task: SearchTask, kept: Sequence[Proposal], confidence: float) -> tuple[Candidate, list[Candidate]]:
    """The best candidate and all of them, run side by side; see `choose`. One LM batch holds all still in the race."""
    scored = _raced(task, kept, confidence, stays=0)  # the incumbent stays to the end
    best = max((one for one in scored if not one.pruned), key=lambda candidate: candidate.rank)  # the first of equals
    if task.progress is not None:
        for index, candidate in enumerate(scored):
            task.progress.candidate(index, len(scored), candidate, best.score)
    return best, scored


def race_against(
    task: SearchTask, best: Candidate, proposals: Sequence[Proposal], *, confidence: float
) -> list[Candidate]:
    """The proposals, run side by side on dev against a candidate that has run on all of it; see `choose` for racing.

    Those that fall behind it, or behind one another, with the confidence given are dropped: they are `pruned`.

    Raises:
        FaultyProgramError, ValueError: as `choose`.
    """
    return _raced(task, proposals, confidence, known=best.scores)


def _raced(
    task: SearchTask,
    kept: Sequence[Proposal],
    confidence: float,
    *,
    stays: int | None = None,
    known: Sequence[float] = (),
) -> list[Candidate]:
    """Each proposal with its runs up to where it dropped out of the race.

    Args:
        stays: place of one that runs to the end.
        known: scores on all of dev of a further runner.
    """
    if not 0.5 < confidence < 1:
        raise BadValueError(
            f"racing {confidence} is outside (0.5, 1); it is the confidence at which a candidate is dropped, e.g. 0.98."
        )
    total = len(task.dev)
    done: list[list[Rollout]] = [[] for _ in kept]
    running = list(range(len(kept)))
    if task.progress is not None:
        task.progress.start(total * len(kept), "race")
    for start in range(0, total, _STRIDE):
        examples = task.dev[start : start + _STRIDE]
        prompts = [kept[at].prompts for at in running for _ in examples]
        ran = iter(_run(task, prompts, [*examples] * len(running)))
        for at in running:
            done[at] += islice(ran, len(examples))
            check_faults(done[at], task)
        scores = {at: [rollout.score for rollout in done[at]] for at in running}
        if known:
            scores[-1] = list(known[: start + len(examples)])
        left = {*contenders(scores, total, confidence=confidence), *([] if stays is None else [stays])}
        running = sorted(left - {-1})
        if not running:
            break
    return [candidate_of(proposal, runs, total) for proposal, runs in zip(kept, done, strict=True)]


def score_candidate(
    task: SearchTask, proposal: Proposal, *, beat: Candidate | None = None, chunk: int = 64
) -> Candidate:
    """Runs the proposal on dev, and stops as soon as it cannot rank above `beat` any more.

    The pruning is exact. Scores are at most 1, so (sum so far + examples left) / examples bounds the final mean, and
    answers without a value do not get fewer; at or below `beat` the candidate cannot win, ties going to the earlier.
    Sums are `fsum`s, which round monotonically: no rounding can put the bound under the mean it bounds.

    Args:
        beat: the best complete candidate so far; None scores all of dev.
        chunk: examples an LM batch.

    Raises:
        FaultyProgramError: the user's code raised on more of dev than `task.runner.max_error_rate` allows.
        ValueError: chunk is below 1, or the proposal's prompts are none of the program's.
    """
    _check(proposal, task)
    if chunk < 1:
        raise BadValueError(f"chunk {chunk} is below 1; it is the number of examples in an LM batch.")
    if task.progress is not None:
        task.progress.start(len(task.dev), proposal.why)
    done: list[Rollout] = []
    while len(done) < len(task.dev) and not _beaten(done, len(task.dev), beat):
        done += _run(task, proposal.prompts, task.dev[len(done) : len(done) + chunk])
        check_faults(done, task)
    return candidate_of(proposal, done, len(task.dev))


def candidate_of(proposal: Proposal, done: Sequence[Rollout], total: int) -> Candidate:
    """The proposal with its runs on the first examples of dev; pruned where these are fewer than `total`."""
    scores = tuple(rollout.score for rollout in done)
    errors: Counter[str] = Counter(rollout.error.kind for rollout in done if rollout.error is not None)
    pruned = len(done) < total
    return Candidate(proposal.prompts, scores, proposal.parent, proposal.why, pruned, dict(errors), faults_of(done))


def _check(proposal: Any, task: SearchTask) -> None:
    if not isinstance(proposal, Proposal):
        raise BadPromptsError(f'a proposal is {quoted(proposal)}; give a Proposal(prompts, why="...").')
    check_prompts(f'the prompts of proposal "{proposal.why}"', proposal.prompts, task)


def _run(task: SearchTask, prompts: Prompts | Sequence[Prompts], examples: Sequence[Example]) -> list[Rollout]:
    runner = replace(task.runner, max_error_rate=1.0)  # of a chunk; of dev it is checked below
    progress = None if task.progress is None else task.progress.advance
    # The same draws for every candidate: they differ by their prompts alone.
    return runner.run(examples, prompts, seed=task.seed, progress=progress)


def _beaten(done: Sequence[Rollout], total: int, beat: Candidate | None) -> bool:
    bound = math.fsum([*(rollout.score for rollout in done), total - len(done)]) / total
    unreadable = sum(rollout.error is not None and rollout.error.kind in UNREADABLE for rollout in done)
    return beat is not None and (bound, -unreadable) <= beat.rank


def check_faults(done: Sequence[Rollout], task: SearchTask) -> None:
    """Raises once the faults are too many for the whole of dev; one fault in a small chunk is not a faulty program."""
    faults = sum(fault.count for fault in faults_of(done).values())
    if faults > task.runner.max_error_rate * len(task.dev):
        check_errors(done, max_error_rate=task.runner.max_error_rate)


def _distinct(proposals: Sequence[Proposal]) -> tuple[list[Proposal], list[str]]:
    first: dict[str, Proposal] = {}
    repeats = []
    for proposal in proposals:
        earlier = first.setdefault(prompts_id(proposal.prompts), proposal)
        if earlier is not proposal:
            repeats.append(f'"{proposal.why}" equals "{earlier.why}": not scored again')
    return list(first.values()), repeats


def error_notes(scored: Sequence[Candidate], total: int) -> list[str]:
    """A note for each kind of error of each candidate."""
    return [
        f'"{candidate.why}": {count} {kind} errors in {len(candidate.scores)} of {total} dev examples, each scored 0'
        for candidate in scored
        for kind, count in sorted(candidate.errors.items())
    ]
