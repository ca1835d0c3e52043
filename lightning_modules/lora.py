"""The adapter: one LoRA (Hu et al., 2021) that all stages share, and its state."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LoRA:
    """Shape of the adapter.

    Attributes:
        r: rank of the update.
        alpha: the update is scaled by alpha / r, or alpha / sqrt(r) with rslora.
        dropout: on the adapter's input, while training. A batch's shared prefix sees one draw for all its rows.
        targets: names of the linear layers to adapt, or "all-linear" (every one but the output head).
        rslora: rank-stabilised scaling (Kalajdzievski, 2023).
    """

    r: int = 32
    alpha: int = 64
    dropout: float = 0.0
    targets: list[str] | Literal["all-linear"] = "all-linear"
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"LoRA rank r {self.r} is below 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout {self.dropout} is outside [0, 1).")


def attach(base: Any, lora: LoRA, *, seed: int) -> Any:
    """The base wrapped by PEFT, its adapter initialised from the seed; only the adapter requires gradients.

    Raises:
        ValueError: no layer of the model carries a target's name.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        use_rslora=lora.rslora,
        bias="none",
    )
    with seeded(seed), peft_of_today():
        try:
            model = get_peft_model(base, config)
        except ValueError as error:
            linear = sorted({name.rsplit(".", 1)[-1] for name, m in base.named_modules() if isinstance(m, nn.Linear)})
            raise ValueError(
                f"LoRA targets {lora.targets} fit no layer of this model; its linear layers are {', '.join(linear)}."
            ) from error
    reset(model, seed=seed)
    return model


def reset(model: nn.Module, *, seed: int) -> None:
    """Puts the adapter back to what `attach` made: A drawn anew from the seed, B zero."""
    with seeded(seed):
        for _, layer in lora_layers(model):
            for adapter in layer.active_adapters:
                layer.reset_lora_parameters(adapter, True)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapter's tensors, on the CPU, by parameter name."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies tensors into the adapter.

    Raises:
        ValueError: names or shapes are not those of this model's adapter; nothing is changed then.
    """
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wrong = sorted(set(own) ^ set(state)) or [n for n, p in own.items() if p.shape != state[n].shape]
    if wrong:
        raise ValueError(
            f"the adapter to load does not fit: {len(wrong)} tensors differ, the first is {wrong[0]}. "
            "It was made with another base model or other LoRA settings (r, targets)."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the adapter's tensors, by name: equal adapters have equal fingerprints."""
    digest = hashlib.sha256()
    for name, tensor in sorted(adapter_state(model).items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def weights_version(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """A value that changes whenever a parameter of the adapter is written or moved; in this process only."""
    return tuple((p._version, p.data_ptr()) for p in model.parameters() if p.requires_grad)


def lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, layer) of every layer that the adapter changes."""
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


@contextmanager
def peft_of_today() -> Iterator[None]:
    """Hides that PEFT reads an attribute which transformers has renamed: nothing a user can do about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's generators seeded inside, and as they were afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
