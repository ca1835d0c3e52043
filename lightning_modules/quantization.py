"""Quantised bases: what bitsandbytes makes of the weights, what a checkpoint brings along, what is refused."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from cotune.errors import CotuneError
from cotune.inference.local.transformers_internals import bits_of
from torch import nn

Quantization = Literal["nf4", "fp4", "int8"]
"""A bitsandbytes format of the base's linear layers."""

FORMATS: tuple[Quantization, ...] = ("nf4", "fp4", "int8")


class QuantizationError(CotuneError, ValueError):
    """A base cannot be quantised, or trained, as asked. The message says what to change."""


def quantized_as(config: Any) -> str:
    """How a config says that the weights are quantised, e.g. "bitsandbytes nf4" or "gptq"; "" where they are not.

    >>> from types import SimpleNamespace as Config
    >>> quantized_as(Config(quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}))
    'bitsandbytes nf4'
    >>> quantized_as(Config(quantization_config={"quant_method": "gptq", "bits": 4})), quantized_as(Config())
    ('gptq', '')
    """
    found = getattr(config, "quantization_config", None)
    if not found:
        return ""
    settings = found if isinstance(found, Mapping) else found.to_dict()
    bits = bits_of(settings)
    if bits == 8:
        return "bitsandbytes int8"
    if bits == 4:
        twice = " with double quantisation" if settings.get("bnb_4bit_use_double_quant") else ""
        return f"bitsandbytes {settings.get('bnb_4bit_quant_type', '4-bit')}{twice}"
    method = settings.get("quant_method", "an unknown method")
    return str(getattr(method, "value", method))


def check_settings(quantization: Quantization | None, double_quantization: bool) -> None:
    """Raises QuantizationError for settings that contradict each other whatever the model is."""
    if double_quantization and quantization not in ("nf4", "fp4"):
        raise QuantizationError(
            f"double_quantization quantises the scales of nf4 and fp4, and quantization is {quantization or 'null'}. "
            "Set model.lm.quantization to nf4 or fp4, or leave double_quantization out."
        )


def check_base(name: str, config: Any, quantization: Quantization | None, device: str) -> None:
    """Refuses what would be ignored or break later, before any weight is read.

    Raises:
        QuantizationError: the checkpoint is quantised already, or bitsandbytes cannot run the format on this device.
    """
    already = quantized_as(config)
    if quantization and already:
        raise QuantizationError(
            f'model "{name}" is quantised already ({already}), so quantization {quantization} cannot be applied. Leave '
            "model.lm.quantization out to use it as it is, or name the unquantised model."
        )
    if quantization and (why := refusal(quantization, torch.device(device).type)):
        raise QuantizationError(
            f"bitsandbytes cannot run {quantization} on {device} here: {why}. Leave model.lm.quantization out, take "
            "another format or device; `cotune doctor` tries them all."
        )


def check_trainable(name: str, base: Any) -> None:
    """Raises QuantizationError for a checkpoint through whose quantised layers no gradient goes."""
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        raise QuantizationError(
            f'model "{name}" is quantised as {quantized_as(base.config)}, which transformers cannot train an adapter '
            "on. Take the unquantised model with model.lm.quantization nf4, or a checkpoint of bitsandbytes."
        )


def refuse_plugin(trainer: Any) -> None:
    """Raises QuantizationError for Lightning's bitsandbytes plugin: it would quantise the adapter's own layers too."""
    from lightning.pytorch.plugins import BitsandbytesPrecision

    if isinstance(trainer.precision_plugin, BitsandbytesPrecision):
        raise QuantizationError(
            "Lightning's BitsandbytesPrecision quantises every linear layer, the adapter's too, and those must train. "
            "Leave the plugin out of trainer.plugins and set model.lm.quantization to nf4, fp4 or int8."
        )


def bitsandbytes_config(quantization: Quantization, *, double: bool, dtype: torch.dtype) -> Any:
    """transformers' settings; `dtype` is that of the computation."""
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=double,
    )


def prepare_layers(model: nn.Module, *, dtype: torch.dtype) -> None:
    """Makes 4-bit layers compute in `dtype`, whatever their checkpoint was saved with, and keeps them trainable.

    On CPUs with AVX512-BF16 the first generation would repack each layer in place for fast inference, and the training
    steps after it would bypass autograd: gradients of the adapter go missing without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (mypy takes it for a parameter)
            module.compute_dtype = dtype  # type: ignore[assignment]


@functools.cache
def refusal(quantization: Quantization, device: str) -> str:
    """Why bitsandbytes cannot run a format forwards and backwards on a kind of device; "" where it can.

    It is tried on one small layer: versions, drivers and chips combine in too many ways for a list.
    """
    try:
        layer = _layer(quantization, device)
        inputs = torch.linspace(-1, 1, 128, device=device).reshape(2, 64).requires_grad_()
        layer(inputs).float().sum().backward()
    except (ImportError, RuntimeError, AssertionError, AttributeError, ValueError) as error:
        return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
    gradient = inputs.grad
    if gradient is None or not bool(torch.isfinite(gradient).all()) or not bool(gradient.abs().sum() > 0):
        return "the gradient of its inputs does not come out"
    return ""


def _layer(quantization: Quantization, device: str) -> nn.Module:
    import bitsandbytes.nn

    with torch.random.fork_rng(devices=[]):  # making a layer draws weights, and the run's generator must not move
        if quantization == "int8":
            layer: nn.Module = bitsandbytes.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False, threshold=6.0)
        else:
            layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type=quantization)
    layer.load_state_dict({"weight": torch.linspace(-99, 99, 64 * 64).sin().reshape(64, 64)})
    prepare_layers(layer, dtype=torch.float32)
    return layer.to(device)


def _worth_saying(record: logging.LogRecord) -> bool:
    """Neither that an unused kernel of the Hub is missing nor, at every layer, what int8 does to its inputs."""
    return not any(part in str(record.msg) for part in ("kernels-community", "inputs will be cast from"))


for _name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(_name).addFilter(_worth_saying)
