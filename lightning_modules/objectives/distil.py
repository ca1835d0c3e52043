"""Distillation: the weights learn to do without the prompts what they do with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from cotune.datamodules import Bearing, Collected, Runs, Trace
from cotune.errors import BadValueError
from cotune.lightning_modules.objectives.objective import Objective, Reference
from torch import Tensor

_LEAST_TAIL = 1e-5
"""Least probability of all that is no candidate: 1 less a sum of others is no more exact than that in fp32."""

_NEVER = -1e4
"""The log-probability of no token at all, with which there is still arithmetic."""


class Distil(Objective):
    """On-policy distillation of the prompts into the weights (SDFT, OPCD, SDPRO).

    The student runs the program by its own plain prompts. The teacher, the same LM with the prompts in force before the
    step (instruction and demos), says of each token that the student chose how likely every other would have been. The
    loss is the divergence of the two, in nats, over the teacher's `top_k` likeliest tokens and all others as one more
    outcome. Every stage call of every run teaches, passing or not: no reward is read.

    Args:
        top_k: candidates at each token.
        teacher: whose weights the teacher has, those at the step's "start", of the "base" without its adapter, or a
            moving "average" of those at the rounds' starts, of which the newest counts 1 - `decay`.
        runs: of each example.
        temperature: of these runs.
        choice_temperature: where calibrated prompts decide a choice, the teacher's probabilities are taken at this
            temperature. They are close to each other there, however much better the likeliest is, so that as they are
            they teach the student little about which to choose. Elsewhere they stay as they are.
        alpha: 0 for KL(teacher || student), 1 for KL(student || teacher); between them the generalised Jensen-Shannon
            divergence: alpha KL(teacher || m) + (1 - alpha) KL(student || m), m being that mixture of the two.
    """

    def __init__(
        self,
        *,
        top_k: int = 50,
        teacher: Literal["start", "base", "average"] = "start",
        decay: float = 0.9,
        runs: int = 1,
        temperature: float = 1.0,
        choice_temperature: float = 0.1,
        alpha: float = 0.0,
    ) -> None:
        if top_k < 1:
            raise BadValueError(f"top_k {top_k} is below 1: there would be nothing to compare.")
        if not 0 <= alpha <= 1:
            raise BadValueError(f"alpha {alpha:g} is outside [0, 1].")
        self.alpha = alpha
        self.runs = Runs(runs, temperature, prompts="initial")
        self.reference = Reference(teacher, "before", top_k, decay, choice_temperature)

    def rows(self, collected: Collected) -> list[Trace]:
        """Every stage call of every run in which the LM chose a token; what was put there weighs nothing."""
        calls = [call for attempt in collected.attempts for call in collected.traces(attempt)]
        return [replace(call, ce=(), kl=call.free()) for call in calls if any(call.free())]

    def loss(self, log_probs: Tensor, tokens: Bearing) -> Tensor:
        assert tokens.reference is not None
        # Column 0 is the token that was written; the candidates stand behind it, fewer than K where -1 fills up.
        nobody_nK = tokens.ids[:, 1:] < 0
        student = _with_tail(log_probs[:, 1:].masked_fill(nobody_nK, _NEVER))
        teacher = _with_tail(tokens.reference[:, 1:].masked_fill(nobody_nK, _NEVER))
        return (tokens.kl * self._divergence(student, teacher)).sum()

    def reads(self, tokens: Bearing) -> Sequence[Literal["policy", "reference"]]:
        return ("policy",)

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(n,) of two (n, K + 1) distributions, in log-probabilities."""
        # The ends are no limit of the mixture's formula, which is 0 there; so they are named.
        if self.alpha == 0:
            return _kl(teacher, student)
        if self.alpha == 1:
            return _kl(student, teacher)
        shares = torch.tensor([1 - self.alpha, self.alpha], dtype=student.dtype, device=student.device).log()
        mixed = torch.logaddexp(student + shares[0], teacher + shares[1])
        return self.alpha * _kl(teacher, mixed) + (1 - self.alpha) * _kl(student, mixed)


def _with_tail(log_probs_nK: Tensor) -> Tensor:
    """(n, K + 1) with what is left of probability as the last outcome."""
    # Rounding can bring the sum above 1, and the logarithm of nothing has no gradient.
    left = (1 - log_probs_nK.exp().sum(dim=1, keepdim=True)).clamp(min=_LEAST_TAIL)
    return torch.cat([log_probs_nK, left.log()], dim=1)


def _kl(of: Tensor, by: Tensor) -> Tensor:
    """(n,) KL(of || by)."""
    return (of.exp() * (of - by)).sum(dim=1)
