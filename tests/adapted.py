"""Tiny models with an adapter, and what they say, for the tests of both."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from cotune.lightning_modules import LoRA
from cotune.lightning_modules.lora import attach, lora_layers
from transformers import AutoModelForCausalLM

IDS = torch.tensor([[5, 9, 200, 31, 7, 77, 120]])


def fresh(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **shape: Any) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return attach(base, LoRA(**{"r": 4, "alpha": 8, **shape}), seed=seed)


def tuned(folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose adapter changes what it says."""
    model = fresh(folder, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            weight = layer.lora_B["default"].weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    return model


def base_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if not p.requires_grad}


def bytes_of(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(t.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in tensors.items()
    }


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()
