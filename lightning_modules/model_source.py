"""Where a model's files are, what they say of it, and whether models of its kind can be tuned at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cotune.errors import CotuneError
from cotune.lightning_modules.findings import Findings, find
from cotune.lightning_modules.foreign import KINDS, ModelNotFoundError, reading

EMBEDDED = "embedded"
"""The name of the default model: SmolLM2-135M-Instruct, which needs no Hub."""


def source_of(name: str, gguf_file: str | None) -> str:
    """What transformers loads from: a folder, or a Hub id. GGUF is converted once, into the user's cache."""
    from cotune.lightning_modules.embedded import embedded_model

    if name == EMBEDDED:
        return str(embedded_model())
    path = Path(name).expanduser()
    if path.is_dir() and not gguf_file:
        return str(path)
    if path.suffix == ".gguf" and path.is_file():
        return _converted(name, path.parent, path.name)
    if path.is_dir():
        return _converted(name, path, gguf_file or "")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.suffix == ".gguf":
        raise ModelNotFoundError(f'model "{name}": there is no such folder or .gguf file. {KINDS}')
    if gguf_file:
        from huggingface_hub import hf_hub_download

        with reading("model", name):
            file = Path(hf_hub_download(name, gguf_file))
        return _converted(name, file.parent, file.name)
    return name


def _converted(name: str, folder: Path, file: str) -> str:
    from cotune.lightning_modules.embedded import convert_gguf

    try:
        return str(convert_gguf(folder, file))
    except CotuneError:
        raise
    except Exception as error:  # its readers refuse a file in any way that Python has
        raise ModelNotFoundError(
            f'model "{name}": {folder / file} is no GGUF file that transformers can read ({error}). Take the '
            "model's safetensors, with model.lm.quantization nf4 if it is large."
        ) from error


def tuned_like(name: str, config: Any, *, trust: bool) -> Findings:
    """What models of this config are fit for, found out on a small one before the weights are read.

    Raises:
        ModelNotFoundError: they are fit for nothing.
    """
    from transformers import AutoModelForCausalLM

    def build(config: Any) -> Any:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust)

    found = find(config, build)
    if found.wrong:
        raise ModelNotFoundError(f'model "{name}" cannot be tuned: {found.wrong}. {KINDS}')
    return found


def generation_config_of(source: str, config: Any) -> Any:
    """What a model says of its end tokens, as loading it would find it: in its own file, or else in its config."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:
        return GenerationConfig.from_model_config(config)
