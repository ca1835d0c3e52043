"""Drawing tokens: from a row's own random numbers alone, whatever stands beside it in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sample(logits_BV: Tensor, draws_B: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """(B,) token ids drawn by inverse CDF from each row's nucleus (Holtzman et al., 2020).

    Args:
        logits_BV: unnormalised log-probabilities.
        draws_B: a uniform number in [0, 1) a row; equal logits and draws give equal tokens.
        top_p: sample among the fewest likeliest tokens whose probabilities reach this.
    """
    probabilities_BV = torch.softmax(logits_BV.double() / temperature, dim=-1)
    if top_p >= 1:
        return _inverse_cdf(probabilities_BV, draws_B)
    # Sorting 50k entries a row is slow; the head of the order nearly always holds the nucleus.
    count = min(256, probabilities_BV.shape[-1])
    head_BK, order_BK = probabilities_BV.topk(count, dim=-1)
    tokens_B = _from_nucleus(head_BK, order_BK, draws_B, top_p)
    wide_B = head_BK.sum(dim=-1) < top_p
    if bool(wide_B.any()):
        # Only these rows: among equal probabilities the two orders differ, and a neighbour must not choose the order.
        whole_BV, order_BV = probabilities_BV[wide_B].sort(dim=-1, descending=True, stable=True)
        tokens_B[wide_B] = _from_nucleus(whole_BV, order_BV, draws_B[wide_B], top_p)
    return tokens_B


def log_probs(logits_BV: Tensor, tokens: Sequence[int], *, temperature: float) -> list[float]:
    """The log-probability of each row's token at this temperature; at 1 where it is 0."""
    chosen_B1 = torch.tensor(tokens, device=logits_BV.device)[:, None]
    scaled_BV = logits_BV.double() / (temperature or 1.0)
    found: list[float] = scaled_BV.log_softmax(dim=-1).gather(1, chosen_B1)[:, 0].tolist()
    return found


def _from_nucleus(head_BK: Tensor, order_BK: Tensor, draws_B: Tensor, top_p: float) -> Tensor:
    before_BK = head_BK.cumsum(dim=-1) - head_BK
    # By the sum before a token, not with it: the one that reaches top_p is in, and so the first always is.
    nucleus_BK = head_BK.masked_fill(before_BK >= top_p, 0.0)
    return order_BK.gather(1, _inverse_cdf(nucleus_BK, draws_B)[:, None])[:, 0]


def _inverse_cdf(weights_BK: Tensor, draws_B: Tensor) -> Tensor:
    cumulative_BK = weights_BK.cumsum(dim=-1)
    # Of the sum there is, which a nucleus and rounding keep from being 1.
    wanted_B1 = draws_B[:, None].to(cumulative_BK.dtype) * cumulative_BK[:, -1:]
    return torch.searchsorted(cumulative_BK, wanted_B1, right=True)[:, 0].clamp(max=weights_BK.shape[-1] - 1)
