"""A second copy of the linear layers, the adapter merged into it, for generating."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name for it)
from cotune.inference.local.peft_internals import added, adds_only, factors, lora_layers, without_adapter
from cotune.inference.local.torch_internals import (
    is_laid_out,
    onednn_has_bf16,
    onednn_layout,
    onednn_product,
    written,
)
from torch import Tensor, nn

_ROWS = 64
"""Rows that a layout is made for. One made for 64 is as fast for 1 and for 400."""


class MergedCopy:
    """W + BA in a second copy, so that decoding pays nothing for the adapter.

    The live base is never written: merging and unmerging it in place would make a bf16 base drift. Inside `swapped`
    each adapted layer computes with the copy, afterwards with base and adapter as before. Quantised layers have no
    weight to add to: they keep running base and adapter side by side.

    On a CPU the copies, and such of the layers without an adapter, are laid out as oneDNN's products read them, which
    makes those up to twice as fast for few rows. A copy is made anew only when its adapter has been written since.
    """

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}
        self._made_from: dict[str, tuple[Any, ...]] = {}

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        linears = _linears(model)
        self._refresh(linears)
        with _computing({one.module: _product(self._copies[one.name], one.base.bias) for one in linears}):
            yield

    def _refresh(self, linears: list[_Linear]) -> None:
        # Validation runs in inference mode, and a copy made there could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            for one in linears:
                made_from = one.state
                if self._made_from.get(one.name) != made_from:
                    self._copies[one.name] = _laid_out(one.merged())
                    self._made_from[one.name] = made_from


@contextmanager
def base_alone(model: nn.Module) -> Iterator[None]:
    """The model without its adapter inside: each adapted layer computes what its base layer does."""
    with _computing(without_adapter(model)):
        yield


@contextmanager
def _computing(forwards: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Modules compute by these functions inside, and as before afterwards."""
    before = {module: vars(module).get("forward") for module in forwards}  # training may have one of its own there
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, kept in before.items():
            if kept is None:
                vars(module).pop("forward", None)
            else:
                module.forward = kept


@dataclass(frozen=True)
class _Linear:
    """A linear layer to copy: the module that the model calls, and the layer in it; the same if nothing adapts it."""

    name: str
    module: Any
    base: nn.Linear

    @property
    def state(self) -> tuple[Any, ...]:
        """Changes when anything does that the copy is made of: writing in place counts the version up, moving or
        casting gives other memory; a head that is trained whole is written, too."""
        adapter = [] if self.module is self.base else list(self.module.parameters())
        scales = [] if self.module is self.base else [*factors(self.module), *self.module.active_adapters]
        weights = [self.base.weight, *adapter]
        return (self.base.weight.dtype, *map(written, weights), *scales)

    def merged(self) -> Tensor:
        weight = self.base.weight
        if self.module is self.base:
            return weight
        merged: Tensor = weight + added(self.module).to(weight.dtype)
        return merged


def _linears(model: nn.Module) -> list[_Linear]:
    """The layers that are worth a copy: adapted ones, and on a CPU all that have a layout to gain."""
    adapted = dict(lora_layers(model))
    found = [_Linear(name, layer, layer.get_base_layer()) for name, layer in adapted.items() if adds_only(layer)]
    inside = tuple(f"{name}." for name in adapted)  # base, A and B of an adapted layer are linear layers, too
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not name.startswith(inside) and _can_lay_out(module.weight):
            found.append(_Linear(name, module, module))
    return found


def _can_lay_out(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    bf16 = weight.dtype == torch.bfloat16 and onednn_has_bf16()
    return weight.dtype == torch.float32 or bf16


def _laid_out(weight: Tensor) -> Tensor:
    """The weight as oneDNN's products read it; as it is where they cannot."""
    if not _can_lay_out(weight):
        return weight
    return onednn_layout(weight.detach().contiguous(), _ROWS)


def _product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    if not is_laid_out(weight):
        return lambda x: F.linear(x, weight, bias)
    return lambda x: onednn_product(x, weight, bias)
