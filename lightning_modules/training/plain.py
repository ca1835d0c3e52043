"""The plain path of training: one text at a time, as transformers computes it.

Slow, right for every causal LM, and what the fast paths are measured against. `inference.local.plain` is its like for
generating.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from cotune.datamodules.collate import Batch
from cotune.inference.local.plain import bare
from cotune.inference.local.transformers_internals import alone
from torch import Tensor


def logits(model: Any, batch: Batch) -> Tensor:
    """(n, V) logits at the places of a batch that bear weight, each row computed alone."""
    found = []
    for pair in batch.pairs:
        logits_CV = last_logits(model, [*pair.prompt_ids, *pair.completion_ids], len(pair.completion_ids))
        found.append(logits_CV[list(pair.bearing)])
    return torch.cat(found)


def last_logits(model: Any, ids: Sequence[int], count: int) -> Tensor:
    """(count, V) the logits that predict a text's last tokens."""
    keep = "logits_to_keep" in inspect.signature(bare(model).forward).parameters
    options = {"logits_to_keep": count + 1} if keep else {}
    with alone(bare(model)):
        whole: Tensor = model(
            input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False, **options
        ).logits[0, -count - 1 : -1]  # a token is predicted at the place before it
    return whole
