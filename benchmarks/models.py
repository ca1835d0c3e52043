"""The models that both sides of a benchmark run: an LM with an adapter that says something, and its merged weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from cotune.lightning_modules import LanguageModel
from cotune.lightning_modules.lora import lora_layers

LM = TypeVar("LM", bound=LanguageModel)


class Endless(LanguageModel):
    """An LM for which no token ends a turn: each request writes all its tokens, on every side of a comparison."""

    @property
    def end_ids(self) -> list[int]:
        return []

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)


@dataclass(frozen=True)
class Sides:
    """Folders with the same weights twice: base model and adapter for cotune, one merged model for the others."""

    model: str
    adapter: Path
    merged: Path


def language_model(kind: type[LM], model: str, **options: Any) -> LM:
    """An LM on the CPU that generates every completion anew: nothing may come out of a store in a benchmark."""
    return kind(model, device="cpu", completions=None, **options)


def make_sides(model: str, *, dtype: str, folder: Path) -> Sides:
    """Writes an adapter with small weights, and the model of this dtype with the adapter merged, into the folder."""
    sides = Sides(model, folder / "adapter", folder / f"merged-{dtype}")
    if not sides.adapter.is_dir():
        fresh = language_model(LanguageModel, model)
        fresh.load(seed=0)
        speak(fresh)
        fresh.save_adapter(sides.adapter)
    lm = language_model(LanguageModel, model, dtype=dtype, adapter=str(sides.adapter))
    lm.load()
    merged_base(lm).save_pretrained(sides.merged)
    lm.tokenizer.save_pretrained(sides.merged)
    return sides


def speak(lm: LanguageModel) -> None:
    """Gives the adapter small weights, as training would: a zero one could be forgotten without a difference."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, layer in lora_layers(lm.model):
            weight = layer.lora_B["default"].weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * 1e-3)


def merged_base(lm: LanguageModel) -> Any:
    """A plain copy of the model with the adapter in its weights."""
    adapted = {name.removeprefix("base_model.model."): layer for name, layer in lora_layers(lm.model)}
    base = lm.model.get_base_model()
    with torch.no_grad():
        state = {name.replace(".base_layer.", "."): t for name, t in base.state_dict().items() if "lora_" not in name}
        for name, layer in adapted.items():
            weight = state[f"{name}.weight"]
            state[f"{name}.weight"] = weight + layer.get_delta_weight("default").to(weight.dtype)
    plain = type(base)(base.config).to(lm.dtype).eval()
    plain.load_state_dict(state)
    plain.generation_config = base.generation_config
    return plain
