"""An engine of one's own: plain passes over the whole text, one prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from cotune.inference import Filling, Plan
from cotune.inference.engine import Engine, Generated, Prompted, Weights
from cotune.programs import Sampling


class PlainEngine(Engine):
    def start(self, weights: Weights) -> None:
        self.weights = weights

    def generate(self, prompts: Sequence[Prompted], sampling: Sampling, *, adapter: str) -> list[Generated]:
        return [self.one(prompt, sampling) for prompt in prompts]

    @torch.inference_mode()
    def one(self, prompt: Prompted, sampling: Sampling) -> Generated:
        plan = Plan(prompt.layout, self.weights.codec)
        room = self.weights.window - len(prompt.ids)
        if room < plan.least:
            return Generated([], "", "too_long")
        filling = Filling(plan, max_new_tokens=sampling.max_new_tokens, room=room)
        while filling.finished is None:
            ids = torch.tensor([[*prompt.ids, *filling.written]])
            logits_V = self.weights.model(input_ids=ids).logits[0, -1]
            forbidden_V = filling.forbidden(len(logits_V), logits_V.device)
            if forbidden_V is not None:
                logits_V[forbidden_V] = float("-inf")
            filling.take(int(logits_V.argmax()))
        return Generated(filling.written, filling.text, filling.finished, tuple(filling.fields), tuple(filling.forced))
