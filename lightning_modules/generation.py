"""Generation: many prompts decoded together, what they share computed once, finished rows leaving the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from cotune.datamodules.collate import shared_prefix
from cotune.programs.lm import Sampling
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

_GROUP_COST = 48
"""What another batch costs, in tokens: below this a longer shared prefix is not worth a smaller batch."""

WAVE = 128
"""Most prompts generated as one unit: enough to keep a batch full, few enough to lose little to a kill."""


@dataclass(frozen=True)
class Prompted:
    """A prompt to complete, as ids."""

    ids: Sequence[int]
    stops: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """Ids written (end-of-turn token included, a stop string not), their text, and why they end."""

    ids: list[int]
    text: str
    finished: Literal["eos", "stop", "length", "too_long"]


def group_by_prefix(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of the prompts, grouped so that computing each group's shared prefix once costs least.

    A group of n prompts costs its shared prefix once, the rest of each prompt, and a constant for being a batch. No
    grouping whatever has a lower sum. It depends on the prompts alone.

    >>> group_by_prefix([[1] * 100 + [2], [5] * 100 + [6], [1] * 100 + [3]])
    [[0, 2], [1]]
    """
    nodes = _radix_tree(prompts)
    closes_below = _groups_pay(nodes)
    groups: list[list[int]] = []
    for node, below in zip(nodes, closes_below, strict=True):  # a prompt joins the nearest group above it
        above = node.parent.home if node.parent else None
        node.home = node if (above.level + 1 if above else 0) < below else above
        if node.home is None:
            groups += [[i] for i in node.members]
        else:
            node.home.group += node.members
    groups += [node.group for node in nodes if node.group]
    return sorted((sorted(group) for group in groups), key=lambda group: group[0])


@dataclass(eq=False)
class _Node:
    """A prefix of `depth` tokens at which prompts part: `members` share no more than it with any other prompt."""

    depth: int
    parent: _Node | None = None
    level: int = 0
    members: list[int] = field(default_factory=list)
    home: _Node | None = None  # itself or the node above whose group its members join
    group: list[int] = field(default_factory=list)


def _radix_tree(prompts: Sequence[Sequence[int]]) -> list[_Node]:
    """The radix tree of the prompts, parents first. A prompt's last token is its own, so it does not count."""
    order = sorted(range(len(prompts)), key=lambda i: (tuple(prompts[i][:-1]), i))
    shared = [shared_prefix([prompts[i], prompts[j]]) for i, j in pairwise(order)]
    path = [_Node(0)]  # from the root to where the last prompt hangs
    nodes = path[:]
    for i, before, after in zip(order, [0, *shared], [*shared, 0], strict=False):
        below = None
        while path[-1].depth > before:
            below = path.pop()
        for depth in (before, after):
            if depth > path[-1].depth:
                path.append(_Node(depth, path[-1]))
                nodes.append(path[-1])
                if below is not None:
                    below.parent, below = path[-1], None
        path[-1].members.append(i)
    nodes.sort(key=lambda node: node.depth)
    for node in nodes[1:]:
        assert node.parent is not None
        node.level = node.parent.level + 1
    return nodes


def _groups_pay(nodes: Sequence[_Node]) -> list[int]:
    """For each node: below which level of the nearest group above it (counted from 1; 0 is none) it should be a group.

    Compared with computing each prompt for itself, a group of n prompts with a prefix of P tokens saves
    (n - 1) P - _GROUP_COST: each prompt P, the group less P and the constant. So what a node's prompts save hangs on
    one thing above it, the depth of the group they would join, and is best found from the leaves up.
    """
    saved: dict[_Node, list[int]] = {}
    closes_below = []
    for node in reversed(nodes):
        above, at = [node.depth], node.parent
        while at is not None:
            above.append(at.depth)
            at = at.parent
        own = len(node.members)
        best = [own * gain for gain in (-_GROUP_COST, *reversed(above))]  # by the group above: none, the root's, ...
        if node in saved:
            best = [a + b for a, b in zip(best, saved.pop(node), strict=True)]
        as_group = best.pop() - node.depth - _GROUP_COST
        closes_below.append(sum(as_group >= joining for joining in best))
        if node.parent is not None:
            best = [max(as_group, joining) for joining in best]
            so_far = saved.get(node.parent)
            saved[node.parent] = best if so_far is None else [a + b for a, b in zip(so_far, best, strict=True)]
    return closes_below[::-1]


class Decoder:
    """Decodes prompts with a causal LM.

    Args:
        model: a transformers (or PEFT) causal LM, in eval mode.
        decode: ids -> text.
        end_ids: ids that end a turn.
        pad_id: any valid id; padding is masked.
        window: longest prompt plus completion, in tokens.
        cache_tokens: keys and values kept at once, in tokens over all rows: the bound on a batch's memory.
    """

    def __init__(
        self,
        model: Any,
        *,
        decode: Callable[[Sequence[int]], str],
        end_ids: Sequence[int],
        pad_id: int,
        window: int,
        cache_tokens: int,
    ) -> None:
        self.model, self.decode = model, decode
        self.end_ids, self.pad_id = frozenset(end_ids), pad_id
        self.window, self.cache_tokens = window, cache_tokens

    def waves(self, prompts: Sequence[Prompted]) -> list[list[int]]:
        """Indices of the prompts in the parts they are best generated in, one after another.

        A wave is what is stored as one unit. Prompts with much in common stand together. It follows from the prompts
        alone, so a run that is continued makes the same waves again.
        """
        order = [i for group in group_by_prefix([prompt.ids for prompt in prompts]) for i in group]
        return [order[start : start + WAVE] for start in range(0, len(order), WAVE)]

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompted], sampling: Sampling) -> list[Generated]:
        """One result a prompt, in order. The batches follow from the prompts alone, never from timing."""
        results: list[Generated | None] = [None] * len(prompts)
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt.ids) < self.window]
        for group in group_by_prefix([prompts[i].ids for i in fitting]):
            members = [fitting[g] for g in group]
            shared = shared_prefix([prompts[i].ids for i in members])
            prefix = self._prefix(prompts[members[0]].ids[:shared])
            for chunk in self._chunks(members, prompts, shared, sampling):
                rows = _Rows([prompts[i] for i in chunk], sampling, self)
                self._run(rows, prefix, shared)
                for i, result in zip(chunk, rows.results(), strict=True):
                    results[i] = result
        return [result or Generated([], "", "too_long") for result in results]

    def _chunks(
        self, members: list[int], prompts: Sequence[Prompted], shared: int, sampling: Sampling
    ) -> Iterator[list[int]]:
        """Cuts a group into batches that fit `cache_tokens`, rows of like length together to pad least."""
        members = sorted(members, key=lambda i: len(prompts[i].ids))  # stable: equal lengths stay in order
        chunk: list[int] = []
        for i in members:
            width = min(len(prompts[i].ids) + sampling.max_new_tokens, self.window)
            if chunk and (len(chunk) + 1) * width > self.cache_tokens:
                yield chunk
                chunk = []
            chunk.append(i)
        yield chunk

    def _prefix(self, ids: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the shared tokens, a pair a layer, each (1, H, P, D); none for no tokens."""
        if not ids:
            return []
        cache = DynamicCache(config=self.model.config)
        ids_1P = torch.tensor([list(ids)], device=self.model.device)
        self.model(input_ids=ids_1P, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _run(self, rows: _Rows, prefix: list[tuple[Tensor, Tensor]], shared: int) -> None:
        """Prefills the rows' own tokens behind the prefix, then decodes until the last row has ended."""
        device = self.model.device
        own = [list(row.ids[shared:]) for row in rows.prompts]
        width = max(len(ids) for ids in own)
        ids_BS = torch.tensor([[self.pad_id] * (width - len(ids)) + ids for ids in own], device=device)
        own_mask_BS = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in own], device=device)
        mask_BT = torch.cat([own_mask_BS.new_ones(len(own), shared), own_mask_BS], dim=1)
        cache = growing_cache(prefix, rows=len(own), capacity=shared + width + max(rows.limits), layers=self._layers())
        while True:
            # Padding stands between prefix and own tokens, so positions are counted over real tokens only.
            positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
            logits_BV = self.model(
                input_ids=ids_BS,
                attention_mask=mask_BT,
                position_ids=positions_BT[:, -ids_BS.shape[1] :],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            tokens_B, staying = rows.take(logits_BV)
            if not staying:
                return
            if len(staying) < len(tokens_B):
                keep = torch.tensor(staying, device=device)
                cache.batch_select_indices(keep)
                tokens_B, mask_BT = tokens_B[keep], mask_BT[keep]
            ids_BS = tokens_B[:, None]
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(staying), 1)], dim=1)

    def _layers(self) -> int:
        return int(self.model.config.get_text_config().num_hidden_layers)


class _Rows:
    """The rows of a batch: what each has written, which still run, and their random draws."""

    def __init__(self, prompts: Sequence[Prompted], sampling: Sampling, decoder: Decoder) -> None:
        self.prompts, self.sampling, self.decoder = prompts, sampling, decoder
        # Each row's own room: a longer neighbour must not cut it short.
        self.limits = [min(sampling.max_new_tokens, decoder.window - len(prompt.ids)) for prompt in prompts]
        self.written: list[list[int]] = [[] for _ in prompts]
        self.done: dict[int, Generated] = {}
        self.running = list(range(len(prompts)))
        self.draws_BN = self._draws() if sampling.temperature > 0 else None

    def take(self, logits_BV: Tensor) -> tuple[Tensor, list[int]]:
        """Adds a token to every running row. Returns the tokens and which of those rows (by place) go on."""
        tokens_B = self._choose(logits_BV)
        staying, still = [], []
        for place, (row, token) in enumerate(zip(self.running, tokens_B.tolist(), strict=True)):
            self.written[row].append(token)
            ended = self._ended(row)
            if ended is None:
                staying.append(place)
                still.append(row)
            else:
                self.done[row] = ended
        self.running = still
        return tokens_B, staying

    def results(self) -> list[Generated]:
        return [self.done[row] for row in range(len(self.prompts))]

    def _choose(self, logits_BV: Tensor) -> Tensor:
        if self.draws_BN is None:
            return logits_BV.argmax(dim=-1)
        step = len(self.written[self.running[0]])
        draws_B = self.draws_BN[self.running, step].to(logits_BV.device)
        return sample(logits_BV, draws_B, temperature=self.sampling.temperature, top_p=self.sampling.top_p)

    def _draws(self) -> Tensor:
        """(B, N) uniform numbers, a row a request, from its own seed: the batch has no influence on them."""
        return torch.stack(
            [
                torch.rand(max(self.limits), generator=torch.Generator().manual_seed(prompt.seed), dtype=torch.float64)
                for prompt in self.prompts
            ]
        )

    def _ended(self, row: int) -> Generated | None:
        ids = self.written[row]
        if ids[-1] in self.decoder.end_ids:
            return Generated(ids, self.decoder.decode(ids[:-1]), "eos")
        stopped = self._stopped(ids, self.prompts[row].stops)
        if stopped is not None:
            return stopped
        if len(ids) >= self.limits[row]:
            return Generated(ids, self.decoder.decode(ids), "length")
        return None

    def _stopped(self, ids: list[int], stops: tuple[str, ...]) -> Generated | None:
        if not stops:
            return None
        tail = self.decoder.decode(ids[-2 - max(len(stop.encode()) for stop in stops) :])  # a token has a byte or more
        if not any(stop in tail for stop in stops):
            return None
        text = self.decoder.decode(ids)
        cut = min(text.index(stop) for stop in stops if stop in text)
        count = next(n for n in range(len(ids), -1, -1) if len(self.decoder.decode(ids[:n])) <= cut)
        return Generated(ids[:count], text[:cut], "stop")


def sample(logits_BV: Tensor, draws_B: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """(B,) token ids drawn by inverse CDF from each row's nucleus (Holtzman et al., 2020).

    Args:
        logits_BV: unnormalised log-probabilities.
        draws_B: a uniform number in [0, 1) a row; equal logits and draws give equal tokens.
        top_p: sample among the fewest likeliest tokens whose probabilities reach this.
    """
    probabilities_BV = torch.softmax(logits_BV.double() / temperature, dim=-1)
    if top_p >= 1:
        return _inverse_cdf(probabilities_BV, draws_B)
    # Sorting 50k entries a row is slow; the head of the order nearly always holds the nucleus.
    count = min(256, probabilities_BV.shape[-1])
    head_BK, order_BK = probabilities_BV.topk(count, dim=-1)
    tokens_B = _from_nucleus(head_BK, order_BK, draws_B, top_p)
    wide_B = head_BK.sum(dim=-1) < top_p
    if bool(wide_B.any()):
        # Only these rows: among equal probabilities the two orders differ, and a neighbour must not choose the order.
        whole_BV, order_BV = probabilities_BV[wide_B].sort(dim=-1, descending=True, stable=True)
        tokens_B[wide_B] = _from_nucleus(whole_BV, order_BV, draws_B[wide_B], top_p)
    return tokens_B


def _from_nucleus(head_BK: Tensor, order_BK: Tensor, draws_B: Tensor, top_p: float) -> Tensor:
    before_BK = head_BK.cumsum(dim=-1) - head_BK
    nucleus_BK = head_BK.masked_fill(before_BK >= top_p, 0.0)
    return order_BK.gather(1, _inverse_cdf(nucleus_BK, draws_B)[:, None])[:, 0]


def _inverse_cdf(weights_BK: Tensor, draws_B: Tensor) -> Tensor:
    cumulative_BK = weights_BK.cumsum(dim=-1)
    wanted_B1 = draws_B[:, None].to(cumulative_BK.dtype) * cumulative_BK[:, -1:]
    return torch.searchsorted(cumulative_BK, wanted_B1, right=True)[:, 0].clamp(max=weights_BK.shape[-1] - 1)


class _GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer in a buffer that has room for all that will come: no copy at each token."""

    def __init__(self, prefix: tuple[Tensor, Tensor] | None, rows: int, capacity: int) -> None:
        super().__init__()
        self._prefix, self._rows, self._capacity, self._length = prefix, rows, capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = [
            states.new_empty(self._rows, states.shape[1], self._capacity, states.shape[3])
            for states in (key_states, value_states)
        ]
        if self._prefix is not None:
            self._length = self._prefix[0].shape[2]
            for buffer, shared in zip(self._buffers, self._prefix, strict=True):
                buffer[:, :, : self._length] = shared
            self._prefix = None
        self.is_initialized = True
        self._expose()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self._length + key_states.shape[2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._length : end] = states
        self._length = end
        self._expose()
        return self.keys, self.values

    def get_seq_length(self) -> int:
        if not self.is_initialized:
            return 0 if self._prefix is None else int(self._prefix[0].shape[2])
        return self._length

    def batch_select_indices(self, indices: Tensor) -> None:
        self._buffers = [buffer[indices] for buffer in self._buffers]
        self._expose()

    def _expose(self) -> None:
        self.keys, self.values = (buffer[:, :, : self._length] for buffer in self._buffers)


def growing_cache(prefix: Sequence[tuple[Tensor, Tensor]], *, rows: int, capacity: int, layers: int) -> DynamicCache:
    """A cache whose rows all begin with the prefix's keys and values, with room for `capacity` tokens a row."""
    cache = DynamicCache()
    cache.layers = [_GrowingLayer(prefix[i] if prefix else None, rows, capacity) for i in range(layers)]
    return cache
