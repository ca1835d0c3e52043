"""What an LM is, as hashes: the base by its files, the adapter by its tensors. Completions are known by them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from cotune.inference.local.peft_internals import factors, lora_layers
from cotune.inference.local.transformers_internals import commit_of
from cotune.lightning_modules.lora import fingerprint, weights_version
from cotune.storage.durable import file_sum
from torch import Tensor, nn

_FILES = {".safetensors", ".bin", ".pt", ".gguf", ".json", ".jinja", ".model", ".txt", ".py"}
"""Kinds of files that say what a model computes, or how text becomes tokens and back."""

UNTRAINED = "untrained"
"""The identity of every adapter that changes nothing, whatever it was drawn from."""


def base_identity(source: str, config: Any, *, sum_of: Callable[[Path], str] = file_sum) -> str:
    """A model's identity: by the content of its folder, or by name and commit on the Hub.

    Args:
        source: what transformers loads from.
        config: the model's, as transformers read it; it knows the commit.
        sum_of: SHA-256 of a file; give one that remembers, for a large model takes minutes.
    """
    folder = Path(source)
    if not folder.is_dir():
        return f"{source}@{commit_of(config)}"
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in _FILES)
    listed = [(path.name, sum_of(path)) for path in paths]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


class AdapterIdentity:
    """The adapter's hash, and a copy of its tensors, made anew only when a parameter of it has been written.

    Attributes:
        base: the identity of the base that it is for; "" until that is known.
    """

    def __init__(self) -> None:
        self.base = ""
        self._state: Hashable = None
        self._name = ""
        self._tensors: Mapping[str, Tensor] | None = None

    def name(self, model: nn.Module) -> str:
        """Equal for adapters that change the base equally."""
        self._refresh(model)
        if not self._name:
            self._name = UNTRAINED if _changes_nothing(model) else f"{fingerprint(model)}|{_scaling(model)}"
        return self._name

    def tensors(self, model: nn.Module, copy: Callable[[nn.Module], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """What `copy` gives. While the adapter stays as it is, the very same tensors: a checkpoint holds them once."""
        self._refresh(model)
        if self._tensors is None:
            self._tensors = copy(model)
        return self._tensors

    def _refresh(self, model: nn.Module) -> None:
        state = weights_version(model)
        if state != self._state:
            self._state, self._name, self._tensors = state, "", None


def _changes_nothing(model: nn.Module) -> bool:
    """Whether B is zero in all layers, and nothing but A and B is trained."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return all(".lora_A." in name or (".lora_B." in name and not torch.count_nonzero(p)) for name, p in trained)


def _scaling(model: nn.Module) -> str:
    """The factors of the updates, which are no tensors."""
    scales = {name: dict(factors(layer)) for name, layer in lora_layers(model)}
    return hashlib.sha256(json.dumps(scales, sort_keys=True).encode()).hexdigest()
