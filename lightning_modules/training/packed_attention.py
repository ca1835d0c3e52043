"""Attention of packed rows: a row's own tokens read its prefix, which stands once in the sequence, and one another.

Shape suffixes: N tokens of the sequence, H heads (of queries; keys and values may have fewer), D a head's size, R rows,
S tokens of the longest row. Names without one are in the layers' own shape, (1, H, N, D).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name for it)
from cotune.inference.local.torch_internals import flash, flash_backward
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

NAME = "cotune_packed_rows"
"""The attention's name in transformers' registry."""


@dataclass(frozen=True)
class Family:
    """Where a segment stands in the sequence: from `start`, `prefix` shared tokens, then rows of `lengths` tokens."""

    start: int
    prefix: int
    lengths: tuple[int, ...]

    @property
    def shared(self) -> slice:
        """The prefix's place in the sequence."""
        return slice(self.start, self.start + self.prefix)

    @property
    def own(self) -> slice:
        """The place of all rows' own tokens."""
        return slice(self.start + self.prefix, self.start + self.size)

    @property
    def size(self) -> int:
        return self.prefix + sum(self.lengths)


def _called_by_a_layer(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    families: Sequence[Family] | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if families is None:
        raise TypeError("its layers do not hand keyword arguments on to attention")
    if softcap is not None or s_aux is not None or dropout:
        raise NotImplementedError("its attention has soft caps, sinks or dropout")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as it does for PyTorch's own attention
        query, key, value = (states.to(torch.get_autocast_dtype(device)) for states in (query, key, value))
    fused = device == "cpu" and query.shape[-1] == value.shape[-1]
    if fused:
        read = _FusedOnCPU.apply(query, key, value, tuple(families), scale)  # type: ignore[no-untyped-call]
    else:
        read = _plain(query, key, value, families, scale)
    return read.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _called_by_a_layer)


def _plain(query: Tensor, key: Tensor, value: Tensor, families: Sequence[Family], scale: float) -> Tensor:
    """(1, H, N, D) by PyTorch's own attention, on any device: each row against a copy of its prefix."""
    heads = query.shape[1] // key.shape[1]
    key, value = _per_head(key, heads), _per_head(value, heads)
    attend = F.scaled_dot_product_attention
    parts: list[Tensor] = []
    for family in families:
        shared_key, shared_value = key[:, :, family.shared], value[:, :, family.shared]
        if family.prefix:
            parts.append(attend(query[:, :, family.shared], shared_key, shared_value, is_causal=True, scale=scale))
        grid = _Grid(family.lengths, query.device)
        own = (grid.of(states[:, :, family.own]) for states in (query, key, value))
        own_query, own_key, own_value = own
        # (S, P + S): all of the prefix, and of the row what is not ahead; the diagonal is shifted past the prefix.
        seen = torch.ones(grid.width, family.prefix + grid.width, dtype=torch.bool, device=query.device)
        read = attend(
            own_query,
            torch.cat([shared_key.expand(grid.rows, -1, -1, -1), own_key], dim=2),
            torch.cat([shared_value.expand(grid.rows, -1, -1, -1), own_value], dim=2),
            attn_mask=seen.tril(diagonal=family.prefix),
            scale=scale,
        )
        parts.append(grid.back(read))
    return torch.cat(parts, dim=2)


class _FusedOnCPU(torch.autograd.Function):
    """The same by PyTorch's flash kernel for CPUs: rows read their prefix as one product, without a copy.

    A row's two parts, prefix and own tokens, are merged by their log-sum-exps. The kernel's backward pass makes
    weights from the log-sum-exp that it is given: with the merged one, each part's gradients are those of the whole.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, families: tuple[Family, ...], scale: float
    ) -> Tensor:
        read = torch.empty_like(query, memory_format=torch.contiguous_format)
        exact = torch.float64 if query.dtype == torch.float64 else torch.float32
        lse = query.new_empty(query.shape[:3], dtype=exact)  # (1, H, N)
        for family in families:
            for place, attend in ((family.shared, _read_shared), (family.own, _read_own)):
                if place.stop > place.start:
                    read[:, :, place], lse[:, :, place] = attend(family, query, key, value, scale)
        ctx.save_for_backward(query, key, value, read, lse)
        ctx.families, ctx.scale = families, scale
        return read

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, read, lse = ctx.saved_tensors
        # (1, N, heads, D) underneath, as the projections before take their gradients.
        found = tuple(
            torch.empty_like(states.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
            for states in (query, key, value)
        )
        # The prefix is read twice, by itself and by the rows: the gradients of its keys and values are the sum of both.
        given = (gradient, query, key, value, read, lse, ctx.scale)
        for family in ctx.families:
            d_query, d_key, d_value = found
            own_query, d_key[:, :, family.own], d_value[:, :, family.own] = _own_backward(family, *given)
            if family.prefix:
                across_query, across_key, across_value = _across_backward(family, *given)
                before_query, before_key, before_value = _shared_backward(family, *given)
                own_query = own_query + across_query
                d_query[:, :, family.shared] = before_query
                d_key[:, :, family.shared] = before_key + across_key
                d_value[:, :, family.shared] = before_value + across_value
            d_query[:, :, family.own] = own_query
        return *found, None, None


def _read_shared(family: Family, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What the prefix reads of itself, and the log-sum-exps of its scores."""
    heads, place = query.shape[1] // key.shape[1], family.shared
    states = (query[:, :, place], _per_head(key[:, :, place], heads), _per_head(value[:, :, place], heads))
    return flash(*states, scale=scale, causal=True)


def _read_own(family: Family, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What the rows' own tokens read of their row and of the prefix, and the log-sum-exps of their scores."""
    heads, grid = query.shape[1] // key.shape[1], _Grid(family.lengths, query.device)
    own_query, own_key, own_value = (states[:, :, family.own] for states in (query, key, value))
    grids = (grid.of(own_query), grid.of(_per_head(own_key, heads)), grid.of(_per_head(own_value, heads)))
    read, lse = flash(*grids, scale=scale, causal=True)
    read, lse = grid.back(read), grid.back(lse[..., None])[..., 0]
    if not family.prefix:
        return read, lse
    shared_key, shared_value = key[:, :, family.shared], value[:, :, family.shared]
    # All rows' queries read the prefix at once, without a mask: every one of them stands behind all of it.
    more, more_lse = flash(_grouped(own_query, heads), shared_key, shared_value, scale=scale)
    more, more_lse = more.reshape(read.shape), more_lse.reshape(lse.shape)
    # exp(more_lse) / (exp(lse) + exp(more_lse)): the part of the attention that falls on the prefix.
    share = torch.sigmoid(more_lse - lse)[..., None].to(more.dtype)
    return torch.lerp(read, more, share), torch.logaddexp(lse, more_lse)


def _shared_backward(
    family: Family, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, read: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the prefix's queries, keys and values, by what the prefix reads of itself."""
    heads, place = query.shape[1] // key.shape[1], family.shared
    d_query, d_key, d_value = flash_backward(
        gradient[:, :, place],
        query[:, :, place],
        _per_head(key[:, :, place], heads),
        _per_head(value[:, :, place], heads),
        read[:, :, place],
        lse[:, :, place],
        scale=scale,
        causal=True,
    )
    return d_query, _summed(d_key, heads), _summed(d_value, heads)


def _own_backward(
    family: Family, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, read: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of own queries, keys and values, by what own tokens read of their row."""
    heads, place = query.shape[1] // key.shape[1], family.own
    grid = _Grid(family.lengths, query.device)
    # `read` and `lse` are those of prefix and row together, as the class says; so no second merge is needed here.
    rows = flash_backward(
        grid.of(gradient[:, :, place]),
        grid.of(query[:, :, place]),
        grid.of(_per_head(key[:, :, place], heads)),
        grid.of(_per_head(value[:, :, place], heads)),
        grid.of(read[:, :, place]),
        grid.of(lse[:, :, place, None])[..., 0],
        scale=scale,
        causal=True,
    )
    d_query, d_key, d_value = (grid.back(states) for states in rows)
    return d_query, _summed(d_key, heads), _summed(d_value, heads)


def _across_backward(
    family: Family, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, read: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of own queries and of the prefix's keys and values, by what own tokens read of the prefix."""
    heads, place = query.shape[1] // key.shape[1], family.own
    d_query, d_key, d_value = flash_backward(
        _grouped(gradient[:, :, place], heads),
        _grouped(query[:, :, place], heads),
        key[:, :, family.shared],
        value[:, :, family.shared],
        _grouped(read[:, :, place], heads),
        lse[:, :, place].reshape(1, key.shape[1], -1),
        scale=scale,
    )
    return d_query.reshape(query[:, :, place].shape), d_key, d_value


class _Grid:
    """Rows of unequal length as a rectangle, filled from the left, and back."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.rows, self.width = len(lengths), max(lengths)
        self.even = len(set(lengths)) == 1
        if not self.even:
            length_R = torch.tensor(list(lengths), device=device)
            self.filled_RS = torch.arange(self.width, device=device) < length_R[:, None]

    def of(self, states_1HND: Tensor) -> Tensor:
        """(R, H, S, D), zeros behind a row's end. What stands there is never read: attention is causal."""
        _, heads, _, width = states_1HND.shape
        states_NHD = states_1HND[0].transpose(0, 1)
        if self.even:  # a view: nothing is copied
            return states_NHD.reshape(self.rows, self.width, heads, width).transpose(1, 2)
        grid_RSHD = states_NHD.new_zeros(self.rows, self.width, heads, width)
        # Differentiable, unlike writing into the grid, for `_plain`.
        grid_RSHD = grid_RSHD.masked_scatter(self.filled_RS[..., None, None], states_NHD)
        return grid_RSHD.transpose(1, 2)

    def back(self, grid_RHSD: Tensor) -> Tensor:
        """(1, H, N, D)."""
        grid_RSHD = grid_RHSD.transpose(1, 2)
        states_NHD = grid_RSHD.flatten(0, 1) if self.even else grid_RSHD[self.filled_RS]
        return states_NHD.transpose(0, 1)[None]


def _grouped(states_1HND: Tensor, heads: int) -> Tensor:
    """(1, Hkv, heads * N, D): query heads that read the same keys, behind one another."""
    return states_1HND.reshape(1, states_1HND.shape[1] // heads, -1, states_1HND.shape[-1])


def _per_head(states_1HND: Tensor, heads: int) -> Tensor:
    return states_1HND if heads == 1 else states_1HND.repeat_interleave(heads, dim=1)


def _summed(states_1HND: Tensor, heads: int) -> Tensor:
    """The gradient of `_per_head`."""
    if heads == 1:
        return states_1HND
    _, count, tokens, width = states_1HND.shape
    return states_1HND.reshape(1, count // heads, heads, tokens, width).sum(dim=2)
