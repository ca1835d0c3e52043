"""Generation: many prompts decoded together, what they share computed once, rows joining and leaving the batch."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate
from typing import Any

import torch
from cotune.errors import BadValueError, CotuneError
from cotune.inference.codec import Codec
from cotune.inference.engine import Generated, Prompted
from cotune.inference.fields import Plan
from cotune.inference.local.cascade import KeyValues, Packed, Shared, attending, packed_as
from cotune.inference.local.finite import check_finite
from cotune.inference.local.out_of_memory import is_out_of_memory
from cotune.inference.local.plain import complete
from cotune.inference.local.prefixes import BLOCK, PrefixCache, group_by_shared_prefix, waves_by_prefix
from cotune.inference.local.row import Row, chosen
from cotune.programs.layout import Layout
from cotune.programs.lm import Sampling, completed
from cotune.programs.shared_prefix import shared_prefix
from torch import Tensor

_PREFILL = {"cpu": 1024, "cuda": 8192}
"""Prompt tokens computed together: enough for full speed of the products; more would only take memory."""


class GenerationMemoryError(CotuneError, RuntimeError):
    """Memory ran out while nothing but one completion was under way."""


class Decoder:
    """Decodes prompts with a causal LM.

    Prompts that share a prefix attend to one copy of it (`cascade`). Rows that have ended leave the batch and waiting
    ones join, within a bound on memory. What is computed together follows from the prompts alone, never from timing or
    from what was kept of earlier calls, so that equal calls give equal bits.

    Args:
        model: a transformers (or PEFT) causal LM whose layers all attend, in eval mode.
        codec: its tokenizer.
        window: longest prompt plus completion, in tokens.
        cache_tokens: keys and values kept at once, in tokens: half for the rows of a batch, half for prefixes.
        weights: a value that changes when the weights do. While it is equal, prefixes are kept from call to call; None
            keeps none.
        keep_rows: keep the rows' own keys and values as well, so that a prompt asked again is not computed again. The
            last bits of its logits then depend on what ran before.
        together: whether texts of up to so many tokens can be decoded together; the others are completed one at a time
            (`plain`).
    """

    def __init__(
        self,
        model: Any,
        *,
        codec: Codec,
        window: int,
        cache_tokens: int,
        weights: Callable[[], Hashable] | None = None,
        keep_rows: bool = False,
        together: Callable[[int], bool] = lambda tokens: True,
    ) -> None:
        self.model, self.codec, self.together = model, codec, together
        self.window, self.cache_tokens = window, cache_tokens
        self.weights, self.keep_rows = weights, keep_rows
        self._prefixes = PrefixCache(cache_tokens // 2)
        self.asked = PrefixCache(cache_tokens // 2)
        self._made_with: Hashable = None
        self._plans: dict[Layout, Plan] = {}

    def waves(self, prompts: Sequence[Prompted]) -> list[list[int]]:
        """Indices of the prompts in the parts they are best generated in, one after another.

        A wave is what is stored as one unit. Prompts with much in common stand together. It follows from the prompts
        alone, so a run that is continued makes the same waves again.
        """
        return waves_by_prefix(prompts)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompted], sampling: Sampling) -> list[Generated]:
        """One result a prompt, in order.

        Raises:
            GenerationMemoryError: there is no memory for a single one.
        """
        self._forget_if_written()
        results = [Generated([], "", "too_long")] * len(prompts)  # what no row overwrites did not fit
        rows = self._rows(prompts, sampling)
        together = [  # some are fixed from end to end
            row for row in rows if not row.ended and self.together(len(row.prompt.ids) + row.filling.most)
        ]
        with attending(self.model):
            for batch in _of_like_size(together):
                self._run(batch)
        for row in rows:
            if not row.ended:
                self._run_alone(row)
                completed()
            results[row.index] = row.result
        return results

    def plan(self, layout: Layout) -> Plan:
        """The layout for this tokenizer, compiled once."""
        if layout not in self._plans:
            self._plans[layout] = Plan(layout, self.codec)
        return self._plans[layout]

    def _forget_if_written(self) -> None:
        made_with = self.weights() if self.weights else None
        if made_with is None or made_with != self._made_with:
            self._prefixes.clear()
            self.asked.clear()
        self._made_with = made_with

    def _rows(self, prompts: Sequence[Prompted], sampling: Sampling) -> list[Row]:
        """A row for each prompt that fits the window with all that its layout needs, those that share a prefix behind
        one another."""
        fitting = [
            i for i, prompt in enumerate(prompts) if len(prompt.ids) + self.plan(prompt.layout).least <= self.window
        ]
        rows = []
        for group in group_by_shared_prefix([prompts[i].ids for i in fitting]):
            members = [fitting[g] for g in group]
            shared = shared_prefix([prompts[i].ids for i in members]) if len(members) > 1 else 0
            prefix = tuple(prompts[members[0]].ids[:shared])
            rows += [Row(i, prompts[i], prefix, sampling, self.plan(prompts[i].layout), self.window) for i in members]
        return rows

    def _run(self, rows: Sequence[Row]) -> None:
        """Decodes rows until each has ended, as many at a time as memory is given to.

        Where even that memory is not there, half as many at a time; what they had written is written again.
        """
        capacity = max(row.capacity for row in rows)
        single = False  # one row at a time has been tried, beside what was kept of earlier calls
        while True:
            # Half of the memory is for rows, the other for prefixes.
            slots = min(len(rows), max(1, self.cache_tokens // 2 // capacity))
            try:
                _Batch(self, rows, slots=slots, capacity=capacity).run()
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if single:
                    raise GenerationMemoryError(_one_row(max(rows, key=lambda row: len(row.prompt.ids)))) from error
            single = slots == 1
            # What was too much once stays so: later calls begin with the smaller number.
            self.cache_tokens = max(slots // 2, 1) * capacity * 2
            self._prefixes.clear()
            self.asked.clear()
            for row in rows:
                row.restart()
            warnings.warn(
                f"out of memory with {slots} completions at a time: continuing with {max(slots // 2, 1)}.", stacklevel=2
            )

    def _run_alone(self, row: Row) -> None:
        """Completes a row by the model's own `generate`."""

        def take(logits_1V: Tensor) -> None:
            check_finite(logits_1V, self.model)
            (token,), (log_prob,) = chosen([row], logits_1V)
            row.take(token, log_prob)

        try:
            complete(self.model, row.prompt.ids, row.filling, take)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise GenerationMemoryError(_one_row(row)) from error

    def prefix(self, ids: tuple[int, ...]) -> Shared:
        """Keys and values of a prefix, computed block by block unless they were kept."""
        states = self._prefixes.get(ids)
        if states is None:
            states = KeyValues(1, len(ids))
            longest, done = self._prefixes.longest(ids) or (None, 0)  # of a shorter one, kept, its part is taken
            if longest is not None:
                states.copy(0, longest, 0, done)
            for start in range(done, len(ids), BLOCK):
                block = ids[start : start + BLOCK]
                positions = torch.arange(start, start + len(block), device=self.model.device)
                self.forward(block, Packed(states, slice(0, 1), [len(block)], [start], [], positions), [len(block) - 1])
            self._prefixes.put(ids, states)
        return Shared(states, len(ids))

    def forward(self, ids: Sequence[int], packed: Packed, keep: Sequence[int]) -> Tensor:
        """(K, V) logits behind the tokens at the places `keep`, of ids that belong where `packed` says."""
        device = self.model.device
        with packed_as(packed):
            logits: Tensor = self.model(
                input_ids=torch.tensor([list(ids)], device=device),
                position_ids=packed.positions[None],
                use_cache=False,  # keys and values go into `packed.own`
                logits_to_keep=torch.tensor(list(keep), device=device),
            ).logits[0]
        if len(packed.own.layers) != self.model.config.get_text_config().num_hidden_layers:
            raise BadValueError(
                f"only {len(packed.own.layers)} layers of {type(self.model).__name__} have keys and values of "
                "their own, and cotune generates only with models in which every layer has. Use another model."
            )
        return logits


class _Batch:
    """Rows decoding together in the slots of one buffer. Running rows stand in the first slots, without gaps."""

    def __init__(self, decoder: Decoder, rows: Sequence[Row], *, slots: int, capacity: int) -> None:
        self.decoder, self.slots = decoder, slots
        self.waiting, self.running = deque(rows), list[Row]()
        self.own = KeyValues(slots, capacity)
        self.prefixes: dict[tuple[int, ...], Shared] = {}  # of running rows: the decoder may drop its own meanwhile

    def run(self) -> None:
        while self.waiting or self.running:
            free = self.slots - len(self.running)
            # A pass over few prompts costs as much as over many, so newcomers wait until a quarter is free.
            if self.waiting and (not self.running or 4 * free >= self.slots):
                self._admit(min(free, len(self.waiting)))
            else:
                self._step()

    def _admit(self, count: int) -> None:
        """Computes the prompts of waiting rows, a few hundred tokens at a time, and their first tokens."""
        limit = _PREFILL.get(self.decoder.model.device.type, _PREFILL["cuda"])
        joining, tokens = list[Row](), 0
        for row in [self.waiting.popleft() for _ in range(count)]:
            new = len(row.unread) - self._kept(row)  # tokens that the pass computes
            if joining and tokens + new > limit:
                self._prefill(joining)
                joining, tokens = [], 0
            joining.append(row)
            tokens += new
        self._prefill(joining)

    def _prefill(self, rows: list[Row]) -> None:
        first = len(self.running)
        for i, row in enumerate(rows):
            row.held = self._recall(first + i, row)  # kept keys and values are not computed again
        logits_RV = self._forward(rows, first)
        for i, row in enumerate(rows):
            self._remember(first + i, row)
        self.running += rows
        self._take(rows, logits_RV)

    def _step(self) -> None:
        self._take(self.running, self._forward(self.running, 0))

    def _forward(self, rows: Sequence[Row], first: int) -> Tensor:
        """(R, V) logits behind all that these rows, from slot `first` on, have not read yet. Now they have."""
        device = self.decoder.model.device
        new = [row.unread for row in rows]  # the prompt's rest first, later a token or a fixed text
        lengths, starts = [len(ids) for ids in new], [row.held for row in rows]
        positions = [
            len(row.prefix) + start + i
            for row, start, length in zip(rows, starts, lengths, strict=True)
            for i in range(length)
        ]
        packed = Packed(
            own=self.own,
            rows=slice(first, first + len(rows)),
            lengths=lengths,
            starts=starts,
            shared=self._shared(rows, lengths),
            positions=torch.tensor(positions, device=device),
        )
        ends = [end - 1 for end in accumulate(lengths)]  # (R,) each row's last new token
        logits_RV = self.decoder.forward([i for ids in new for i in ids], packed, ends)
        for row in rows:
            row.read()
        return logits_RV

    def _shared(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[Shared]:
        """The prefixes of these rows, and which of the packed tokens stand behind each."""
        tokens: dict[tuple[int, ...], list[int]] = {}
        place = 0
        for row, length in zip(rows, lengths, strict=True):
            if row.prefix:
                tokens.setdefault(row.prefix, []).extend(range(place, place + length))
            place += length
        device = self.decoder.model.device
        shared = []
        self.prefixes = {prefix: self.prefixes.get(prefix) or self.decoder.prefix(prefix) for prefix in tokens}
        for prefix, places in tokens.items():
            found = self.prefixes[prefix]
            # None: all tokens are behind it, and nothing has to be gathered.
            part = None if len(places) == place else torch.tensor(places, device=device)
            shared.append(Shared(found.states, found.length, part))
        return shared

    def _take(self, rows: Sequence[Row], logits_RV: Tensor) -> None:
        """Adds a token to each of these rows. Rows that end leave, and the last ones move up into their slots."""
        check_finite(logits_RV, self.decoder.model)
        for row, token, log_prob in zip(rows, *chosen(rows, logits_RV), strict=True):
            row.take(token, log_prob)
        if ended := sum(row.ended for row in rows):
            completed(ended)
        # From the back, so that the row that moves up is one that goes on.
        for slot in reversed(range(len(self.running))):
            if self.running[slot].ended:
                last = self.running.pop()  # of all slots in use
                if slot < len(self.running):
                    self.running[slot] = last
                    self.own.copy(slot, self.own, len(self.running), last.held)

    def _kept(self, row: Row) -> int:
        """How many of the row's own tokens are kept from an earlier call."""
        kept = self.decoder.asked.get(row.key)
        return 0 if kept is None else kept.capacity

    def _recall(self, slot: int, row: Row) -> int:
        """Puts what is kept of the row into its slot; how many tokens that was."""
        kept = self.decoder.asked.get(row.key)
        if kept is None:
            return 0
        self.own.copy(slot, kept, 0, kept.capacity)
        return kept.capacity

    def _remember(self, slot: int, row: Row) -> None:
        if self.decoder.keep_rows and len(row.own) > 1 and self.decoder.asked.get(row.key) is None:
            states = KeyValues(1, len(row.own) - 1)  # not the last: it is read again, for its logits
            states.copy(0, self.own, slot, states.capacity)
            self.decoder.asked.put(row.key, states)


def _of_like_size(rows: Sequence[Row]) -> list[list[Row]]:
    """Batches in which no row needs less than half the room of another: all get as much, and attend over as much."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -row.capacity):
        if not batches or 2 * row.capacity < batches[-1][0].capacity:
            batches.append([])
        batches[-1].append(row)
    places = {row.index: place for place, row in enumerate(rows)}  # prompts that share a prefix stay neighbours
    return [sorted(batch, key=lambda row: places[row.index]) for batch in batches]


def _one_row(row: Row) -> str:
    return (
        f"memory ran out on a single completion: a prompt of {len(row.prompt.ids)} tokens and up to "
        f"{row.filling.most} new ones. Ways out: model.lm.dtype bfloat16, model.lm.quantization nf4, "
        "model.lm.merge_while_generating false, "
        "shorter prompts (fewer demos or passages), model.sampling.max_new_tokens, or a smaller model."
    )
