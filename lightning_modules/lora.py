"""The adapter: one LoRA (Hu et al., 2021) that all stages share, its state, and a merged copy for generating."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name for it)
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


class MergedCopy:
    """W + BA in a second copy, so that decoding pays nothing for the adapter.

    The live base is never written: merging and unmerging it in place would make a bf16 base drift. Inside `swapped`
    each adapted layer computes with the copy, afterwards with base and adapter as before. Quantised layers have no
    weight to add to: they keep running base and adapter side by side.

    On a CPU the copy, and one of the output head, is laid out as oneDNN's products read it, which makes those up to
    twice as fast for few rows. The copy is made anew only when a parameter of the adapter has been written since.
    """

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}
        self._head: Tensor | None = None
        self._made_from: list[tuple[int, int]] = []

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        layers = [(name, layer) for name, layer in lora_layers(model) if _can_merge(layer)]
        self._refresh(model, layers)
        instead = [(layer, _product(self._copies[name], layer.get_base_layer().bias)) for name, layer in layers]
        head = _plain_head(model)
        if head is not None and self._head is not None:
            instead.append((head, _product(self._head, head.bias)))
        before = [vars(layer).get("forward") for layer, _ in instead]  # training may have one of its own there
        try:
            for layer, product in instead:
                layer.forward = product
            yield
        finally:
            for (layer, _), forward in zip(instead, before, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward

    def _refresh(self, model: nn.Module, layers: list[tuple[str, Any]]) -> None:
        # Writing in place counts the version up; moving or casting gives other memory.
        weights = [layer.get_base_layer().weight for _, layer in layers]
        adapter = [p for p in model.parameters() if p.requires_grad]
        state = [(p._version, p.data_ptr()) for p in adapter] + [(0, weight.data_ptr()) for weight in weights]
        if state == self._made_from and len(self._copies) == len(layers):
            return
        # Validation runs in inference mode, and a copy made there could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            for (name, layer), weight in zip(layers, weights, strict=True):
                delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
                self._copies[name] = _laid_out(weight + delta.to(weight.dtype))
            head = _plain_head(model)
            if self._head is None or not self._made_from or self._made_from[-1] != state[-1]:
                self._head = _laid_out(head.weight) if head is not None and _can_lay_out(head.weight) else None
        self._made_from = state

    def free(self) -> None:
        """Gives the copy's memory back."""
        self._copies.clear()
        self._head = None


def _can_merge(layer: Any) -> bool:
    base = layer.get_base_layer()
    return type(base) is nn.Linear and base.weight.is_floating_point() and not any(layer.use_dora.values())


def _plain_head(model: Any) -> nn.Linear | None:
    """The output head, where it is a linear layer of its own and nothing adapts it."""
    head = model.get_output_embeddings()
    return head if type(head) is nn.Linear else None


_ROWS = 64
"""Rows that a layout is made for. One made for 64 is as fast for 1 and for 400."""


def _can_lay_out(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    bf16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or bool(bf16)


def _laid_out(weight: Tensor) -> Tensor:
    """The weight as oneDNN's products read it; as it is where they cannot."""
    if not _can_lay_out(weight):
        return weight
    laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS)
    return laid_out


def _product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    if not weight.is_mkldnn:
        return lambda x: F.linear(x, weight, bias)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


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
