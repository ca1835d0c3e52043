"""A row of a batch: one prompt under way, and the choice of its next token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from cotune.inference.engine import Generated, Prompted
from cotune.inference.fields import Filling, Plan
from cotune.inference.local.sampling import log_probs, sample
from cotune.programs.lm import Sampling
from torch import Tensor


class Row:
    """A prompt under way: what it has written, its random draws, and how much of it the model has read.

    Attributes:
        own: the prompt's ids behind the prefix.
        held: keys and values it has behind its prefix.
    """

    def __init__(
        self, index: int, prompt: Prompted, prefix: tuple[int, ...], sampling: Sampling, plan: Plan, window: int
    ) -> None:
        self.index, self.prompt, self.prefix = index, prompt, prefix
        self.sampling, self.plan = sampling, plan
        # Its own room: a longer neighbour must not cut it short.
        self.room = window - len(prompt.ids)
        self.own = list(prompt.ids[len(prefix) :])
        self.restart()
        self.draws = self._draws() if sampling.temperature > 0 else None

    def restart(self) -> None:
        self.filling = Filling(self.plan, max_new_tokens=self.sampling.max_new_tokens, room=self.room)
        self.held = 0

    @property
    def key(self) -> tuple[int, ...]:
        """What its own keys and values are kept under."""
        return (len(self.prefix), *self.prompt.ids)

    @property
    def capacity(self) -> int:
        """Keys and values it can come to have, without its prefix: the last token written needs none."""
        return len(self.own) + self.filling.most - 1

    @property
    def unread(self) -> Sequence[int]:
        """Ids that the model has not read: the last token, a fixed text, before the first pass the prompt's own too."""
        start = self.held - len(self.own)  # below 0 while the prompt is unread
        return self.filling.written[start:] if start >= 0 else self.own[self.held :] + self.filling.written

    @property
    def ended(self) -> bool:
        return self.filling.finished is not None

    @property
    def result(self) -> Generated:
        return self.filling.result(log_probs=self.sampling.log_probs)

    def read(self) -> None:
        """The model has read all there is."""
        self.held = len(self.own) + len(self.filling.written)

    def take(self, token: int, log_prob: float) -> None:
        self.filling.take(token, log_prob)
        # Of tokens that were taken back, keys and values are written over. The last id is read for what follows it.
        written = len(self.filling.written)
        self.held = len(self.own) + min(self.filling.kept, written - 1)

    def _draws(self) -> list[float]:
        """Uniform numbers, one a token that is decided, from the row's own seed."""
        generator = torch.Generator().manual_seed(self.prompt.seed)
        drawn: list[float] = torch.rand(self.filling.draws, generator=generator, dtype=torch.float64).tolist()
        return drawn


def chosen(rows: Sequence[Row], logits_RV: Tensor) -> tuple[list[int], list[float]]:
    """The next token of each row, and its log-probability where that is asked for."""
    for place, row in enumerate(rows):
        if (added := row.filling.offsets(logits_RV.device)) is not None:
            ids_n, nats_n = added
            logits_RV[place, ids_n] += nats_n.to(logits_RV.dtype)
        forbidden_V = row.filling.forbidden(logits_RV.shape[1], logits_RV.device)
        if forbidden_V is not None:
            logits_RV[place].masked_fill_(forbidden_V, float("-inf"))  # in place: the log-probabilities below see it
    tokens, sampling = _choose(rows, logits_RV), rows[0].sampling
    if not sampling.log_probs:
        return tokens, [0.0] * len(tokens)
    return tokens, log_probs(logits_RV, tokens, temperature=sampling.temperature)


def _choose(rows: Sequence[Row], logits_RV: Tensor) -> list[int]:
    """The next token of each row: the likeliest, or drawn with the row's own number."""
    sampling = rows[0].sampling
    if sampling.temperature == 0:
        greedy: list[int] = logits_RV.argmax(dim=-1).tolist()
        return greedy
    # By the count of tokens decided so far, those that were taken back included, so that no number is used twice.
    draws = [row.draws[row.filling.free] for row in rows if row.draws is not None]
    draws_R = torch.tensor(draws, dtype=torch.float64, device=logits_RV.device)
    drawn: list[int] = sample(logits_RV, draws_R, temperature=sampling.temperature, top_p=sampling.top_p).tolist()
    return drawn
