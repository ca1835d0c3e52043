"""Several runs of each example as one: their mean score, or the answer that most of them gave."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from cotune.programs.faults import KINDS
from cotune.programs.rollout import Rollout
from cotune.programs.values import normalise, same

Vote = Literal["mean", "majority"]


def settled(passes: Sequence[Sequence[Rollout]], vote: Vote) -> list[Rollout]:
    """One rollout for each example, of passes over the same examples in the same order.

    With "mean" it is the first pass's with the mean score of all (mean@k). With "majority" it is the first one whose
    answer most runs of the example came to; runs without a prediction have no vote, and ties go to the earlier. The
    answer is the fields of the prediction that are labels; where there is none, all but "reasoning" and "scores".
    Answers are equal as metrics compare them: see `same`.

    Where the user's code failed in any run of the example, the one rollout has the first such error, which says in how
    many of the runs, beside the score that they came to.
    """
    if len(passes) == 1:
        return list(passes[0])
    one = _mean if vote == "mean" else _majority
    return [_with_fault(one(runs), runs) for runs in zip(*passes, strict=True)]


def _mean(runs: Sequence[Rollout]) -> Rollout:
    # A run with an error scores 0; one whose siblings succeeded is not the one to show.
    first = next((run for run in runs if run.error is None), runs[0])
    return replace(first, score=math.fsum(run.score for run in runs) / len(runs))


def _with_fault(one: Rollout, runs: Sequence[Rollout]) -> Rollout:
    errors = [run.error for run in runs if run.error is not None and run.error.kind in KINDS]
    if not errors:
        return one
    same = sum(error.kind == errors[0].kind for error in errors)
    return replace(one, error=replace(errors[0], message=f"in {same} of {len(runs)} runs: {errors[0].message}"))


def _majority(runs: Sequence[Rollout]) -> Rollout:
    answers = [_answer(run) for run in runs]
    keys = [_key(answer) for answer in answers]
    given = list(zip(answers, keys, strict=True))
    votes = [sum(_agree(one, other, key, its) for other, its in given) for one, key in given]
    return runs[votes.index(max(votes))]


def _answer(run: Rollout) -> Mapping[str, Any] | None:
    if run.prediction is None:
        return None
    labelled = {name: value for name, value in run.prediction.items() if name in run.example.labels}
    return labelled or {n: value for n, value in run.prediction.items() if n not in ("reasoning", "scores")}


def _key(answer: Mapping[str, Any] | None) -> list[tuple[str, str]] | None:
    """What an answer of texts and numbers equals others by; None for any other."""
    if answer is None or not all(isinstance(v, (str, int, float)) and not isinstance(v, bool) for v in answer.values()):
        return None
    return sorted((name, normalise(value)) for name, value in answer.items())


def _agree(
    one: Mapping[str, Any] | None,
    other: Mapping[str, Any] | None,
    key: list[tuple[str, str]] | None,
    its: list[tuple[str, str]] | None,
) -> bool:
    if key is not None and its is not None:
        return key == its
    # Both ways: a list as label is several right answers, but as a vote it is one answer.
    return one is not None and other is not None and same(one, other) and same(other, one)
