"""The seam: runs in, training rows out; log-probabilities in, gradients out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from cotune.datamodules import Bearing, Collected, Runs, Trace
from cotune.errors import BadValueError
from torch import Tensor


@dataclass(frozen=True)
class Reference:
    """Whose log-probabilities the rows of a collection bring along: known once, before any of them is trained on.

    Attributes:
        weights: "start", those at the weight step's start; "base", without the adapter; "average", the moving average
            of those at the start of each round, of which the newest counts 1 - `decay`; "round", those that the runs
            were drawn with. What these say of the tokens takes the place of `sampled`, to be compared with later.
        prompts: "rows", which stand in the training rows, or "before", those in force when the step began.
        top_k: ids that it finds likeliest at each token become the row's candidates.
        choice_temperature: of the probabilities with which calibrated prompts decide a choice, in (0, 1].
    """

    weights: Literal["start", "base", "average", "round"] = "start"
    prompts: Literal["rows", "before"] = "rows"
    top_k: int = 0
    decay: float = 0.9
    choice_temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise BadValueError(f"top_k {self.top_k} is below 0; 0 takes no candidates.")
        if not 0 <= self.decay < 1:
            raise BadValueError(f"decay {self.decay:g} of the average is outside [0, 1).")
        if not 0 < self.choice_temperature <= 1:
            raise BadValueError(f"choice_temperature {self.choice_temperature:g} is outside (0, 1].")


class Objective(ABC):
    """What a weight step makes of the program's runs.

    Subclasses say which runs are learnt from and how much each of their tokens weighs (`rows`), and what is to become
    small (`loss`). The training step does the rest: it renders and packs the rows, computes the log-probabilities of
    their tokens, asks for the loss's derivatives by these, and makes gradients of them. A loss is always asked for over
    the whole batch, so cutting a batch into parts changes no more than the order of a sum.

    Attributes:
        runs: the runs of each example that it learns from; None for tries until one passes (`Bootstrapping`). With
            them a weight step collects before every epoch, unless it is told how many epochs share a collection.
        reference: whose log-probabilities the rows bring along; None for nobody's.
        rate: share of the learning rate that fits the LM's size, where that is taken.
    """

    runs: Runs | None = None
    reference: Reference | None = None
    rate: float = 1.0

    @abstractmethod
    def rows(self, collected: Collected) -> list[Trace]:
        """The stage calls to learn from, chosen among all runs of a collection, passing or not."""

    def said(self, collected: Collected, traces: Sequence[Trace]) -> str:
        """What to say of the rows, beside the counts of runs that passed and failed; "" for nothing."""
        return ""

    @abstractmethod
    def loss(self, log_probs: Tensor, tokens: Bearing) -> Tensor:
        """() the loss of a batch, a sum: the step divides it by `size`.

        Args:
            log_probs: (n, K) of `tokens.ids`, in nats; 0 where there is no candidate.
        """

    def coefficients(self, log_probs: Tensor, tokens: Bearing) -> Tensor:
        """(n, K) dLoss/dlog_prob. Override it where what is wanted is no derivative of a loss."""
        with torch.enable_grad():
            at = log_probs.detach().requires_grad_()
            (found,) = torch.autograd.grad(self.loss(at, tokens), at)
        return found

    def reads(self, tokens: Bearing) -> Sequence[Literal["policy", "reference"]]:
        """The log-probabilities that the coefficients of a batch depend on: each costs a pass without gradient before.

        "policy" are the LM's own. "reference" are those of the base, its adapter switched off, and stand in
        `tokens.reference`; rows that bring a reference along need no pass. Empty: the loss is linear in the LM's own.
        """
        return ("policy",)

    def size(self, tokens: Bearing) -> float:
        """What a batch counts as: its loss is divided by it, and batches that accumulate count by it. Its tokens."""
        return len(tokens.rows)


class Weighted(Objective):
    """The three streams as the rows weigh them, added.

    - `ce`: the negative log-likelihood, times the weight.
    - `pg`: the policy gradient of a run drawn from the LM as it is, the weight being the advantage. Only its gradient
      means something; its value is that of the same formula.
    - `kl`: the estimate exp(r - p) - (r - p) - 1 of the divergence from the reference at the token that was drawn
      (Schulman, 2020), times the weight; p and r are log-probabilities under LM and reference.
    """

    def loss(self, log_probs: Tensor, tokens: Bearing) -> Tensor:
        own = log_probs[:, 0]
        each = -(tokens.ce + tokens.pg) * own
        if tokens.reference is not None:
            apart = torch.where(tokens.kl != 0, tokens.reference[:, 0] - own, 0.0)
            each = each + tokens.kl * (apart.exp() - apart - 1)
        return tokens.by_row(each).sum()

    def reads(self, tokens: Bearing) -> Sequence[Literal["policy", "reference"]]:
        return ("policy", "reference") if bool(tokens.kl.any()) else ()
