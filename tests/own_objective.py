"""An objective of one's own, as a user's module holds it: all that it needs, in under forty lines."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch
from cotune.datamodules import Attempt, Bearing, Collected, Trace
from cotune.lightning_modules.objectives import Objective


class LeaveOneOut(Objective):
    """Policy gradient: a run's advantage is its score less the mean of its siblings', shared by its tokens.

    The ratio of probabilities is clipped from above, so that this is no linear loss.
    """

    def rows(self, collected: Collected) -> list[Trace]:
        runs: defaultdict[str, list[Attempt]] = defaultdict(list)
        for attempt in collected.attempts:
            runs[attempt.example].append(attempt)
        rows = []
        for siblings in runs.values():
            total = sum(run.rollout.score for run in siblings)
            for run in siblings:
                own = run.rollout.score
                advantage = own - (total - own) / max(len(siblings) - 1, 1)
                calls = collected.traces(run)
                tokens = sum(len(call.completion_ids) for call in calls)
                rows += [replace(call, ce=(), pg=call.free(advantage / tokens)) for call in calls if advantage]
        return rows

    def loss(self, log_probs: torch.Tensor, tokens: Bearing) -> torch.Tensor:
        ratio = (log_probs[:, 0] - log_probs[:, 0].detach()).exp()
        return -(tokens.pg * ratio.clamp(max=1.2)).sum()

    def size(self, tokens: Bearing) -> float:
        return len(tokens.groups)
