"""What torch does not promise and is used all the same: kernels and layouts of its CPU backend, versions of tensors.

All of it stands here. tests/test_internals.py says from which version it was read, and fails if it goes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook


def flash(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(B, H, S, D) what the queries read, and (B, H, S) the log-sum-exps of their scores, on a CPU."""
    read, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=bias, scale=scale
    )
    return read, lse


def efficient(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same on CUDA, in any dtype, for as many heads of keys as of queries."""
    if bias is not None:  # the kernel reads rows that begin at multiples of 16 values
        length = key.shape[2]
        bias = functional.pad(bias.to(query.dtype), (0, -length % 16))[..., :length]
        bias = bias.expand(*query.shape[:3], length)
    read, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, 0.0, causal, scale=scale
    )
    return read, lse[:, :, : query.shape[2]]  # which the kernel fills up to a multiple of 32


def flash_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, from that of what the queries read."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, query, key, value, read, lse, 0.0, causal, attn_mask=None, scale=scale
    )
    return found


def onednn_has_bf16() -> bool:
    """Whether oneDNN multiplies bf16 on this machine."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def onednn_layout(weight: Tensor, rows: int) -> Tensor:
    """The weight as oneDNN's products of so many rows read it."""
    laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return laid_out


def is_laid_out(weight: Tensor) -> bool:
    """Whether a weight is in a layout of oneDNN's."""
    return weight.is_mkldnn


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x · weightᵀ + bias, with a weight that was laid out for it."""
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return made


def written(tensor: Tensor) -> tuple[int, int, int]:
    """Changes whenever the tensor is written in place (its version counts up), moved or cast (it is elsewhere).

    Optimisers that write past autograd (bitsandbytes; any that writes `.data`) leave the version as it is: to a trained
    tensor every step of any optimiser counts as a change.
    """
    return tensor._version, tensor.data_ptr(), _steps[0] if tensor.requires_grad else 0


_steps = [0]


def _count_step(*_: Any) -> None:
    _steps[0] += 1


register_optimizer_step_post_hook(_count_step)
