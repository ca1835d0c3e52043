"""Policy gradient: a run's calls become likelier as it scored better than the other runs of its example."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from cotune.datamodules import Bearing, Collected, Runs, Trace
from cotune.errors import BadValueError
from cotune.lightning_modules.objectives.objective import Objective, Reference
from torch import Tensor

Variant = Literal["grpo", "dr_grpo", "dapo", "cispo"]

_HIGHEST: dict[Variant, float] = {"grpo": 0.2, "dr_grpo": 0.2, "dapo": 0.28, "cispo": 4.0}


class GRPO(Objective):
    """Group-relative policy optimization (Shao et al., 2024) of whole runs, and what was made of it.

    Each example is run `runs` times by the prompts in force. A run's advantage A is its score less its siblings' mean,
    over their standard deviation, and all tokens that the LM chose in all of its calls have it. Examples whose runs all
    scored alike teach nothing and are left out. With q the ratio of a token's probability to that at the round's start:

    - "grpo": -min(q A, clip(q, 1 - low, 1 + high) A), each token by 1 / (tokens of its run): the mean over runs.
    - "dr_grpo": A is not divided by the deviation; tokens weigh alike, and the sum is over rows times `length`.
    - "dapo": tokens weigh alike, the mean over tokens; `high` is wider than `low`.
    - "cispo": -min(q, high) A log p, the ratio without gradient; the mean over tokens. No token is without gradient.

    Args:
        variant: which of these.
        runs: of each example, 2 or more.
        temperature: of these runs.
        low, high: how far the ratio counts; `high` is null for the variant's own (0.2, 0.28 or, for cispo, 4.0).
        kl: weight of the divergence from the base, the adapter switched off, as the estimate
            exp(r - p) - (r - p) - 1 at each token; 0 computes none.
        length: what "dr_grpo" divides by, in place of a row's own number of tokens.
    """

    rate = 0.1

    def __init__(
        self,
        variant: Variant = "grpo",
        *,
        runs: int = 8,
        temperature: float = 1.0,
        low: float = 0.2,
        high: float | None = None,
        kl: float = 0.0,
        length: int = 256,
    ) -> None:
        if variant not in _HIGHEST:
            raise BadValueError(f'variant "{variant}" is none of {", ".join(_HIGHEST)}.')
        if runs < 2:
            raise BadValueError(f"runs {runs} is below 2; each run of an example is compared with its others.")
        for name, value in (("low", low), ("high", high or 0.0), ("kl", kl)):
            if value < 0:
                raise BadValueError(f"{name} {value:g} is below 0.")
        if length < 1:
            raise BadValueError(f"length {length} is below 1.")
        self.variant, self.low, self.high = variant, low, _HIGHEST[variant] if high is None else high
        self.kl, self.length = kl, length
        self.runs = Runs(runs, temperature)
        self.reference = Reference("round")

    def rows(self, collected: Collected) -> list[Trace]:
        """The calls of all runs of examples that had better and worse ones."""
        rows: list[Trace] = []
        for runs in collected.siblings:
            scores = [run.rollout.score for run in runs]
            # A flat group has no better run to learn from; its advantages are all 0, or noise over 1e-4.
            if max(scores) == min(scores):
                continue
            mean = statistics.fmean(scores)
            scale = 1.0 if self.variant == "dr_grpo" else statistics.stdev(scores) + 1e-4
            for run, score in zip(runs, scores, strict=True):
                rows += self._weighted(collected.traces(run), (score - mean) / scale)
        return rows

    def _weighted(self, calls: Sequence[Trace], advantage: float) -> list[Trace]:
        """A run's calls; the `kl` stream holds what a token weighs, and `pg` that times the advantage."""
        # Over all calls of the run, so that a run of many stages does not outweigh one of few.
        chosen = sum(sum(call.free()) for call in calls)
        weight = {"grpo": 1 / max(chosen, 1), "dr_grpo": 1 / self.length}.get(self.variant, 1.0)
        return [
            replace(call, ce=(), pg=call.free(advantage * weight), kl=call.free(weight))
            for call in calls
            if any(call.free())
        ]

    def said(self, collected: Collected, traces: Sequence[Trace]) -> str:
        groups = collected.siblings
        flat = sum(len({run.rollout.score for run in runs}) == 1 for runs in groups)
        return f"{flat} of {len(groups)} examples are left out, as all their runs have the same score"

    def loss(self, log_probs: Tensor, tokens: Bearing) -> Tensor:
        own = log_probs[:, 0]
        ratio = (own - tokens.sampled).exp()
        if self.variant == "cispo":
            # The ratio only weighs: no token loses its gradient by being clipped.
            each = -ratio.detach().clamp(max=self.high) * tokens.pg * own
        else:
            # Clipping takes the gradient where a step has gone far enough, and never where it went the wrong way.
            each = -torch.minimum(tokens.pg * ratio, tokens.pg * ratio.clamp(1 - self.low, 1 + self.high))
        if self.kl:
            assert tokens.reference is not None
            apart = tokens.reference[:, 0] - own
            # An estimate of KL(policy || reference) that is never below 0 (Schulman's k3).
            each = each + self.kl * tokens.kl * (apart.exp() - apart - 1)
        return each.sum()

    def reads(self, tokens: Bearing) -> Sequence[Literal["policy", "reference"]]:
        return ("policy", "reference") if self.kl else ("policy",)

    def size(self, tokens: Bearing) -> float:
        """Runs (as far as they are in the batch) for "grpo", rows for "dr_grpo", tokens for the others."""
        return len(tokens.groups) if self.variant == "dr_grpo" else float(tokens.kl.sum())
