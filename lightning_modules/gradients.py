"""A batch's loss and gradients, computed in parts where it does not fit into memory at once."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cotune.datamodules.collate import Batch
from cotune.lightning_modules.loss import row_losses
from cotune.lightning_modules.out_of_memory import is_out_of_memory
from torch import Tensor


class TrainingMemoryError(RuntimeError):
    """One row alone does not fit into memory."""


@dataclass(frozen=True)
class Computed:
    """What came of a batch.

    Attributes:
        rows: (R,) negative log-likelihood of each row's completion, in nats.
        tokens: how many tokens bear loss.
        gradients: of the mean over those tokens, one a parameter; None where it has no part in the loss.
    """

    rows: Tensor
    tokens: int
    gradients: tuple[Tensor | None, ...]

    @property
    def loss(self) -> Tensor:
        """() mean over the tokens."""
        return self.rows.sum() / self.tokens

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.loss)) and is_finite(self.gradients)


class BatchGradients:
    """Computes loss and gradients of batches, a part at a time.

    Parts are rows of the batch, and each counts by the whole batch's tokens: how a batch is cut changes its loss and
    gradients by no more than the order of a sum does. Adapter dropout draws anew for each part.

    Args:
        rows_at_once: most rows of a part; None for the whole batch. When memory runs out in a part, its rows are
            halved, and this stays at what fitted.
    """

    def __init__(self, rows_at_once: int | None = None) -> None:
        if rows_at_once is not None and rows_at_once < 1:
            raise ValueError(f"micro_batch_size {rows_at_once} is below 1; null computes a batch at once.")
        self.rows_at_once = rows_at_once

    def compute(self, model: Any, parameters: Sequence[Tensor], batch: Batch, *, scale: float = 1.0) -> Computed:
        """Loss and gradients of a batch.

        Args:
            scale: the loss is multiplied by it before its gradients are computed, and they are divided by it after:
                what keeps small fp16 gradients above zero.

        Raises:
            TrainingMemoryError: memory ran out for a part of one row.
        """
        waiting = batch.parts(self.rows_at_once or batch.rows)
        total: list[Tensor | None] = [None] * len(parameters)
        losses, weight = [], scale / batch.tokens
        while waiting:
            part = waiting.pop(0)
            computed = self._tried(model, parameters, part, weight)
            if computed is None:  # parts before this one have been computed and count; only this one is cut
                waiting = [smaller for left in (part, *waiting) for smaller in left.parts(self._halved(part))]
                continue
            losses.append(computed[0])
            total = [_added(so_far, more) for so_far, more in zip(total, computed[1], strict=True)]
        if scale != 1.0:
            total = [None if gradient is None else gradient / scale for gradient in total]
        return Computed(torch.cat(losses), batch.tokens, tuple(total))

    def _tried(
        self, model: Any, parameters: Sequence[Tensor], part: Batch, weight: float
    ) -> tuple[Tensor, Sequence[Tensor | None]] | None:
        """Losses and gradients of one part; None if memory ran out."""
        try:
            losses_R = row_losses(model, part)
            with torch.autocast(losses_R.device.type, enabled=False):
                gradients = torch.autograd.grad(losses_R.sum() * weight, parameters, allow_unused=True)
            return losses_R.detach(), gradients
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

    def _halved(self, part: Batch) -> int:
        self.rows_at_once = part.rows // 2
        print(
            f"memory ran out on {part.rows} rows at once: from here on {self.rows_at_once} are computed at once, with "
            f"the same loss and gradients. Set model.micro_batch_size to {self.rows_at_once} to begin with it."
        )
        return self.rows_at_once


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
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        given = (None if gradient is None else gradient * factor for gradient in ctx.gradients)
        return (None, None, *given)


def _added(so_far: Tensor | None, more: Tensor | None) -> Tensor | None:
    if so_far is None or more is None:
        return more if so_far is None else so_far
    return so_far + more


def _one_row(part: Batch) -> str:
    row = f' ("{part.names[0]}")' if part.names[0] else ""
    return (
        f"memory ran out on a single training row of {part.longest} tokens{row}. Ways out: "
        "model.gradient_checkpointing true, model.lm.dtype bfloat16, model.lm.quantization nf4, shorter prompts "
        "(fewer demos or passages), or a smaller model."
    )
