"""The plain path: one prompt at a time, as transformers completes it.

Slow, right for every causal LM, and what decoding together is measured against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from cotune.inference.fields import Filling
from cotune.inference.local.transformers_internals import alone
from torch import Tensor


def complete(model: Any, prompt: Sequence[int], filling: Filling, take: Callable[[Tensor], None]) -> None:
    """Completes one prompt by the model's own `generate`, with the cache and the inputs that the model makes itself.

    Where a layout takes back what was written, the model reads all that is left anew.

    Args:
        take: given (1, V) logits, has the filling take a token.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    base = bare(model)
    while filling.finished is None:
        read = [*prompt, *filling.written]
        dictated = _Dictated(filling, len(prompt), take)
        ids = torch.tensor([read], device=base.device)
        most = max(1, filling.most - len(filling.written))
        settings = GenerationConfig(max_new_tokens=most, do_sample=False, use_cache=True, pad_token_id=0)
        with alone(base), _generation_config(base, settings):
            base.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                logits_processor=LogitsProcessorList([dictated]),
                stopping_criteria=StoppingCriteriaList([dictated.ended]),
            )


class _Dictated:
    """A logits processor that leaves no choice but the id that the filling has next; tells when it has none."""

    def __init__(self, filling: Filling, start: int, take: Callable[[Tensor], None]) -> None:
        self.filling, self.start, self.take = filling, start, take
        self._over = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        read: list[int] = input_ids[0, self.start :].tolist()
        written, place = self.filling.written, len(read)
        if len(written) == place:  # nothing is dictated here: the model's own scores decide
            self.take(scores)
            written = self.filling.written
        # Over, too, where the filling took back what the model has read: `complete` begins anew with what is left.
        self._over = self.filling.finished is not None or len(written) <= place or written[:place] != read
        token = 0 if self._over else written[place]
        dictated = torch.full_like(scores, float("-inf"))
        dictated[:, token] = 0
        return dictated

    def ended(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self._over, dtype=torch.bool, device=input_ids.device)


def bare(model: Any) -> Any:
    """The model without PEFT's wrapper, which does nothing in a forward pass of LoRA."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _generation_config(base: Any, settings: Any) -> Iterator[None]:
    """The model's own settings (penalties, top_k and the like) out of the way: cotune samples by its own."""
    before = base.generation_config
    base.generation_config = settings
    try:
        yield
    finally:
        base.generation_config = before
