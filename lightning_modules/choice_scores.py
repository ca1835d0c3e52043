"""How likely each choice of a field was: all of them in one pass, which reads what stands before them once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from cotune.datamodules.collate import Pair, collate
from cotune.inference.codec import Codec
from cotune.inference.local.engine import evaluating
from cotune.lightning_modules.training.loss import exact_dtype, log_probs
from cotune.programs.layout import Choices, Field, Layout
from cotune.programs.lm import Completion, Request


def with_scores(
    model: Any, codec: Codec, requests: Sequence[Request], completions: Sequence[Completion]
) -> list[Completion]:
    """The completions, with their `Completion.scores` where the request asks for them."""
    return [
        replace(done, scores=choice_scores(model, codec, request.layout, done)) if request.scores else done
        for request, done in zip(requests, completions, strict=True)
    ]


@torch.no_grad()
def choice_scores(model: Any, codec: Codec, layout: Layout, done: Completion) -> dict[str, dict[str, float]]:
    """Field -> choice -> the log-probability, in nats, of the choice's tokens behind the prompt and what was written
    before the field; for every field with choices that was filled in.

    The ids of a choice are those that would be put there if it were a fixed text. Probabilities are the LM's own, over
    its whole vocabulary, at temperature 1.
    """
    fields = {part.name: part for part in layout if isinstance(part, Field)}
    found = {}
    for filled in done.fields:
        part = fields.get(filled.name)
        if part is None or not isinstance(part.syntax, Choices):
            continue
        written = done.completion_ids[: filled.start]
        before, lead = (*done.prompt_ids, *written), part.lead if written else ""
        batch = collate([[Pair(before, codec.behind(written, lead + text)[0]) for text in part.syntax.texts]])
        bearing = batch.bearing(model.device, exact_dtype(model))
        with evaluating(model):
            told, _ = log_probs(model, batch, bearing.ids)
        found[filled.name] = dict(zip(part.syntax.texts, bearing.by_row(told[:, 0]).tolist(), strict=True))
    return found
