"""Several runs of each example as one: their mean score, or the answer that most of them gave."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from cotune.programs.faults import KINDS
from cotune.programs.rollout import Rollout
from cotune.programs.types import plain

Vote = Literal["mean", "majority"]


def settled(passes: Sequence[Sequence[Rollout]], vote: Vote) -> list[Rollout]:
    """One rollout for each example, of passes over the same examples in the same order.

    With "mean" it is the first pass's with the mean score of all (mean@k). With "majority" it is the first one whose
    prediction most runs of the example came to; runs without a prediction have no vote, and ties go to the earlier.

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
    votes = [None if run.prediction is None else json.dumps(plain(run.prediction), sort_keys=True) for run in runs]
    counted = Counter(vote for vote in votes if vote is not None)
    return runs[votes.index(counted.most_common(1)[0][0])] if counted else runs[0]
