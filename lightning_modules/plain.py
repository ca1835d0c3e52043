"""The plain paths: one text at a time, as transformers computes it. Slow, right for every causal LM, and what the fast
paths are measured against."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name for it)
from cotune.datamodules.collate import IGNORED, Batch
from torch import Tensor


class Row(Protocol):
    """A completion under way."""

    written: list[int]
    ended: Any

    @property
    def limit(self) -> int:
        """Most tokens to write."""
        ...

    @property
    def prompt(self) -> Any:
        """What it completes; `prompt.ids` are its tokens."""
        ...


def complete(model: Any, row: Row, take: Callable[[Tensor], None]) -> None:
    """Completes one prompt by the model's own `generate`, with the cache and the inputs that the model makes itself.

    Args:
        take: given (1, V) logits, adds at least one token to the row, or ends it.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    base = _bare(model)
    ids = torch.tensor([list(row.prompt.ids)], device=base.device)
    dictated = _Dictated(row, ids.shape[1], take)
    settings = GenerationConfig(max_new_tokens=row.limit, do_sample=False, use_cache=True, pad_token_id=0)
    with _alone(base), _generation_config(base, settings):
        base.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            logits_processor=LogitsProcessorList([dictated]),
            stopping_criteria=StoppingCriteriaList([dictated.ended]),
        )


def losses(model: Any, batch: Batch) -> Tensor:
    """(R,) each row's negative log-likelihood, in nats, summed over the tokens that bear loss; each computed alone."""
    found = []
    for segment in batch.segments:
        for ids, mask, labels in zip(segment.ids, segment.mask.bool(), segment.labels, strict=True):
            text = torch.cat([segment.prefix, ids[mask]])
            bearing = labels != IGNORED
            with _alone(_bare(model)):
                logits_CV = _last_logits(model, text, len(labels))[bearing]
            exact = logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()
            found.append(F.cross_entropy(exact, labels[bearing], reduction="sum"))
    return torch.stack(found)


def last_logits(model: Any, ids: Sequence[int], count: int) -> Tensor:
    """(count, V) the logits that predict a text's last tokens."""
    with _alone(_bare(model)):
        return _last_logits(model, torch.tensor(list(ids), device=model.device), count)


def _last_logits(model: Any, ids: Tensor, count: int) -> Tensor:
    count = min(count, len(ids) - 1)
    keep = "logits_to_keep" in inspect.signature(_bare(model).forward).parameters
    options = {"logits_to_keep": count + 1} if keep else {}
    logits: Tensor = model(input_ids=ids[None], use_cache=False, **options).logits[0, -count - 1 : -1]
    return logits


class _Dictated:
    """A logits processor that leaves no choice but the token that the row takes; tells when the row has ended."""

    def __init__(self, row: Row, start: int, take: Callable[[Tensor], None]) -> None:
        self.row, self.start, self.take = row, start, take

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place, row = input_ids.shape[1] - self.start, self.row
        while row.ended is None and len(row.written) <= place:
            self.take(scores)
        token = row.written[place] if place < len(row.written) else 0
        dictated = torch.full_like(scores, float("-inf"))
        dictated[:, token] = 0
        return dictated

    def ended(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        place = input_ids.shape[1] - self.start
        over = self.row.ended is not None and place >= len(self.row.written)
        return torch.full((len(input_ids),), over, dtype=torch.bool, device=input_ids.device)


def _bare(model: Any) -> Any:
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


@contextmanager
def _alone(base: Any) -> Iterator[None]:
    """Rotary embeddings that grow with the longest text so far begin anew, and leave nothing behind."""
    growing = [module for module in base.modules() if hasattr(module, "max_seq_len_cached")]
    for module in growing:
        _begin_anew(module)
    try:
        yield
    finally:
        for module in growing:
            _begin_anew(module)


def _begin_anew(module: Any) -> None:
    names = [*vars(module), *(name for name, _ in module.named_buffers(recurse=False))]
    for name in [name for name in names if name.endswith("original_inv_freq")]:
        kind = name.removesuffix("original_inv_freq")  # layers of several kinds have factors of their own
        grown, first = f"{kind}max_seq_len_cached", module.original_max_seq_len
        if getattr(module, grown, first) != first:
            device = getattr(module, f"{kind}inv_freq").device
            setattr(module, f"{kind}inv_freq", getattr(module, name).clone().to(device))
            setattr(module, grown, first)
