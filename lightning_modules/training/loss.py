"""Log-probabilities of a batch's tokens, with gradients by coefficients: what every objective is made of."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from cotune.datamodules.collate import Batch, Segment
from cotune.lightning_modules.training import plain
from cotune.lightning_modules.training.fused import LOGITS_AT_ONCE, has_plain_head, head_log_probs
from cotune.lightning_modules.training.packing import abilities, backbone, forward, pack
from torch import Tensor
from transformers import DynamicCache


def log_probs(model: Any, batch: Batch, ids_nK: Tensor, coefficients_nK: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(n, K) log-probabilities, in nats, of ids at the n places of a batch that bear weight; 0 where an id is -1.

    A segment's prefix runs once and serves all its rows, gradient included: the same numbers as row by row, for less.
    Rows are packed into one sequence without padding where the model allows it (`packing`). Elsewhere they are padded
    behind a cache of their prefix; with gradient checkpointing, which drops caches, each row runs whole. Where that
    would not be right either, each row runs alone (`findings` says what a model is fit for).

    Returns:
        They, without a gradient, and () their sum weighted by the coefficients, whose gradient is
        sum(coefficient * d log_prob); 0 without coefficients.
    """
    can = abilities(model, batch.longest)
    if can.packed and can.plain_head and has_plain_head(model):
        packed = pack(batch, model.device)
        hidden_ND = forward(backbone(model), packed).last_hidden_state[0]  # without the head: V is large
        return head_log_probs(hidden_ND[packed.places], model.get_output_embeddings(), ids_nK, coefficients_nK)
    compute = packed_logits if can.packed else padded_logits if can.padded else plain.logits
    found_nK = _exact(compute(model, batch)).log_softmax(dim=-1)
    found_nK = found_nK.gather(1, ids_nK.clamp(min=0)).masked_fill(ids_nK < 0, 0.0)
    weighted = found_nK.new_zeros(()) if coefficients_nK is None else (found_nK * coefficients_nK).sum()
    return found_nK.detach(), weighted


@torch.no_grad()
def likeliest(model: Any, batch: Batch, ids_nK: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What an LM says at the places of a batch that bear weight.

    Returns:
        (n, count) its likeliest ids there, and (n, K + count) the log-probabilities of the ids given and of these.
    """
    can = abilities(model, batch.longest)
    logits: Iterable[Tensor]
    if can.packed and can.plain_head and has_plain_head(model):
        packed = pack(batch, model.device)
        hidden_nD = forward(backbone(model), packed).last_hidden_state[0][packed.places]
        head = model.get_output_embeddings()
        size = max(1, LOGITS_AT_ONCE // head.weight.shape[0])  # rows of V logits that are there at once
        logits = map(head, torch.split(hidden_nD, size))
    else:
        compute = packed_logits if can.packed else padded_logits if can.padded else plain.logits
        size, logits = len(ids_nK), [compute(model, batch)]
    found = []
    for logits_mV, ids_mK in zip(logits, torch.split(ids_nK, size), strict=True):
        log_p_mV = _exact(logits_mV).log_softmax(dim=-1)
        best = log_p_mV.topk(min(count, log_p_mV.shape[1]), dim=1)
        found.append((best.indices, torch.cat([log_p_mV.gather(1, ids_mK), best.values], dim=1)))
    return torch.cat([ids for ids, _ in found]), torch.cat([values for _, values in found])


def exact_dtype(model: Any) -> torch.dtype:
    """The type that log-probabilities come in: fp32, and fp64 from a model of fp64."""
    return torch.float64 if model.dtype == torch.float64 else torch.float32


def packed_logits(model: Any, batch: Batch) -> Tensor:
    """(n, V) logits at the places that bear weight, of rows packed into one sequence."""
    packed = pack(batch, model.device)
    logits_nV: Tensor = forward(model, packed, logits_to_keep=packed.places).logits[0]
    return logits_nV


def padded_logits(model: Any, batch: Batch) -> Tensor:
    """(n, V) the same, of each segment's rows padded behind their prefix's cache."""
    if not _checkpointing(model):
        return torch.cat([_padded_segment(model, segment) for segment in batch.segments])
    warnings.warn(
        "with gradient checkpointing and without packed rows, which this model does not support, every row computes "
        "its whole prompt: the same result, but slower where prompts share long beginnings.",
        stacklevel=2,
    )
    return torch.cat([_padded_segment(model, Segment(0, segment.pairs)) for segment in batch.segments])


def _padded_segment(model: Any, segment: Segment) -> Tensor:
    device, rows, prefix = model.device, [segment.own(pair) for pair in segment.pairs], segment.prefix
    wide = max(map(len, rows))  # tokens of the longest
    cache = None
    if prefix:
        shared = torch.tensor([segment.shared], device=device)
        cache = model(input_ids=shared, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)
        cache = cache.past_key_values
        cache.batch_repeat_interleave(len(rows))  # the prefix, once a row
    # Padding goes to the right: between prefix and own tokens it would count as distance where windows slide.
    mask = [[1] * (prefix + len(row)) + [0] * (wide - len(row)) for row in rows]
    bearing = [
        (r, len(row) - len(pair.completion_ids) + i - 1)  # the token before it predicts it
        for r, (row, pair) in enumerate(zip(rows, segment.pairs, strict=True))
        for i in pair.bearing
    ]
    row_n, place_n = torch.tensor(bearing, device=device).reshape(-1, 2).unbind(dim=1)
    kept_K, kept_n = torch.unique(place_n, return_inverse=True)
    logits_RKV = model(
        input_ids=torch.tensor([row + [0] * (wide - len(row)) for row in rows], device=device),
        attention_mask=torch.tensor(mask, device=device),
        position_ids=torch.arange(prefix, prefix + wide, device=device).expand(len(rows), -1),
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=kept_K,
    ).logits
    logits_nV: Tensor = logits_RKV[row_n, kept_n]  # no more than these are copied to higher precision
    return logits_nV


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _checkpointing(model: Any) -> bool:
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
