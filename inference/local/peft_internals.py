"""What PEFT does not document and is used all the same: the modules that LoRA puts into a model, and what they hold.

All of it stands here. tests/test_internals.py says from which version it was read, and fails if it goes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, layer) of every layer that the adapter changes."""
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def trained_whole(model: nn.Module) -> list[str]:
    """The names of modules that are trained as they are, beside the layers with an adapter."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]


def without_adapter(model: nn.Module) -> dict[nn.Module, Callable[..., Tensor]]:
    """Each module that the adapter takes part in -> what computes its base alone."""
    from peft.utils.other import ModulesToSaveWrapper

    bare = {layer: layer.get_base_layer().forward for _, layer in lora_layers(model)}
    whole = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return {**bare, **{wrapper: wrapper.original_module.forward for wrapper in whole}}


def adds_only(layer: Any) -> bool:
    """Whether a layer's adapter does no more than to add a product of A and B to the weight of a plain linear layer."""
    base = layer.get_base_layer()
    biased = any(getattr(layer, "lora_bias", {}).values())  # which get_delta_weight leaves out
    variants = any(layer.use_dora.values()) or biased or bool(getattr(layer, "lora_variant", None))
    # Its very class: quantised layers derive from it, and their weight is no matrix to add to.
    return type(base) is nn.Linear and base.weight.is_floating_point() and not variants


def added(layer: Any) -> Any:
    """What the active adapters add to the layer's weight: scale · B A of each."""
    return sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)


def factors(layer: Any) -> list[tuple[str, float]]:
    """(adapter, scale of its update) of every adapter of the layer."""
    return [(name, float(scale)) for name, scale in layer.scaling.items()]


def shape(layer: Any, adapter: str) -> tuple[float, float] | None:
    """Rank and alpha of the layer's adapter of this name; None where it has none."""
    return (layer.r[adapter], layer.lora_alpha[adapter]) if adapter in layer.r else None


def draw_anew(layer: Any) -> None:
    """Draws A of the active adapters anew, from torch's generator; B is zero."""
    for adapter in layer.active_adapters:
        layer.reset_lora_parameters(adapter, True)


def plain_adapter(layer: Any) -> tuple[Tensor, Tensor, float] | None:
    """A, B and the scale of the one active adapter; None where there are several, or it does more than add."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name: str = layer.active_adapters[0]
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_B[name].bias is not None:
        return None
    if layer.training and getattr(layer.lora_dropout[name], "p", 0.0):
        return None
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
