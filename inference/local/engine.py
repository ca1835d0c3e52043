"""LocalEngine: the LM's own weights, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from cotune.inference.engine import Engine, Generated, Prompted, Weights
from cotune.inference.local.decoder import Decoder
from cotune.inference.local.merged_copy import MergedCopy, base_alone
from cotune.programs.lm import Sampling
from torch import nn


class LocalEngine(Engine):
    """Decodes with the weights that are trained, as they are at that time.

    Args:
        cache_tokens: bound on keys and values held while generating, in tokens: half for the rows that decode together,
            half for prefixes, which are kept while the weights stay.
        keep_prompts: also keep the keys and values of whole prompts while the weights stay, within cache_tokens, so
            that a prompt asked again is not read again. The last bits of logits then depend on what was asked before.
        merge_while_generating: decode with a merged second copy of the adapted weights, on a CPU of all linear layers.
            Takes their memory once more, and saves about a third of the time.
    """

    def __init__(
        self, cache_tokens: int = 32768, keep_prompts: bool = False, merge_while_generating: bool = True
    ) -> None:
        self.cache_tokens, self.keep_prompts = cache_tokens, keep_prompts
        self.merge_while_generating = merge_while_generating
        self.merged = MergedCopy()
        self.decoder: Decoder
        self._weights: Weights
        self._adapter = ""

    def start(self, weights: Weights) -> None:
        self._weights = weights
        self.decoder = Decoder(
            weights.model,
            codec=weights.codec,
            window=weights.window,
            cache_tokens=self.cache_tokens,
            # Asked at each call: what is kept of prefixes is of one adapter as it then was.
            weights=lambda: (weights.version, self._adapter),
            keep_rows=self.keep_prompts,
            together=weights.decodes_together,
        )

    def generate(self, prompts: Sequence[Prompted], sampling: Sampling, *, adapter: str) -> list[Generated]:
        """As `Engine.generate`.

        Raises:
            GenerationMemoryError: there is no memory for a single completion.
        """
        self._adapter = adapter
        with evaluating(self._weights.model), self._applied(adapter):
            return self.decoder.generate(prompts, sampling)

    def waves(self, prompts: Sequence[Prompted]) -> list[list[int]]:
        """Prompts with much in common stand together."""
        return self.decoder.waves(prompts)

    def identity(self) -> Mapping[str, Any]:
        return {**super().identity(), "merged": self.merge_while_generating}

    def _applied(self, adapter: str) -> Any:
        if not adapter:
            return base_alone(self._weights.model)
        return self.merged.swapped(self._weights.model) if self.merge_while_generating else nullcontext()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module has the mode it had, or dropout would stay off in training.

    The weights compute in the type that they have: Lightning's mixed precision is on in validation and off in searches
    and collections, and what a model says must not depend on that.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with unmixed(model):
            yield
    finally:
        for module in training:
            module.training = True


def unmixed(model: nn.Module) -> AbstractContextManager[Any]:
    """Without autocast inside, on the model's device."""
    return torch.autocast(next(model.parameters()).device.type, enabled=False)
