"""Cascade attention: rows attend to the tokens they share as one product, to their own tokens beside it.

The two parts are merged by their log-sum-exps, so the result is that of plain attention (Hydragen, arXiv 2402.05099).
The tokens of all rows stand behind one another in a batch of one, without padding: the layers between know no rows.

Shape suffixes: N tokens of the pass, n those behind one prefix, P tokens of a prefix, H heads, D a head's size, R rows,
S and T tokens of a row as queries and as keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from cotune.inference.local.torch_internals import efficient, flash
from cotune.inference.local.transformers_internals import attending_by
from torch import Tensor
from transformers import AttentionInterface

NAME = "cotune_cascade"
"""The attention's name in transformers' registry. No mask is registered under it, so transformers makes none."""

_SCORES_AT_ONCE = 1 << 26
"""Most attention scores held at once where there is no fused kernel."""

_KEYS_AT_ONCE = 512
"""Keys that the fused kernel reads at once, hidden ones too: up to here a causal mask alone saves it nothing."""

_BLOCK = 64
"""Queries of a block where causal attention is computed block by block."""


class KeyValues:
    """Keys and values of tokens, a pair of (rows, H, capacity, D) buffers a layer, made at the first write."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, keys_NHD: Tensor, values_NHD: Tensor, rows_N: Tensor, places_N: Tensor) -> None:
        """Puts token n's keys and values into row `rows_N[n]` at place `places_N[n]`."""
        if layer not in self.layers:
            self.layers[layer] = (self._buffer(keys_NHD), self._buffer(values_NHD))
        for buffer, states in zip(self.layers[layer], (keys_NHD, values_NHD), strict=True):
            buffer[rows_N, :, places_N] = states

    def _buffer(self, states_NHD: Tensor) -> Tensor:
        _, heads, width = states_NHD.shape
        # Zeros: what stands behind a row's end is masked, but no mask hides a NaN.
        return states_NHD.new_zeros(self.rows, heads, self.capacity, width)

    def part(self, layer: int, rows: slice, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` tokens of some rows, without a copy."""
        keys, values = self.layers[layer]
        return keys[rows, :, :length], values[rows, :, :length]

    def copy(self, row: int, source: KeyValues, source_row: int, length: int) -> None:
        """Takes the first `length` tokens of a row, which may be one of these."""
        places = torch.arange(length)
        for layer, (keys, values) in source.layers.items():
            if layer in self.layers:
                for mine, theirs in zip(self.layers[layer], (keys, values), strict=True):
                    mine[row, :, :length] = theirs[source_row, :, :length]
            else:
                own_keys, own_values = (kept[source_row, :, :length].transpose(0, 1) for kept in (keys, values))
                self.write(layer, own_keys, own_values, torch.full_like(places, row), places)


@dataclass(frozen=True)
class Shared:
    """Tokens that come before some rows' own: `length` of them in row 0 of `states`.

    `tokens` are the places, in the packed batch, of the queries behind it; None stands for all of them.
    """

    states: KeyValues
    length: int
    tokens: Tensor | None = None


@dataclass(frozen=True)
class Packed:
    """Where the tokens of one forward pass belong: what attention needs to know beside queries, keys and values.

    Args:
        own: holds the rows' own tokens, these ones included once they are written.
        rows: which rows of `own` the tokens are of, a contiguous range.
        lengths: how many tokens each of them has here, in order; together N.
        starts: how many own tokens each of them had before.
        shared: the prefixes before them; a token has one at most.
        positions: (N,) each token's position in its text, prefix included.
    """

    own: KeyValues
    rows: slice
    lengths: Sequence[int]
    starts: Sequence[int]
    shared: Sequence[Shared]
    positions: Tensor
    _made: dict[Any, Any] = field(default_factory=dict)

    def attend(
        self, layer: int, queries_1HND: Tensor, keys_1HND: Tensor, values_1HND: Tensor, options: _Options
    ) -> Tensor:
        """(1, N, H, D) what each token's heads read."""
        self.own.write(layer, keys_1HND[0].transpose(0, 1), values_1HND[0].transpose(0, 1), *self._homes)
        queries_NHD = queries_1HND[0].transpose(0, 1)
        read_NHD, lse_NH = self._own(layer, queries_NHD, options)
        for shared in self.shared:
            part = shared.tokens
            queries_nHD = queries_NHD if part is None else queries_NHD[part]
            bias = self._window_bias(shared, options.window)
            states = shared.states.part(layer, slice(0, 1), shared.length)
            # Without a window every query may read all of its prefix, so no mask is made, and none is applied.
            more_nHD, more_lse_nH = _shared(queries_nHD, *states, bias, options)
            if part is None:
                read_NHD, lse_NH = _merged(read_NHD, lse_NH, more_nHD, more_lse_nH)
            else:
                read_NHD[part], lse_NH[part] = _merged(read_NHD[part], lse_NH[part], more_nHD, more_lse_nH)
        # A sink is a score that takes its share of the weights and reads nothing: what is read shrinks by that share.
        if options.sinks is not None:
            read_NHD = read_NHD * torch.sigmoid(lse_NH - options.sinks)[..., None].to(read_NHD.dtype)
        return read_NHD[None]

    def _own(self, layer: int, queries_NHD: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
        count, width, length = len(self.lengths), max(self.lengths), self._reach
        keys, values = self.own.part(layer, self.rows, length)  # (R, Hkv, T, D)
        bias = self._own_bias(options.window)
        if width == 1:  # decoding: heads that read the same keys become rows of one product
            queries = queries_NHD.reshape(count, keys.shape[1], -1, queries_NHD.shape[-1])  # (R, Hkv, G, D)
            read, lse = _attention(queries, keys, values, bias, options)
            return read.flatten(1, 2), lse.flatten(1, 2)  # (R, H, D), (R, H)
        even = len(queries_NHD) == count * width  # no row is shorter than another: nothing to scatter
        if even:
            queries = queries_NHD.reshape(count, width, *queries_NHD.shape[1:])
        else:
            queries = queries_NHD.new_zeros(count, width, *queries_NHD.shape[1:])
            queries[self._grid] = queries_NHD  # (R, S, H, D), zeros behind the shorter rows
        read, lse = _attention(queries.transpose(1, 2), keys, values, bias, options, causal=bias is None)
        read, lse = read.transpose(1, 2), lse.transpose(1, 2)
        return (read.flatten(0, 1), lse.flatten(0, 1)) if even else (read[self._grid], lse[self._grid])

    @property
    def _reach(self) -> int:
        return max(start + length for start, length in zip(self.starts, self.lengths, strict=True))

    @property
    def _grid(self) -> tuple[Tensor, Tensor]:
        """(N,) each token's row here and its column in that row."""
        if "grid" not in self._made:
            device = self.positions.device
            rows = [row for row, length in enumerate(self.lengths) for _ in range(length)]
            columns = [column for length in self.lengths for column in range(length)]
            self._made["grid"] = torch.tensor(rows, device=device), torch.tensor(columns, device=device)
        grid: tuple[Tensor, Tensor] = self._made["grid"]
        return grid

    @property
    def _homes(self) -> tuple[Tensor, Tensor]:
        """(N,) each token's row in `own` and its place there."""
        if "homes" not in self._made:
            rows_N, columns_N = self._grid
            starts = torch.tensor(list(self.starts), device=rows_N.device)
            self._made["homes"] = rows_N + self.rows.start, starts[rows_N] + columns_N
        homes: tuple[Tensor, Tensor] = self._made["homes"]
        return homes

    def _own_bias(self, window: int | None) -> Tensor | None:
        """(R, 1, S, T) 0 where a query may read a key of its own row, -inf elsewhere; None: plainly causal."""
        width, length = max(self.lengths), self._reach
        if window is not None and length <= window:  # a window that reaches over all there is hides nothing
            window = None
        if window is None and width > 1 and not any(self.starts):
            return None  # causal: rows are filled from the left, so what is behind a row's last token is never read
        if window is None and width == 1 and len(set(self.starts)) == 1:  # equally long rows: every key is a past one
            return None
        if ("own", window) not in self._made:
            device = self.positions.device
            starts = torch.tensor(list(self.starts), device=device)[:, None, None]
            places = starts + torch.arange(width, device=device)[None, :, None]
            keys = torch.arange(length, device=device)
            seen = keys <= places
            if window is not None:
                seen &= keys > places - window
            self._made["own", window] = _bias(seen[:, None])
        bias: Tensor = self._made["own", window]
        return bias

    def _window_bias(self, shared: Shared, window: int | None) -> Tensor | None:
        """(n, P) the same for a prefix, which only a sliding window hides."""
        if window is None or int(self._last) < window:
            return None
        positions_N = self.positions if shared.tokens is None else self.positions[shared.tokens]
        return _bias(torch.arange(shared.length, device=positions_N.device) > positions_N[:, None] - window)

    @property
    def _last(self) -> int:
        if "last" not in self._made:
            self._made["last"] = int(self.positions.max())
        return int(self._made["last"])


@dataclass(frozen=True)
class _Options:
    """What a model's layer asks of attention."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def attending(model: Any) -> AbstractContextManager[None]:
    """The model's layers call this attention inside, and what they called before afterwards."""
    return attending_by(model.config.get_text_config(), NAME)


@contextmanager
def packed_as(packed: Packed) -> Iterator[None]:
    """One forward pass whose tokens belong where `packed` says."""
    token = _packed.set(packed)
    try:
        yield
    finally:
        _packed.reset(token)


_packed: ContextVar[Packed] = ContextVar("packed")


def _called_by_a_layer(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    options = _Options(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return _packed.get().attend(layer.layer_idx, query, key, value, options).contiguous(), None


AttentionInterface.register(NAME, _called_by_a_layer)


def _shared(
    queries_NHD: Tensor, keys_1HPD: Tensor, values_1HPD: Tensor, bias_NP: Tensor | None, options: _Options
) -> tuple[Tensor, Tensor]:
    """What N queries read from one prefix, (N, H, D), and the log-sum-exp of their scores, (N, H)."""
    count, heads = queries_NHD.shape[0], keys_1HPD.shape[1]
    grouped = queries_NHD.reshape(
        count, heads, -1, queries_NHD.shape[-1]
    )  # (N, Hkv, G, D): G query heads read the same keys
    per_head = grouped.shape[2]  # G
    queries = grouped.transpose(0, 1).reshape(1, heads, count * per_head, -1)
    bias = None if bias_NP is None else bias_NP.repeat_interleave(per_head, 0)[None, None]
    read, lse = _attention(queries, keys_1HPD, values_1HPD, bias, options)
    read_NHD = read.view(heads, count, per_head, -1).transpose(0, 1).flatten(1, 2)
    return read_NHD, lse.view(heads, count, per_head).transpose(0, 1).flatten(1, 2)


def _merged(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two reads of disjoint keys as one read of all of them."""
    # exp(second_lse) / (exp(first_lse) + exp(second_lse)), in fp32: 16-bit differences of large scores would be rough.
    share = torch.sigmoid(second_lse - first_lse)[..., None]
    read = torch.lerp(first.float(), second.float(), share).to(first.dtype)
    return read, torch.logaddexp(first_lse, second_lse)


def _attention(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, options: _Options, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """(B, H, S, D) what the queries read, and (B, H, S) the log-sum-exp of their scores in fp32."""
    device = queries.device.type
    # A kernel returns NaN where a window hides all keys.
    fused = options.softcap is None and keys.shape[-1] == values.shape[-1] and (bias is None or options.window is None)
    if fused and device == "cpu":
        if causal and queries.shape[2] == keys.shape[2] and _BLOCK < queries.shape[2] <= _KEYS_AT_ONCE:
            return _causal_blocks(queries, keys, values, options)
        return flash(queries, keys, values, scale=options.scale, causal=causal, bias=bias)
    keys, values = (_of_heads(states, queries.shape[1]) for states in (keys, values))  # (B, Hkv, T, D) -> (B, H, T, D)
    if fused and device == "cuda" and keys.shape[-1] % 8 == 0:
        return efficient(queries, keys, values, scale=options.scale, causal=causal, bias=bias)
    if causal:
        bias = _bias(torch.ones(queries.shape[2], keys.shape[2], dtype=torch.bool, device=keys.device).tril())
    return _in_parts(queries, keys, values, bias, options)


def _causal_blocks(queries: Tensor, keys: Tensor, values: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    """The same, block by block of queries, without the keys behind each."""
    seen = torch.ones(_BLOCK, _BLOCK, dtype=torch.bool, device=queries.device).tril()
    reads, lses = [], []
    for start in range(0, queries.shape[2], _BLOCK):
        end = min(start + _BLOCK, queries.shape[2])
        # Keys before the block are all seen; those of the block itself up to each query; those behind are not there.
        bias = queries.new_zeros(end - start, end)
        bias[:, start:].masked_fill_(~seen[: end - start, : end - start], float("-inf"))
        block = queries[:, :, start:end], keys[:, :, :end], values[:, :, :end], bias[None, None]
        read, lse = _attention(*block, options)
        reads.append(read)
        lses.append(lse)
    return torch.cat(reads, 2), torch.cat(lses, 2)


def _in_parts(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, options: _Options
) -> tuple[Tensor, Tensor]:
    """Attention from plain products, a part of the queries at a time."""
    rows, heads, count, _ = queries.shape
    step = max(1, _SCORES_AT_ONCE // (rows * heads * keys.shape[2]))
    parts = [
        _plain(
            queries[:, :, start : start + step],
            keys,
            values,
            bias if bias is None or bias.shape[-2] == 1 else bias[..., start : start + step, :],
            options,
        )
        for start in range(0, count, step)
    ]
    reads, lses = zip(*parts, strict=True)
    return torch.cat(reads, 2), torch.cat(lses, 2)


def _plain(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, options: _Options
) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(queries, keys.transpose(2, 3)).float() * options.scale
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    if bias is not None:
        scores = scores + bias
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.clamp(min=-1e30)[..., None])  # all zero where nothing is seen
    return torch.matmul(weights.to(values.dtype), values), lse


def _of_heads(states: Tensor, heads: int) -> Tensor:
    """Keys or values for each head of queries; not copied where there are as many."""
    return states if states.shape[1] == heads else states.repeat_interleave(heads // states.shape[1], 1)


def _bias(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, float("-inf"))
