"""Losses on a batch of training pairs."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name for it)
from cotune.datamodules.collate import IGNORED, Batch, Segment
from cotune.lightning_modules import plain
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
    behind a cache of their prefix; with gradient checkpointing, which drops caches, each row runs whole. Where that
    would not be right either, each row runs alone (`findings` says what a model is fit for).
    """
    can = abilities(model, batch.longest)
    if can.packed:
        return packed_losses(model, batch, plain_head=can.plain_head and has_plain_head(model))
    if not can.padded:
        return plain.losses(model, batch)
    if _checkpointing(model):
        warnings.warn(
            "gradient checkpointing drops caches, and this model cannot be trained on packed rows: every row computes "
            "its whole prompt. Equal, but slow where prompts share much.",
            stacklevel=2,
        )
        batch = Batch(tuple(segment.spread() for segment in batch.segments))
    return padded_losses(model, batch)


def packed_losses(model: Any, batch: Batch, *, plain_head: bool) -> Tensor:
    """(R,) the losses of rows packed into one sequence."""
    packed = pack(batch)
    if plain_head:
        hidden_ND = forward(backbone(model), packed).last_hidden_state[0]
        losses_n = head_losses(hidden_ND[packed.places], model.get_output_embeddings(), packed.labels)
    else:
        logits_nV = forward(model, packed, logits_to_keep=packed.places).logits[0]
        losses_n = F.cross_entropy(_exact(logits_nV), packed.labels, reduction="none")
    return losses_n.new_zeros(batch.rows).index_add(0, packed.rows, losses_n)


def padded_losses(model: Any, batch: Batch) -> Tensor:
    """(R,) the losses of each segment's rows, padded behind their prefix's cache."""
    return torch.cat([_padded(model, segment) for segment in batch.segments])


def _padded(model: Any, segment: Segment) -> Tensor:
    rows, width = segment.ids.shape
    cache, shared = None, segment.prefix.shape[0]
    if shared:
        cache = model(input_ids=segment.prefix[None], past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)
        cache = cache.past_key_values
        cache.batch_repeat_interleave(rows)
    # Padding goes to the right: between prefix and own tokens it would count as distance where windows slide.
    lengths_R1 = segment.mask.sum(dim=1, keepdim=True)
    columns_C = torch.arange(width, device=segment.ids.device)
    own_RC = segment.ids.gather(1, (columns_C + width - lengths_R1).clamp(max=width - 1))
    mask_RC = (columns_C < lengths_R1).to(segment.mask.dtype)
    row_n, label_n = (segment.labels != IGNORED).nonzero(as_tuple=True)
    # A label at column c of C belongs to the token that is C - c from its row's end; the one before it predicts it.
    place_n = lengths_R1[row_n, 0] - (segment.labels.shape[1] - label_n) - 1
    kept_K, kept_n = place_n.unique(return_inverse=True)
    logits_RKV = model(
        input_ids=own_RC,
        attention_mask=torch.cat([segment.mask.new_ones(rows, shared), mask_RC], dim=1),
        position_ids=(columns_C + shared).expand(rows, -1),
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=kept_K,
    ).logits
    losses_n = F.cross_entropy(_exact(logits_RKV[row_n, kept_n]), segment.labels[row_n, label_n], reduction="none")
    return losses_n.new_zeros(rows).index_add(0, row_n, losses_n)


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _checkpointing(model: Any) -> bool:
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
