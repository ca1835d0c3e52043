"""The adapter: one LoRA (Hu et al., 2021) that all stages share, and its state."""

from __future__ import annotations

import difflib
import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from cotune.errors import BadValueError
from cotune.inference.local.peft_internals import draw_anew, lora_layers, shape, trained_whole
from cotune.inference.local.torch_internals import written
from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

Part = Literal["experts", "head", "vision"]
"""What "all-linear" leaves out: experts held as one parameter, the output head, and all outside of the text model."""


@dataclass(frozen=True)
class LoRA:
    """Shape of the adapter.

    Attributes:
        r: rank of the update.
        alpha: the update is scaled by alpha / r, or alpha / sqrt(r) with rslora.
        dropout: on the adapter's input, while training. A batch's shared prefix sees one draw for all its rows.
        targets: names of the linear layers to adapt, or "all-linear": every one of the text model but the output head.
        also: what "all-linear" takes besides: "experts" of a mixture that are held as one parameter, not as layers;
            the output "head"; the layers of "vision" and other towers and of what joins them to the text model.
        rslora: rank-stabilised scaling (Kalajdzievski, 2023).
    """

    r: int = 32
    alpha: int = 64
    dropout: float = 0.0
    targets: list[str] | Literal["all-linear"] = "all-linear"
    also: list[Part] = field(default_factory=list)
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise BadValueError(f"LoRA rank r {self.r} is below 1.")
        if self.alpha <= 0:
            raise BadValueError(f"LoRA alpha {self.alpha} must be above 0: at 0 the adapter changes nothing.")
        if not 0 <= self.dropout < 1:
            raise BadValueError(f"LoRA dropout {self.dropout} is outside [0, 1).")
        if not self.targets:
            raise BadValueError('LoRA targets name no layer; "all-linear" takes every one.')
        if self.also and self.targets != "all-linear":
            raise BadValueError(f"LoRA also {self.also} needs targets all-linear; name the layers in targets instead.")
        if "experts" in self.also and self.dropout:
            raise BadValueError("LoRA dropout does not work with experts stored as one parameter; set it to 0.")


def attach(base: Any, lora: LoRA, *, seed: int) -> Any:
    """The base wrapped by PEFT, its adapter initialised from the seed; only the adapter requires gradients.

    Raises:
        ValueError: there is a target whose name no layer of the model carries, or a part that it does not have.
    """
    from peft import LoraConfig, get_peft_model

    parts = _Parts(base)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        bias="none",
        **(_named(parts, lora.targets) if lora.targets != "all-linear" else _all_linear(parts, lora)),
    )
    with seeded(seed), peft_of_today():
        try:
            model = get_peft_model(base, config)
        except (ValueError, NotImplementedError) as error:
            raise BadValueError(f"LoRA targets {lora.targets}: {' '.join(str(error).split())}") from error
    reset(model, seed=seed)
    return model


@dataclass(frozen=True)
class Attached:
    """The adapter that a model has.

    Attributes:
        rank: r, or its lowest and highest where layers differ; likewise alpha.
        targets: names of the adapted layers and parameters, without their places.
        whole: modules that are trained whole.
        left_out: experts, towers: what has no adapter, and its share of all weights.
        variant: "rank-stabilised", "DoRA" or both, where it is not plain LoRA.
    """

    rank: str
    alpha: str
    targets: tuple[str, ...]
    whole: tuple[str, ...] = ()
    left_out: Mapping[str, float] = field(default_factory=dict)
    variant: str = ""

    def __str__(self) -> str:
        """In words, as a run's first lines have it."""
        variant = f" ({self.variant})" if self.variant else ""
        parts = [f"LoRA r {self.rank}, alpha {self.alpha}{variant} on {', '.join(self.targets)}"]
        if self.whole:
            parts.append(f"whole: {', '.join(self.whole)}")
        parts += [
            f"without the {part}, {share:.0%} of the weights (model.lm.lora.also [{part}] takes them)"
            for part, share in self.left_out.items()
        ]
        return "; ".join(parts)


def attached(model: Any) -> Attached:
    """What is attached to a model, read off its layers."""
    layers = lora_layers(model)
    (name, *_) = model.active_adapters if hasattr(model, "active_adapters") else ["default"]
    shapes = [found for _, layer in layers if (found := shape(layer, name)) is not None]
    config = model.peft_config[name]
    parameters = [str(target).rpartition(".")[2] for target in config.target_parameters or ()]
    places = {place.rpartition(".")[2] for place, layer in layers if not hasattr(layer, "parameter_name")}
    parts = _Parts(model.get_base_model())
    shares = {"experts": 0.0 if parameters else parts.share("experts"), "vision": parts.share("vision")}
    if any(place.removeprefix("base_model.model.") in parts.outside for place, _ in layers):
        shares["vision"] = 0.0
    return Attached(
        _span({rank for rank, _ in shapes}),
        _span({alpha for _, alpha in shapes}),
        tuple(sorted({*places, *parameters})),
        tuple(sorted(config.modules_to_save or ())),
        {part: share for part, share in shares.items() if share > 0},
        ", ".join(name for name, on in (("rank-stabilised", config.use_rslora), ("DoRA", config.use_dora)) if on),
    )


def _span(values: set[Any]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


_FUSED = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}
"""Models whose kernels read the weight of a layer ("out_proj") past it, and past an adapter of it."""


class _Parts:
    """A base's linear layers, by what they are of."""

    def __init__(self, base: Any) -> None:
        from transformers.pytorch_utils import Conv1D

        head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        text = base.get_decoder() if hasattr(base, "get_decoder") else None
        inside = {id(module) for module in (base if text is None else text).modules()}
        self._base = base
        self.linear: list[str] = []  # of the text model
        self.head: list[str] = []
        self.outside: list[str] = []
        self.odd: list[str] = []  # linear layers that an adapter cannot change: some routers give more than a product
        self.experts: list[str] = []
        fused = getattr(base.config, "model_type", "") in _FUSED
        adapted, whole = dict(lora_layers(base)), tuple(f"{name}." for name in trained_whole(base))
        for name, module in base.named_modules():
            layer: Any = module.get_base_layer() if name in adapted else module
            if whole and name.startswith(whole):  # trained as it is
                continue
            if layer is head:
                self.head.append(name)
            elif id(module) not in inside:
                self.outside += [name] if isinstance(layer, nn.Linear | Conv1D) else []
            elif isinstance(layer, nn.Linear) and (_is_odd(layer) or (fused and name.endswith(".out_proj"))):
                self.odd.append(name)
            elif isinstance(layer, nn.Linear | Conv1D):
                self.linear.append(name)
            elif not isinstance(layer, _CONVOLUTIONS):
                held = ((own, p) for own, p in layer.named_parameters(recurse=False) if p.dim() == 3 and len(p) > 1)
                self.experts += [f"{name}.{own}" for own, _ in held]

    def share(self, part: Literal["experts", "vision"]) -> float:
        """How much of all weights is of this part."""
        named: dict[str, int] = {name: p.numel() for name, p in self._base.named_parameters()}
        total = sum(named.values()) or 1
        if part == "experts":
            return sum(named[name] for name in self.experts if name in named) / total
        outside = tuple(f"{name}." for name in self.outside)
        return sum(size for name, size in named.items() if outside and name.startswith(outside)) / total


def _is_odd(layer: nn.Linear) -> bool:
    """Whether a layer with a forward pass of its model's own gives something else than a linear layer does."""
    if type(layer).forward is nn.Linear.forward or not type(layer).__module__.startswith("transformers"):
        return False
    try:
        with torch.no_grad():
            given = layer(torch.zeros(1, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device))
    except RuntimeError:  # it takes its inputs in groups, or the like
        return True
    return not isinstance(given, Tensor) or given.shape != (1, layer.out_features)


def _named(parts: _Parts, targets: Sequence[str]) -> dict[str, Any]:
    there = [name for name, _ in parts._base.named_modules() if name not in parts.odd]
    lost = [target for target in targets if not any(_carries(name, target) for name in there)]
    if not lost:
        return {"target_modules": list(targets), "exclude_modules": parts.odd or None}
    names = sorted({name.rpartition(".")[2] for name in (*parts.linear, *parts.head)})
    near = [found for target in lost for found in difflib.get_close_matches(target, names, n=1)]
    meant = f" (did you mean {', '.join(near)}?)" if near else ""
    raise BadValueError(
        f"LoRA targets {lost} fit no layer of this model{meant}; its linear layers are {', '.join(names)}. "
        '"all-linear" takes every one but the output head.'
    )


def _carries(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _all_linear(parts: _Parts, lora: LoRA) -> dict[str, Any]:
    has = {"experts": parts.experts, "head": parts.head, "vision": parts.outside}
    lacking = [part for part in lora.also if not has[part]]
    if lacking:
        raise BadValueError(f"LoRA also {lacking}: this model has no such part. Leave it out of model.lm.lora.also.")
    taken = [*parts.linear, *(name for part in ("head", "vision") if part in lora.also for name in has[part])]
    if not taken:
        raise BadValueError('LoRA targets "all-linear" fit no layer of this model: it has no linear layers.')
    left = [*parts.odd, *(parts.outside if "vision" not in lora.also else [])]
    return {
        "target_modules": taken if "head" in lora.also else "all-linear",
        "exclude_modules": left or None,
        "target_parameters": parts.experts if "experts" in lora.also else None,
    }


def reset(model: nn.Module, *, seed: int) -> None:
    """Puts the adapter back to what `attach` made: A drawn anew from the seed, B zero; equal on every device.

    What else an adapter of others trains, DoRA's magnitudes and whole modules, becomes what it is in the base.

    Raises:
        BadValueError: it trains something whose values in the base are not known here, such as the base's own biases.
    """
    drawn = [p for p in model.parameters() if p.requires_grad]
    named = (name for name, p in model.named_parameters() if p.requires_grad)
    if left := [name for name in named if not any(part in name for part in _RESET)]:
        raise BadValueError(
            f"the adapter also trains {left[0]}, whose value in the base is not known any more, so it cannot "
            'start from the base again. Set alternate.weights to "continue".'
        )
    places = [p.data for p in drawn]
    with seeded(seed):
        for p in drawn:  # a GPU's generator would draw other numbers
            p.data = p.data.cpu()
        for _, layer in lora_layers(model):
            draw_anew(layer)
    for p, place in zip(drawn, places, strict=True):
        p.data = place.copy_(p.data)
    _as_in_base(model)


_RESET = (".lora_A.", ".lora_B.", ".lora_embedding_", ".lora_magnitude_vector.", ".modules_to_save.")
"""In the names of all that `reset` puts back."""


@torch.no_grad()
def _as_in_base(model: nn.Module) -> None:
    """Copies from the base what is trained beside A and B; B must be zero."""
    from peft.utils.integrations import dequantize_module_weight

    for _, layer in lora_layers(model):
        for magnitudes in layer.lora_magnitude_vector.values():  # of rows of W + BA
            weight = dequantize_module_weight(layer.get_base_layer())
            magnitudes.weight.copy_(magnitudes.get_weight_norm(weight, 0.0, 1.0))
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for name, trained in tensors.items():
        place, whole, rest = name.partition(".modules_to_save.")
        if whole:
            trained.copy_(tensors[f"{place}.original_module.{rest.partition('.')[2]}"])


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
        raise BadValueError(
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


def weights_version(model: nn.Module) -> tuple[tuple[int, int, int], ...]:
    """A value that changes whenever a parameter of the adapter is written or moved; in this process only."""
    return tuple(written(p) for p in model.parameters() if p.requires_grad)


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
