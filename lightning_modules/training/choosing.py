"""What decoding makes of an LM's probabilities where a choice is decided: some tokens may come, each with an offset."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from cotune.datamodules.collate import Pair, collate
from cotune.lightning_modules.training.loss import log_probs


@torch.no_grad()
def told_of(model: Any, pairs: Sequence[Pair], tokens: Sequence[Sequence[int]]) -> list[dict[int, float]]:
    """For each place of the pairs that bears weight, in order: these tokens' log-probabilities, in nats, over the whole
    vocabulary. What the pairs' prompts share is read once."""
    wide = max(map(len, tokens))
    ids_nK = torch.tensor([[*some, *[-1] * (wide - len(some))] for some in tokens], device=model.device)
    found_nK, _ = log_probs(model, collate([pairs]), ids_nK)
    return [dict(zip(some, row, strict=False)) for some, row in zip(tokens, found_nK.tolist(), strict=True)]


def decoded(
    told: Mapping[int, float], offsets: Mapping[int, float], *, may_end: bool
) -> tuple[dict[int, float], float]:
    """The log-probabilities, in nats, with which decoding takes each token, and with which the value ends.

    Args:
        told: of the tokens that go on, over the whole vocabulary.
        offsets: of the same tokens.
        may_end: all other tokens may come as well, and end the value.
    """
    lifted = {token: told[token] + offset for token, offset in offsets.items()}
    rest = math.log(max(1.0 - math.fsum(map(math.exp, told.values())), 1e-30)) if may_end else -math.inf
    whole = float(torch.tensor([*lifted.values(), rest], dtype=torch.float64).logsumexp(0))
    return {token: log_p - whole for token, log_p in lifted.items()}, rest - whole
