"""Losses on a batch of training pairs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name for it)
from cotune.datamodules.collate import IGNORED, Batch, Segment
from torch import Tensor
from transformers.cache_utils import DynamicCache


def completion_loss(model: Any, batch: Batch) -> Tensor:
    """Mean negative log-likelihood, in nats, of the completions' tokens; prompts bear no loss.

    The mean is over all tokens of the batch, so how rows fall into segments changes nothing. A segment's prefix runs
    once and its keys and values serve all rows, gradient included: the same numbers as row by row, for less.
    """
    total = torch.stack([_summed(model, segment) for segment in batch.segments]).sum()
    return total / batch.tokens


def _summed(model: Any, segment: Segment) -> Tensor:
    """() the summed loss of one segment."""
    rows, labels_BC = segment.ids.shape[0], segment.labels
    cache, shared = None, segment.prefix.shape[0]
    if shared:
        cache = model(input_ids=segment.prefix[None], past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)
        cache = cache.past_key_values
        cache.batch_repeat_interleave(rows)
    mask_BT = torch.cat([segment.mask.new_ones(rows, shared), segment.mask], dim=1)
    logits_BCV = model(
        input_ids=segment.ids,
        attention_mask=mask_BT,
        position_ids=(mask_BT.cumsum(dim=1) - 1).clamp(min=0)[:, shared:],
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=labels_BC.shape[1] + 1,
    ).logits[:, :-1]
    return F.cross_entropy(logits_BCV.flatten(0, 1).float(), labels_BC.flatten(), ignore_index=IGNORED, reduction="sum")
