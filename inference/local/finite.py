"""Finite: logits that are no numbers are an error, and not the answer that an argmax over them happens to give."""

from __future__ import annotations

import torch
from cotune.errors import CotuneError
from torch import Tensor, nn


class NotFiniteError(CotuneError, RuntimeError):
    """The LM computed logits that are infinite or not a number."""


def check_finite(logits_RV: Tensor, model: nn.Module) -> None:
    """Refuses logits to which no token can be chosen. Single tokens may be at minus infinity, which rules them out.

    Raises:
        NotFiniteError: a row's highest logit is not finite. Says why and what to set.
    """
    if not bool(torch.isfinite(logits_RV.amax(dim=-1)).all()):  # a NaN anywhere is the highest
        raise NotFiniteError(_why(logits_RV, model))


def _why(logits_RV: Tensor, model: nn.Module) -> str:
    rows = int((~torch.isfinite(logits_RV.amax(dim=-1))).sum())
    head = f"the LM's logits are not finite (NaN or infinite) in {rows} of {len(logits_RV)} completions under way"
    broken = [name for name, weights in model.named_parameters() if not bool(torch.isfinite(weights).all())]
    if any("lora_" not in name for name in broken):
        return (
            f"{head}: weights of the base are not finite, {broken[0]} first ({len(broken)} in all). The model's files "
            f"are damaged, or do not fit {_dtype(model)}; get them anew, or take --model.lm.dtype bfloat16 or float32."
        )
    if broken:
        return (
            f"{head}: weights of the adapter are not finite, {broken[0]} first ({len(broken)} in all). Its training "
            "has diverged: lower --model.optimizer.lr and start over with --fresh."
        )
    if _dtype(model) == "float16":
        return (
            f"{head}: float16 holds no number above 65,504, and this model computes larger ones. Take "
            "--model.lm.dtype bfloat16, or float32."
        )
    return (
        f"{head}, though all weights are: they overflow in {_dtype(model)}. Take --model.lm.dtype float32, and no "
        "quantization; if an adapter was trained before, lower --model.optimizer.lr and start over."
    )


def _dtype(model: nn.Module) -> str:
    """That of the base; an adapter may have another."""
    kinds = [p.dtype for name, p in model.named_parameters() if p.is_floating_point() and "lora_" not in name]
    return str(kinds[0] if kinds else torch.float32).removeprefix("torch.")
