"""Losses on a batch of training pairs."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name for it)
from cotune.datamodules.collate import IGNORED, Batch, Segment
from cotune.lightning_modules.fused import has_plain_head, head_losses
from cotune.lightning_modules.packing import abilities, backbone, forward, pack
from torch import Tensor
from transformers.cache_utils import DynamicCache


def completion_loss(model: Any, batch: Batch) -> Tensor:
    """Mean negative log-likelihood, in nats, of the completions' tokens; prompts bear no loss.

    The mean is over all tokens of the batch, so how rows fall into segments changes nothing.
    """
    return row_losses(model, batch).sum() / batch.tokens


def row_losses(model: Any, batch: Batch) -> Tensor:
    """(R,) each row's negative log-likelihood, in nats, summed over its completion's tokens.

    A segment's prefix runs once and serves all its rows, gradient included: the same numbers as row by row, for less.
    Rows are packed into one sequence without padding where the model allows it (`packing`). Elsewhere they are padded
    behind a cache of their prefix; with gradient checkpointing, which drops caches, each row runs whole.
    """
    can = abilities(model, batch.longest)
    if can.packed:
        return _packed(model, batch, plain_head=can.plain_head and has_plain_head(model))
    if _checkpointing(model):
        warnings.warn(
            "gradient checkpointing drops caches, and this model cannot be trained on packed rows: every row computes "
            "its whole prompt. Equal, but slow where prompts share much.",
            stacklevel=2,
        )
        return torch.cat([_padded(model, segment.spread()) for segment in batch.segments])
    return torch.cat([_padded(model, segment) for segment in batch.segments])


def _packed(model: Any, batch: Batch, *, plain_head: bool) -> Tensor:
    packed = pack(batch)
    if plain_head:
        hidden_ND = forward(backbone(model), packed).last_hidden_state[0]
        losses_n = head_losses(hidden_ND[packed.places], model.get_output_embeddings(), packed.labels)
    else:
        logits_nV = forward(model, packed, logits_to_keep=packed.places).logits[0]
        losses_n = F.cross_entropy(_exact(logits_nV), packed.labels, reduction="none")
    return losses_n.new_zeros(batch.rows).index_add(0, packed.rows, losses_n)


def _padded(model: Any, segment: Segment) -> Tensor:
    """(R,) the losses of one segment's rows behind their prefix's cache."""
    rows, labels_RC = segment.ids.shape[0], segment.labels
    cache, shared = None, segment.prefix.shape[0]
    if shared:
        cache = model(input_ids=segment.prefix[None], past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)
        cache = cache.past_key_values
        cache.batch_repeat_interleave(rows)
    mask_RT = torch.cat([segment.mask.new_ones(rows, shared), segment.mask], dim=1)
    logits_RCV = model(
        input_ids=segment.ids,
        attention_mask=mask_RT,
        position_ids=(mask_RT.cumsum(dim=1) - 1).clamp(min=0)[:, shared:],
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=labels_RC.shape[1] + 1,
    ).logits[:, :-1]
    bearing_RC = labels_RC != IGNORED  # picked first, so that no more than these are copied to higher precision
    losses_n = F.cross_entropy(_exact(logits_RCV[bearing_RC]), labels_RC[bearing_RC], reduction="none")
    return losses_n.new_zeros(rows).index_add(0, bearing_RC.nonzero()[:, 0], losses_n)


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _checkpointing(model: Any) -> bool:
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
