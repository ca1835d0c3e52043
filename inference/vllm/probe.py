"""The probe: a fixed text on which a server must say what the LM in this process says, or its weights are others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from cotune.inference.engine import Weights
from cotune.inference.local.engine import evaluating
from cotune.inference.local.merged_copy import base_alone
from torch import Tensor

_TEXT = (
    "Question: A train leaves at 9:15 and takes 48 minutes. When does it arrive?\nreasoning: 9:15 plus 48 minutes is "
    '10:03.\nanswer: 10:03\n\n{"name": "setosa", "score": 3.5}\nThe capital of France is'
)
_LONGEST = 96
"""Ids of the text that are read at most."""
_WRITTEN = 4
"""Tokens that are written greedily behind it."""
_CLEARLY = 1e-3
"""Nats below which a distance is rounding, whatever else is nearer."""


@dataclass(frozen=True)
class Reading:
    """What a server says: the log-probability of each id behind the first, those it wrote included, and what it
    wrote."""

    log_probs: Sequence[float]
    written: Sequence[int]


@dataclass(frozen=True)
class Probe:
    """What the LM in this process says, with one adapter or as the base alone.

    Attributes:
        ids: of the text.
        written: what it writes behind it, greedily.
        read: (T,) log-probabilities of the text's ids behind the first.
        steps: (S, V) those of all tokens, where each of `written` was chosen.
    """

    ids: tuple[int, ...]
    written: tuple[int, ...]
    read: Tensor
    steps: Tensor

    def distance(self, reading: Reading) -> float:
        """Root mean square difference of the log-probabilities, in nats, up to the first token written differently,
        and of that one as well."""
        same = next((i for i, (a, b) in enumerate(zip(self.written, reading.written, strict=True)) if a != b), None)
        upto = len(self.written) if same is None else same + 1
        own_T = torch.cat([self.read, self.steps[range(upto), list(reading.written[:upto])]])
        said_T = torch.tensor(reading.log_probs[: len(own_T)], dtype=own_T.dtype)
        distance = float((own_T - said_T).square().mean().sqrt())
        if same is None:
            return distance
        missed = float(self.steps[same, self.written[same]] - self.steps[same, reading.written[same]])
        return max(distance, missed / 2)  # where two tokens are equally likely, rounding chooses between them


def probe(weights: Weights, adapter: str) -> Probe:
    """Reads the text with the LM's weights as they are now, "" for the base alone."""
    ids = weights.codec.encode(_TEXT)[:_LONGEST]
    written: list[int] = []
    steps: list[Tensor] = []
    with torch.inference_mode(), evaluating(weights.model), nullcontext() if adapter else base_alone(weights.model):
        for _ in range(_WRITTEN):
            read = torch.tensor([[*ids, *written]], device=weights.model.device)
            said_TV = weights.model(input_ids=read, use_cache=False).logits[0].double().log_softmax(dim=-1).cpu()
            steps.append(said_TV[-1])
            written.append(int(said_TV[-1].argmax()))
    read_T = said_TV[range(len(ids) - 1), ids[1:]]
    return Probe(tuple(ids), tuple(written), read_T, torch.stack(steps))


def disagreement(reading: Reading, name: str, probes: Mapping[str, Probe], tolerance: float) -> str:
    """What is wrong with the answer of a server that was asked for `name`; "" where nothing is.

    It is wrong where it is further from what this process says than the tolerance, in nats, and where it is clearly
    nearer to what another adapter, or the base, says here: rounding goes into no direction.
    """
    distances = {other: known.distance(reading) for other, known in probes.items()}
    own, nearest = distances[name], min(distances, key=lambda other: distances[other])
    if own <= tolerance and not (own > _CLEARLY and distances[nearest] < own / 2):
        return ""
    wrote = f"it wrote {list(reading.written)} and not {list(probes[name].written)}, " * (
        list(reading.written) != list(probes[name].written)
    )
    off = f"its log-probabilities are {own:.3g} nats off (tolerance {tolerance:g})"
    like = f'; "{nearest}" is what it answers like ({distances[nearest]:.3g} nats off)' if nearest != name else ""
    return f"{wrote}{off}{like}"


def reading_of(choice: Mapping[str, Any]) -> Reading:
    """The probe's answer, from a choice of the completions API with `prompt_logprobs`.

    Raises:
        KeyError, TypeError, ValueError, IndexError: it holds no such answer.
    """
    read = [next(iter(one.values()))["logprob"] for one in choice["prompt_logprobs"][1:]]
    return Reading([*map(float, read), *map(float, choice["logprobs"]["token_logprobs"])], list(choice["token_ids"]))


def request(ids: Sequence[int]) -> dict[str, Any]:
    """What a server is asked, beside the name of the model and the sampling."""
    return {"prompt": list(ids), "max_tokens": _WRITTEN, "logprobs": 0, "prompt_logprobs": 0, "ignore_eos": True}
