"""Completion loss of a batch as one differentiable number: what tests and benchmarks compare with."""

from __future__ import annotations

from typing import Any

import torch
from cotune.datamodules import Batch
from cotune.lightning_modules.training.loss import exact_dtype, log_probs


def completion_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Mean negative log-likelihood, in nats, of the completions' tokens."""
    tokens = batch.bearing(model.device, exact_dtype(model))
    return log_probs(model, batch, tokens.ids, -tokens.ce[:, None])[1] / batch.tokens


def row_losses(model: Any, batch: Batch) -> torch.Tensor:
    """(R,) each row's negative log-likelihood, in nats, summed over its completion's tokens."""
    tokens = batch.bearing(model.device, exact_dtype(model))
    return tokens.by_row(-log_probs(model, batch, tokens.ids)[0][:, 0])
