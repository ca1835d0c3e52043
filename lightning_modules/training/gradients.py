"""A batch's loss and gradients, computed in parts where it does not fit into memory at once."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from cotune.datamodules.collate import Batch, Bearing
from cotune.errors import BadValueError, CotuneError
from cotune.inference.local.out_of_memory import is_out_of_memory
from cotune.lightning_modules.objectives import Objective
from cotune.lightning_modules.training.loss import exact_dtype, likeliest, log_probs
from cotune.lightning_modules.training.slices import Gradients, add_up, added
from cotune.programs.ranks import Ranks
from torch import Tensor

_T = TypeVar("_T")


class TrainingMemoryError(CotuneError, RuntimeError):
    """One row alone does not fit into memory."""


@dataclass(frozen=True)
class Computed:
    """What came of a batch.

    Attributes:
        loss: () the objective's, divided by the size.
        size: what the batch counts as, by the objective; its tokens unless that says otherwise.
        rows: (R,) sum of the log-probabilities of each row's tokens, in nats.
        gradients: of `loss`, one a parameter; None where it has no part in the loss.
        coefficients: (n, K) derivatives of the objective's loss by the log-probabilities.
        tokens: what they belong to.
    """

    loss: Tensor
    size: float
    rows: Tensor
    gradients: tuple[Tensor | None, ...]
    coefficients: Tensor
    tokens: Bearing

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.loss)) and is_finite(self.gradients)


class BatchGradients:
    """Computes loss and gradients of batches, a part at a time.

    Parts are rows of the batch. The objective is asked about the whole batch, so how a batch is cut changes its loss
    and gradients by no more than the order of a sum does. Adapter dropout draws anew for each part and each pass.

    Of several processes each computes its share of the batch's slices, which are cut into parts in turn (`add_up`).

    Args:
        rows_at_once: most rows of a part; None for the whole batch. When memory runs out in a part, its rows are
            halved, and this stays at what fitted.
        slices: how many there are; None for one a process.

    Attributes:
        ranks: the processes.
    """

    def __init__(self, rows_at_once: int | None = None, slices: int | None = None) -> None:
        if rows_at_once is not None and rows_at_once < 1:
            raise BadValueError(f"micro_batch_size {rows_at_once} is below 1; null computes a batch at once.")
        if slices is not None and slices < 1:
            raise BadValueError(f"gradient_slices {slices} is below 1; null makes one per process.")
        self.rows_at_once, self._slices = rows_at_once, slices
        self.ranks = Ranks()

    def compute(
        self, model: Any, parameters: Sequence[Tensor], batch: Batch, objective: Objective, *, scale: float = 1.0
    ) -> Computed:
        """Loss and gradients of a batch.

        Args:
            scale: the loss is multiplied by it before its gradients are computed, and they are divided by it after:
                what keeps small fp16 gradients above zero.

        Raises:
            TrainingMemoryError: memory ran out for a part of one row.
        """
        tokens = batch.bearing(model.device, exact_dtype(model))
        tokens, coefficients = self._asked(model, batch, tokens, objective)
        size = objective.size(tokens)
        of_part = _gradients_of(model, parameters, tokens.ids, coefficients, scale / size)
        log_probs_nK, total = self._of_all(batch, of_part, parameters, coefficients)
        if scale != 1.0:
            total = [None if gradient is None else gradient / scale for gradient in total]
        with torch.no_grad():
            loss = objective.loss(log_probs_nK, tokens) / size
        return Computed(loss, size, tokens.by_row(log_probs_nK.sum(dim=1)), tuple(total), coefficients, tokens)

    def likeliest(self, model: Any, batch: Batch, count: int) -> tuple[Tensor, Tensor]:
        """(n, count) the ids that the model finds likeliest at each token that bears weight, and (n, 1 + count) the
        log-probabilities of the token itself and of these."""
        ids_n1 = batch.bearing(model.device, exact_dtype(model)).ids[:, :1]
        found = list(self._in_parts(batch, lambda part, place: likeliest(model, part, ids_n1[place], count)))
        return torch.cat([ids for ids, _ in found]), torch.cat([values for _, values in found])

    def not_finite(self, model: Any, parameters: Sequence[Tensor], batch: Batch, computed: Computed) -> list[str]:
        """Names of the rows that make loss or gradients what is no number."""
        good = torch.isfinite(computed.rows).tolist()  # (R,)
        if not all(good):
            return [name for name, is_good in zip(batch.names, good, strict=True) if not is_good]
        alone = _gradients_of(model, parameters, computed.tokens.ids, computed.coefficients, 1 / computed.size)
        each = zip(batch.names, _places(batch.parts(1)), strict=True)
        return [name for name, (row, place) in each if not is_finite(alone(row, place)[1])]

    def _asked(self, model: Any, batch: Batch, tokens: Bearing, objective: Objective) -> tuple[Bearing, Tensor]:
        """The tokens, with their reference where that is read, and the objective's coefficients."""
        reads = objective.reads(tokens)
        brought = torch.tensor([bool(pair.reference) for pair in batch.pairs], device=tokens.rows.device)
        if "reference" in reads and not brought.all():
            base_nK = self._log_probs(model, batch, tokens.ids, adapter=False)
            own_nK = base_nK if tokens.reference is None else tokens.reference
            tokens = tokens.with_reference(torch.where(brought[tokens.rows, None], own_nK, base_nK))
        if "policy" in reads:
            log_probs_nK = self._log_probs(model, batch, tokens.ids)
        else:
            log_probs_nK = tokens.ce.new_zeros(tokens.ids.shape)  # nobody reads them: no pass is spent on it
        coefficients = objective.coefficients(log_probs_nK, tokens).to(log_probs_nK.dtype)
        return tokens, coefficients.masked_fill(tokens.ids < 0, 0.0)  # -1: a token with fewer than K candidates

    def _log_probs(self, model: Any, batch: Batch, ids_nK: Tensor, *, adapter: bool = True) -> Tensor:
        like_nK = torch.empty(ids_nK.shape, dtype=exact_dtype(model), device=ids_nK.device)
        with torch.no_grad(), nullcontext() if adapter else model.disable_adapter():
            return self._of_all(batch, lambda part, place: (log_probs(model, part, ids_nK[place])[0], ()), (), like_nK)[
                0
            ]

    def _of_all(self, batch: Batch, of_part: _OfPart, parameters: Sequence[Tensor], like_nK: Tensor) -> _Part:
        """The batch's log-probabilities, like `like_nK`, and the sum of all parts' gradients."""

        def of_slice(part: Batch, start: int) -> _Part:
            total: list[Tensor | None] = [None] * len(parameters)
            found = []
            for log_probs_mK, gradients in self._in_parts(part, of_part, start):
                found.append(log_probs_mK)
                total = [added(so_far, more) for so_far, more in zip(total, gradients, strict=True)]
            return torch.cat(found), total

        # A fixed number gives the same bits by any number of processes; it costs passes over shared prefixes.
        slices = batch.slices(self._slices or self.ranks.count)
        done = add_up(slices, of_slice, self.ranks, parameters=parameters, like_nK=like_nK)
        # What fits in the smallest memory: a run is resumed with it, by whichever process.
        self.rows_at_once = min(filter(None, self.ranks.gather(self.rows_at_once)), default=None)
        return done

    def _in_parts(self, batch: Batch, compute: Callable[[Batch, slice], _T], start: int = 0) -> Iterator[_T]:
        """What is computed of each part, given the place of its tokens; that of the first is `start`."""
        waiting = batch.parts(self.rows_at_once or batch.rows)
        while waiting:
            part = waiting.pop(0)
            place = slice(start, start + part.tokens)  # of its tokens among the n of the batch
            computed = _tried(compute, part, place)
            if computed is None:  # parts before this one have been computed and count; only this one is cut
                waiting = [smaller for left in (part, *waiting) for smaller in left.parts(self._halved(part))]
                continue
            start = place.stop
            yield computed

    def _halved(self, part: Batch) -> int:
        self.rows_at_once = part.rows // 2  # and so for all parts to come
        print(
            f"memory ran out on {part.rows} rows at once: continuing with {self.rows_at_once} at once, which gives the "
            f"same loss and gradients. Set model.micro_batch_size to {self.rows_at_once} to start with that."
        )
        return self.rows_at_once


_Part = tuple[Tensor, Gradients]
_OfPart = Callable[[Batch, slice], _Part]


def _gradients_of(
    model: Any, parameters: Sequence[Tensor], ids_nK: Tensor, coefficients_nK: Tensor, factor: float
) -> _OfPart:
    """(part, place of its tokens) -> their log-probabilities, and the gradients of what they weigh times a factor."""

    def compute(part: Batch, place: slice) -> tuple[Tensor, Sequence[Tensor | None]]:
        log_probs_nK, weighted = log_probs(model, part, ids_nK[place], coefficients_nK[place])
        with torch.autocast(weighted.device.type, enabled=False):
            gradients = torch.autograd.grad(weighted * factor, parameters, allow_unused=True)
        return log_probs_nK, gradients

    return compute


def _tried(compute: Callable[[Batch, slice], _T], part: Batch, place: slice) -> _T | None:
    """What is computed of one part; None if memory ran out."""
    try:
        return compute(part, place)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if part.rows == 1:
            raise TrainingMemoryError(_one_row(part)) from error
    # Only here, outside of the handler, are the tensors gone that the error's traceback held.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _places(parts: Sequence[Batch]) -> Iterator[tuple[Batch, slice]]:
    """Parts with the place of their tokens among all of them."""
    start = 0  # the parts are of the batch in order
    for part in parts:
        yield part, slice(start, start + part.tokens)
        start += part.tokens


def is_finite(gradients: Sequence[Tensor | None]) -> bool:
    """Whether their norm is a number: no NaN, no infinity, and nothing near enough to overflow when clipped."""
    present = [gradient for gradient in gradients if gradient is not None]
    return not present or bool(torch.isfinite(torch.nn.utils.get_total_norm(present)))


def known_gradients(computed: Computed, parameters: Sequence[Tensor]) -> Tensor:
    """() the loss as a tensor whose backward pass hands out the gradients that are known already.

    Whoever calls backward (a trainer, with its precision, hooks and accumulation) may go on as with any loss.
    """
    loss: Tensor = _Known.apply(computed.loss, computed.gradients, *parameters)  # type: ignore[no-untyped-call]
    return loss


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()  # a tensor of its own, for autograd to hang `backward` on

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        given = (None if gradient is None else gradient * factor for gradient in ctx.gradients)
        return (None, None, *given)  # the loss and the list have none


def _one_row(part: Batch) -> str:
    row = f' ("{part.names[0]}")' if part.names[0] else ""
    return (
        f"memory ran out on a single training row of {part.longest} tokens{row}. Ways out: "
        "model.gradient_checkpointing true, model.lm.dtype bfloat16, model.lm.quantization nf4, shorter prompts "
        "(fewer demos or passages), or a smaller model."
    )
