"""Preferences: what passing runs wrote rather than what failing ones did, near to where the weights began."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name for it)
from cotune.datamodules import Bearing, Collected, Runs, Trace
from cotune.errors import BadValueError
from cotune.lightning_modules.objectives.objective import Objective, Reference
from torch import Tensor


class Preference(Objective):
    """What KTO and DPO share: the reward of a call is beta times its log-probability over that at the step's start.

    Args:
        beta: how dear it is to move away from there.
        runs: of each example, by the prompts in force.
        temperature: of these runs.
    """

    rate = 0.1

    def __init__(self, *, beta: float = 0.1, runs: int = 4, temperature: float = 1.0) -> None:
        if not beta > 0:
            raise BadValueError(f"beta {beta:g} must be above 0.")
        self.beta = beta
        self.runs = Runs(runs, temperature)
        self.reference = Reference("start")

    def size(self, tokens: Bearing) -> float:
        """Rows."""
        return len(tokens.groups)

    def apart(self, log_probs: Tensor, tokens: Bearing) -> Tensor:
        """(R,) how much likelier each row's tokens have become, in nats."""
        assert tokens.reference is not None
        return tokens.by_row(tokens.kl * (log_probs[:, 0] - tokens.reference[:, 0]))


class KTO(Preference):
    """Kahneman-Tversky optimization (Ethayarajh et al., 2024): calls of passing runs are good, of failing ones bad.

    A good call's loss is 1 - sigmoid(r - z), a bad one's 1 - sigmoid(z - r): r is its reward and z beta times the
    batch's distance from the start, the mean of its rows' log-ratios and not below 0. It needs no pairs, so calls of
    all stages teach, and where no run passes the failing ones alone do.

    Args:
        good, bad: what a call of either kind counts.
    """

    def __init__(
        self, *, beta: float = 0.1, good: float = 1.0, bad: float = 1.0, runs: int = 4, temperature: float = 1.0
    ) -> None:
        super().__init__(beta=beta, runs=runs, temperature=temperature)
        if good < 0 or bad < 0 or not good + bad > 0:
            raise BadValueError(f"good {good:g} and bad {bad:g} must not be below 0, nor both 0.")
        self.good, self.bad = good, bad

    def rows(self, collected: Collected) -> list[Trace]:
        """Every call in which the LM chose a token, of runs that the user's own code let come to a score."""
        return [
            replace(call, ce=(), kl=call.free(), desirable=attempt.rollout.score >= collected.options.threshold)
            for attempt in collected.judged
            for call in collected.traces(attempt)
            if any(call.free())
        ]

    def said(self, collected: Collected, traces: Sequence[Trace]) -> str:
        good = sum(bool(trace.desirable) for trace in traces)
        return f"{good} good and {len(traces) - good} bad calls"

    def loss(self, log_probs: Tensor, tokens: Bearing) -> Tensor:
        apart_R = self.apart(log_probs, tokens)
        # Where the policy stands as a whole: only what a call does beyond that counts. No gradient goes through it.
        start = apart_R.detach().mean().clamp(min=0)
        good_R = torch.tensor([bool(good) for good in tokens.desirable], device=apart_R.device)
        weight_R = torch.where(good_R, self.good, self.bad)
        gain_R = torch.where(good_R, apart_R - start, start - apart_R)
        return (weight_R * (1 - torch.sigmoid(self.beta * gain_R))).sum()


class DPO(Preference):
    """Direct preference optimization (Rafailov et al., 2023), on calls of one example's runs that saw equal prompts.

    A pair's loss is -log sigmoid(r of the better - r of the worse). The calls of a stage that read equal inputs are
    paired by their runs' scores (equal completions by the mean of theirs), the best with the worst and so on inwards,
    while those differ. Later stages seldom read equal inputs: they teach less here than in KTO.
    """

    def rows(self, collected: Collected) -> list[Trace]:
        alike: defaultdict[tuple[object, ...], list[Trace]] = defaultdict(list)
        for attempt in collected.judged:
            for call in collected.traces(attempt):
                if any(call.free()):
                    alike[call.example, call.stage, tuple(sorted(call.inputs.items()))].append(call)
        rows: list[Trace] = []
        for calls in alike.values():
            # Equal completions can have other scores, by what later stages made of them; they are no preference.
            equal: defaultdict[tuple[int, ...], list[Trace]] = defaultdict(list)
            for call in calls:
                equal[tuple(call.completion_ids)].append(call)
            once = [replace(same[0], score=statistics.fmean(c.score for c in same)) for same in equal.values()]
            ranked = sorted(once, key=lambda call: -call.score)
            for better, worse in zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False):
                if better.score > worse.score:
                    group = f"pair {len(rows) // 2}"
                    rows += [replace(call, ce=(), kl=call.free(), group=group) for call in (better, worse)]
        return rows

    def said(self, collected: Collected, traces: Sequence[Trace]) -> str:
        return f"{len(traces) // 2} pairs of {len({trace.example for trace in traces})} examples"

    def loss(self, log_probs: Tensor, tokens: Bearing) -> Tensor:
        rewards_R = self.beta * self.apart(log_probs, tokens)
        places: defaultdict[str, list[int]] = defaultdict(list)
        for row, group in enumerate(tokens.groups):
            places[group].append(row)
        # Both rows of a pair are in one batch, for they share a group; the better one stands first.
        pairs = [pair for rows in places.values() for pair in zip(rows[::2], rows[1::2], strict=False)]
        pairs_P2 = torch.tensor(pairs, device=rewards_R.device, dtype=torch.long)
        better_P, worse_P = rewards_R[pairs_P2.reshape(-1, 2)].unbind(dim=1)
        return -F.logsigmoid(better_P - worse_P).sum()

    def size(self, tokens: Bearing) -> float:
        """Pairs, those that are repeated to balance stages included."""
        return max(sum(rows // 2 for rows in Counter(tokens.groups).values()), 1)
