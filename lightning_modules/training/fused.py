"""Fused parts of a training step: the adapter beside its frozen layer, and the head with its log-probabilities."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name for it)
from cotune.inference.local.peft_internals import lora_layers, plain_adapter
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LOGITS_AT_ONCE = 1 << 22
"""Most logits held at once, forward and backward: 16 MB in fp32, about what a cache holds."""


def fuse_adapter(model: nn.Module) -> None:
    """Lets the adapter's layers train by one operation each, where they are plain LoRA on a plain linear layer.

    PEFT adds and scales the update in passes of their own over the layer's output, and autograd adds the two gradients
    of the input in another. Here the products add into one result. Other layers (quantised, DoRA, dropout, other
    types) and everything but training run as PEFT has them.
    """
    for _, layer in lora_layers(model):
        if type(layer.get_base_layer()) is nn.Linear:
            # A bound method, because a copy of the model then has its own: copying one copies what it is bound to.
            layer.forward = MethodType(_forward, layer)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    update = _fitting(layer, x) if not (args or kwargs) else None
    if update is None:
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    base = layer.get_base_layer()
    # The views are made out here, as a model may go on to write into what its layer gives, which autograd does not let
    # it do to a view that was made inside.
    x_NI = x.reshape(-1, x.shape[-1])
    found: Tensor = _AdaptedLinear.apply(x_NI, base.weight, base.bias, *update)  # type: ignore[no-untyped-call]
    return found.view(*x.shape[:-1], -1)


def _fitting(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """The one active adapter, if it is one that can be fused here and now."""
    update = plain_adapter(layer) if torch.is_grad_enabled() else None
    if update is None:
        return None
    base = layer.get_base_layer()
    same = x.dtype == base.weight.dtype == update[0].dtype
    frozen = not base.weight.requires_grad and (base.bias is None or not base.bias.requires_grad)
    return update if same and frozen and not torch.is_autocast_enabled(x.device.type) else None


class _AdaptedLinear(torch.autograd.Function):
    """x W' + b + scale (x A') B', with gradients for x, A and B."""

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, weight: Tensor, bias: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        low_NR = x_NI @ a_RI.t()
        out_NO = F.linear(x_NI, weight, bias).addmm_(low_NR, b_OR.t(), alpha=scale)
        ctx.save_for_backward(x_NI, low_NR, weight, a_RI, b_OR)
        ctx.scale = scale
        return out_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, low_NR, weight, a_RI, b_OR = ctx.saved_tensors
        wants_x, _, _, wants_a, wants_b, _ = ctx.needs_input_grad
        d_low_NR = (d_out_NO @ b_OR).mul_(ctx.scale)
        d_x = torch.mm(d_out_NO, weight).addmm_(d_low_NR, a_RI) if wants_x else None
        d_a = d_low_NR.t() @ x_NI if wants_a else None
        d_b = (d_out_NO.t() @ low_NR).mul_(ctx.scale) if wants_b else None
        return d_x, None, None, d_a, d_b, None


def head_log_probs(
    hidden_ND: Tensor, head: nn.Linear, ids_NK: Tensor, coefficients_NK: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(N, K) log-probabilities of ids at each position, 0 where an id is -1; the logits are never there all at once.

    Returns:
        They, without a gradient, and their sum weighted by the coefficients, with one. The head must be frozen: it gets
        none. The gradient of the hidden states is made in the forward pass, from the logits while they are there, which
        saves computing or keeping them.
    """
    given = (hidden_ND, head.weight, head.bias, ids_NK, coefficients_NK)
    found: tuple[Tensor, Tensor] = _HeadLogProbs.apply(*given)  # type: ignore[no-untyped-call]
    return found


def has_plain_head(model: Any) -> bool:
    """Whether `head_log_probs` can serve this head, as far as its type tells."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.dtype == torch.float16:
        return False  # in fp16 small gradients would vanish before the loss scaler's factor reaches them
    return not any(p.requires_grad for p in head.parameters())


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        ids_NK: Tensor,
        coefficients_NK: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        step = max(1, LOGITS_AT_ONCE // weight_VD.shape[0])
        exact = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        found_NK = hidden_ND.new_empty(ids_NK.shape, dtype=exact)
        wanted = ctx.needs_input_grad[0] and coefficients_NK is not None
        d_hidden_ND = torch.empty_like(hidden_ND) if wanted else None
        known_NK = ids_NK.clamp(min=0)
        for start in range(0, len(ids_NK), step):
            part = slice(start, start + step)
            log_p_nV = F.linear(hidden_ND[part], weight_VD, bias_V).to(exact).log_softmax(dim=-1)
            found_NK[part] = log_p_nV.gather(1, known_NK[part])
            if d_hidden_ND is not None and coefficients_NK is not None:
                given_nK = coefficients_NK[part]
                d_logits_nV = log_p_nV.exp_().mul_(-given_nK.sum(dim=1, keepdim=True))
                d_logits_nV.scatter_add_(1, known_NK[part], given_nK)
                d_hidden_ND[part] = d_logits_nV.to(weight_VD.dtype) @ weight_VD
        found_NK.masked_fill_(ids_NK < 0, 0.0)
        ctx.save_for_backward(d_hidden_ND)
        ctx.mark_non_differentiable(found_NK)
        return found_NK, found_NK.new_zeros(()) if coefficients_NK is None else (found_NK * coefficients_NK).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, factor: Tensor) -> tuple[Tensor | None, ...]:
        (d_hidden_ND,) = ctx.saved_tensors
        return d_hidden_ND * factor.to(d_hidden_ND.dtype), None, None, None, None
