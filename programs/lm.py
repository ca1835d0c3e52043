"""The LM as programs see it: one batched method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from cotune.errors import BadValueError, CotuneError
from cotune.programs.layout import FREE, Layout

Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""

_LEAST_TEMPERATURE = 0.0001
"""Logits that are divided by less can be too large for a number."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        temperature: 0 takes the likeliest token; else it is finite and 0.0001 or more, and the logits are divided by
            it.
        top_p: sample among the fewest tokens whose probabilities add up to this (nucleus sampling), in (0, 1].
        max_new_tokens: longest completion, in tokens that the LM chooses: all fields of a layout together. Each field
            gets a part of it, and constrained fields what they need, even where that is more.
        log_probs: completions tell how likely each token was.

    Raises:
        BadValueError: one is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    log_probs: bool = False

    def __post_init__(self) -> None:
        if self.temperature != 0 and not _LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise BadValueError(
                f"temperature {self.temperature} is neither 0 nor a number from {_LEAST_TEMPERATURE} up; 0 takes the "
                "likeliest token, 1 samples as the LM predicts."
            )
        if not 0 < self.top_p <= 1:
            raise BadValueError(f"top_p {self.top_p} is outside (0, 1]; 1 switches it off.")
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise BadValueError(
                f"max_new_tokens {self.max_new_tokens} is no whole number from 1 up; 256 is the default."
            )


@dataclass(frozen=True)
class Request:
    """One completion that is wanted. `seed` alone decides its random draws, whatever else is in the batch.

    Attributes:
        messages: the chat, ending with the user's turn.
        layout: the completion's fixed texts and fields.
        adapter: name of the adapter that is to answer; "" for the base alone.
        scores: the completion is to say how likely each choice of its fields was.
        chances: and with what probability each would have been decoded.

    Raises:
        BadValueError: a seed that a random generator does not take.
    """

    messages: Sequence[Message]
    seed: int = 0
    layout: Layout = FREE
    adapter: str = "default"
    scores: bool = False
    chances: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise BadValueError(f"seed {self.seed} of a request is no number from 0 to 2**64 - 1.")


@dataclass(frozen=True)
class Filled:
    """What was written in one field of a layout.

    Attributes:
        name: the field's.
        text: as written, its lead included, up to where it ended.
        start, end: its ids are `completion_ids[start:end]`; equal where the field is empty.
        ended: "stop" (one of its stops), "eos" (the LM ended its turn), "complete" (its syntax allows nothing more, or
            what the LM wrote next was no part of it) or "length" (closed at its limit).
    """

    name: str
    text: str
    start: int
    end: int
    ended: Literal["stop", "eos", "complete", "length"]


@dataclass(frozen=True)
class Completion:
    """What the LM wrote, with the very ids it read and wrote: training uses these, never re-tokenised text.

    Attributes:
        text: the completion without its end-of-turn token, and up to a stop string.
        prompt_ids: token ids of the prompt, as generated from; empty from an LM that only gives text.
        completion_ids: token ids written, the end-of-turn token included if it was reached. They decode to `text`. A
            completion without them that cannot be read is asked for once more.
        finished: "eos", "stop" (a stop string), "length" (cut at max_new_tokens) or "too_long" (the prompt does not
            fit the context window with all that its layout needs: nothing was generated) or "refused" (an endpoint
            will not answer this request, however often it is asked).
        fields: what stands in each field of the layout, in its order; empty from an LM that only gives text.
        forced: for each of `completion_ids`, whether it was put there and not chosen by the LM (fixed texts, and the
            end of the turn behind a field that was complete); empty where none was.
        log_probs: where `Sampling.log_probs` asks for them, for each of `completion_ids` the log-probability with which
            it was chosen, among the tokens that were allowed there and at the sampling's temperature (1 where that is
            0; before top-p). 0 for what was put there.
        repaired: it answers a second request, because what was written at first could not be read.
        thinking: what a reasoning model wrote before its answer; no part of `text`, but of `completion_ids`.
        scores: where the request asks for them, for each field with choices that was filled in: choice -> the
            log-probability, in nats, of all its tokens together behind what stands before it, among all texts. That of
            a choice which begins another is no smaller than the other's.
        chances: where the request asks for them, for each such field: choice -> the log-probability, in nats, with
            which it is decoded at temperature 1: token by token among those that the choices allow, offsets included.
    """

    text: str
    prompt_ids: tuple[int, ...] = ()
    completion_ids: tuple[int, ...] = ()
    finished: Literal["eos", "stop", "length", "too_long", "refused"] = "eos"
    fields: tuple[Filled, ...] = ()
    forced: tuple[bool, ...] = ()
    log_probs: tuple[float, ...] = ()
    repaired: bool = False
    thinking: str = ""
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    chances: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def put_there(self) -> tuple[tuple[int, int], ...]:
        """Where the text is an engine's and not the LM's: (start, end) of the fixed texts around its fields."""
        spans, place = [], 0
        for filled in self.fields:
            start = max(self.text.find(filled.text, place), place)
            spans.append((place, start))
            place = start + len(filled.text)
        end = len(self.text) if self.fields else place
        return tuple(span for span in (*spans, (place, end)) if span[0] < span[1])


def completion_of_plain(plain: Mapping[str, Any]) -> Completion:
    """The completion that `dataclasses.asdict` and JSON have made this of."""
    fields = tuple(Filled(**filled) for filled in plain["fields"])
    sequences = {name: tuple(plain[name]) for name in ("prompt_ids", "completion_ids", "forced", "log_probs")}
    return Completion(**{**plain, **sequences, "fields": fields})


class LMUnavailableError(CotuneError):
    """No completions can be had any more: the endpoint is gone, or a budget is spent. No rollout is at fault: it ends
    the run, wherever it is raised, and the message says how to continue."""


class LM(Protocol):
    """Anything that completes chats in batches. Must not raise for one bad request among good ones.

    One whose batches take long calls `completed` as its completions are made, for those who wait.
    """

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion a request, in the order of the requests."""
        ...


_listener: ContextVar[Callable[[int], None]] = ContextVar("_listener", default=lambda count: None)


def completed(count: int = 1) -> None:
    """Tells whoever shows progress that so many completions of the batch under way are there."""
    _listener.get()(count)


@contextmanager
def told_of_completions(listener: Callable[[int], None]) -> Iterator[None]:
    """Inside, `listener` is told how many completions have newly been made, in the thread that made them."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
