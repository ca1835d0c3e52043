"""What transformers does not promise and is used all the same: private and undocumented names of configs and models.

All of it stands here. tests/test_internals.py says from which version it was read, and fails if it goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

NAMES_OF_CONFIGS = (
    "_name_or_path",
    "_commit_hash",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "quantization_config",
)
"""Of a config what changes no computation of plain weights."""


def attention_of(config: Any) -> str:
    """The name of the attention that the model's layers call."""
    return str(config._attn_implementation)


@contextmanager
def attending_by(config: Any, name: str) -> Iterator[None]:
    """The model's layers call the attention of that name inside, and what they called before afterwards."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def commit_of(config: Any) -> str | None:
    """The commit on the Hub that a config was read at; None for one from a folder."""
    found: str | None = getattr(config, "_commit_hash", None)
    return found


def random_like(model: Any) -> Any:
    """Config -> a random model of it, of this model's own class."""
    return type(model)._from_config


def holds_adapter(model: Any) -> bool:
    """Whether what was read is, or holds, an adapter of PEFT's."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def bits_of(settings: Mapping[str, Any]) -> int | None:
    """8 or 4 where a bitsandbytes config, written out, says so."""
    bits = [n for n in (8, 4) if settings.get(f"load_in_{n}bit") or settings.get(f"_load_in_{n}bit")]
    return bits[0] if bits else None


def make_plain(model: Any, name: str) -> None:
    """Makes a model whose weights were unpacked say so: else it calls itself quantised and refuses to be saved.

    Args:
        name: what its config says that it was read from.
    """
    model.is_quantized = False
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(model, flag):
            setattr(model, flag, False)
    # A GGUF file's `general.name` ends up in a stray attribute, and a temporary path in the real one.
    for owner, attribute in (
        (model, "hf_quantizer"),
        (model.config, "quantization_config"),
        (model.config, "_model_name_or_path"),
    ):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    model.config._name_or_path = name
    if conversions := getattr(model, "_weight_conversions", None):  # saving would pack the weights again, and cannot
        model._weight_conversions = [conversion for conversion in conversions if _can_be_undone(conversion)]


def _can_be_undone(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


@contextmanager
def alone(base: Any) -> Iterator[None]:
    """Rotary embeddings that grow with the longest text so far begin anew, and leave nothing behind."""
    growing = [module for module in base.modules() if hasattr(module, "max_seq_len_cached")]
    for module in growing:
        _begin_anew(module)
    try:
        yield
    finally:
        for module in growing:
            _begin_anew(module)


def _begin_anew(module: Any) -> None:
    names = [*vars(module), *(name for name, _ in module.named_buffers(recurse=False))]
    for name in [name for name in names if name.endswith("original_inv_freq")]:
        kind = name.removesuffix("original_inv_freq")  # layers of several kinds have factors of their own
        grown, first = f"{kind}max_seq_len_cached", module.original_max_seq_len
        if getattr(module, grown, first) != first:
            device = getattr(module, f"{kind}inv_freq").device
            setattr(module, f"{kind}inv_freq", getattr(module, name).clone().to(device))
            setattr(module, grown, first)
