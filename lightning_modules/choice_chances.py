"""With what probability each choice of a field would have been decoded: what calibration is computed from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cotune.datamodules.collate import Pair
from cotune.inference.automata import CalibratedChoices
from cotune.inference.codec import Codec
from cotune.inference.local.engine import evaluating
from cotune.lightning_modules.training.choosing import decoded, told_of
from cotune.programs.layout import Choices, Field
from cotune.programs.lm import Completion, Request

_ROWS = 128
"""Prompts in one batch, what they share computed once; a completion has one for each place where its choices part."""


@dataclass(frozen=True)
class _Asked:
    """A field with choices that was filled in: which completion's, and the ids before it."""

    place: int
    field: str
    lead: str
    language: CalibratedChoices
    before: tuple[int, ...]


def with_chances(
    model: Any, codec: Codec, requests: Sequence[Request], completions: Sequence[Completion]
) -> list[Completion]:
    """The completions, with their `Completion.chances` where the request asks for them."""
    found: list[dict[str, dict[str, float]]] = [{} for _ in completions]
    asked = [
        one
        for place, (request, done) in enumerate(zip(requests, completions, strict=True))
        if request.chances
        for one in _asked(place, codec, request, done)
    ]
    for one, told in zip(asked, _told(model, asked), strict=True):
        texts = one.language.texts
        found[one.place][one.field] = {text: _chance(one.language, one.lead + text, told) for text in texts}
    return [replace(d, chances=chances) if chances else d for d, chances in zip(completions, found, strict=True)]


def _asked(place: int, codec: Codec, request: Request, done: Completion) -> list[_Asked]:
    parts = {part.name: part for part in request.layout if isinstance(part, Field)}
    found = []
    for filled in done.fields:
        part = parts[filled.name]
        if isinstance(part.syntax, Choices):
            lead = part.lead if filled.start else ""
            texts = part.syntax.texts
            key = f"choices {(texts, part.syntax.offsets, lead)}"
            if key not in codec.kept:
                codec.kept[key] = CalibratedChoices(codec, texts, lead, part.syntax.offsets or (0.0,) * len(texts))
            before = (*done.prompt_ids, *done.completion_ids[: filled.start])
            found.append(_Asked(place, filled.name, lead, codec.kept[key], before))
    return found


def _told(model: Any, asked: Sequence[_Asked]) -> list[dict[bytes, dict[int, float]]]:
    """For each field: state in which there is a choice -> token -> its log-probability over the whole vocabulary."""
    rows = [(at, state, ids) for at, one in enumerate(asked) for state, ids in one.language.forks.items()]
    found: list[dict[bytes, dict[int, float]]] = [{} for _ in asked]
    for start in range(0, len(rows), _ROWS):
        some = rows[start : start + _ROWS]
        moves = [list(asked[at].language.moves(state)) for at, state, _ in some]
        # One id is to be predicted after each; which one does not matter, as all that may come are asked for.
        pairs = [Pair((*asked[at].before, *ids), tokens[:1]) for (at, _, ids), tokens in zip(some, moves, strict=True)]
        with evaluating(model):
            told = told_of(model, pairs, moves)
        for (at, state, _), of_state in zip(some, told, strict=True):
            found[at][state] = of_state
    return found


def _chance(language: CalibratedChoices, text: str, told: Mapping[bytes, Mapping[int, float]]) -> float:
    """The log-probability that decoding writes this text: of its choices at all forks on the way."""
    ids, states = language.way(text)
    return math.fsum(
        _taken(language, state, told[state], token)
        for state, token in zip(states, [*ids, None], strict=True)
        if state in told
    )


def _taken(language: CalibratedChoices, state: bytes, told: Mapping[int, float], token: int | None) -> float:
    """The log-probability that decoding takes this token in this state; None for the end of the value."""
    going_on, ending = decoded(told, language.added(state), may_end=language.may_end(state))
    return ending if token is None else going_on[token]
