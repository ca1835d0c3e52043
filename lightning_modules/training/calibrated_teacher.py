"""What calibrated prompts teach: where a choice is decided, the LM's probabilities with the prompts' offsets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from cotune.datamodules import Pair, PairMaker, Trace
from cotune.inference.codec import Codec
from cotune.inference.fields import Filling, Plan
from cotune.lightning_modules.training.choosing import decoded, told_of
from cotune.programs.calibration import calibrated
from cotune.programs.forms import form_of

_ROWS = 32
_CPU = torch.device("cpu")
_NEVER = -50.0
"""The log-probability that the teacher gives a token which is none of those that it chooses among."""


@dataclass(frozen=True)
class _Fork:
    """A place of a completion at which a choice is decided.

    Attributes:
        nats: token that goes on -> its offset.
        may_end: any other token may come as well, and ends the value.
    """

    nats: Mapping[int, float]
    may_end: bool


def with_offsets(
    traces: Sequence[Trace], maker: PairMaker, codec: Codec, model: Any, temperature: float = 1.0
) -> list[Trace]:
    """The traces, whose candidates and reference are, at such places, what decoding with calibrated prompts takes.

    Args:
        traces: with candidates and reference of the same prompts, uncalibrated.
        maker: of the prompts; those without a calibration leave their stage's traces as they are.
        model: the teacher.
        temperature: of the probabilities at these places, in (0, 1].
    """
    plans = {
        stage: Plan(
            calibrated(
                form_of(maker.form, prompt).typed_layout(maker.program.stages[stage].signature), prompt.calibration
            ),
            codec,
        )
        for stage, prompt in maker.prompts.items()
        if prompt.calibration
    }
    found = list(traces)
    rows = [
        (at, forks)
        for at, trace in enumerate(traces)
        if trace.stage in plans and (forks := _forks(plans[trace.stage], trace.completion_ids))
    ]
    for start in range(0, len(rows), _ROWS):
        some = rows[start : start + _ROWS]
        told = iter(_told([(maker.pair(traces[at]), forks) for at, forks in some], model))
        for at, forks in some:
            for place, fork in forks.items():
                found[at] = _taught(found[at], place, fork, next(told), temperature)
    return found


def _forks(plan: Plan, ids: Sequence[int]) -> dict[int, _Fork]:
    """Place in the completion -> the fork there, as far as the completion goes the tokenizer's own way."""
    room = len(ids) + plan.least + 64
    filling, found = Filling(plan, max_new_tokens=room, room=2 * room), dict[int, _Fork]()
    while filling.finished is None and (at := len(filling.written)) < len(ids) and filling.written == list(ids[:at]):
        if added := filling.offsets(_CPU):
            nats = dict(zip(added[0].tolist(), added[1].tolist(), strict=True))
            found[at] = _Fork(nats, may_end=filling.forbidden(max(nats) + 1, _CPU) is None)
            if ids[at] not in nats and not found[at].may_end:
                break
        filling.take(ids[at])
    return found


def _told(rows: Sequence[tuple[Pair, Mapping[int, _Fork]]], model: Any) -> list[dict[int, float]]:
    """For each fork of each row, in order: token that goes on -> the LM's own log-probability, over all tokens."""
    pairs = [
        Pair(pair.prompt_ids, pair.completion_ids, ce=[float(i in forks) for i in range(len(pair.completion_ids))])
        for pair, forks in rows
    ]
    return told_of(model, pairs, [list(fork.nats) for _, forks in rows for fork in forks.values()])


def _taught(trace: Trace, place: int, fork: _Fork, told: Mapping[int, float], temperature: float) -> Trace:
    """The trace with this fork's probabilities; the likeliest tokens where there are more than candidates."""
    going_on, ending = decoded(told, fork.nats, may_end=fork.may_end)
    whole = float((torch.tensor([*going_on.values(), ending], dtype=torch.float64) / temperature).logsumexp(0))
    going_on = {token: log_p / temperature - whole for token, log_p in going_on.items()}
    count = len(trace.candidates[place])
    best = sorted(going_on, key=lambda token: -going_on[token])[:count]
    own = going_on.get(trace.completion_ids[place], _NEVER)
    left = count - len(best)
    candidates, reference = list(trace.candidates), list(trace.reference)
    candidates[place] = (*best, *[-1] * left)
    reference[place] = (own, *(going_on[token] for token in best), *[0.0] * left)
    return replace(trace, candidates=tuple(candidates), reference=tuple(reference))
