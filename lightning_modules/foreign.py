"""Foreign files: the one place where models, tokenizers and adapters that others made are read.

Whatever the libraries underneath raise on them becomes one line: the file, the reason, the way out. What can be known
from small files is asked before the large ones are read.
"""

from __future__ import annotations

import json
import re
import struct
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cotune.errors import CotuneError
from cotune.inference.local.out_of_memory import is_out_of_memory
from cotune.inference.local.transformers_internals import holds_adapter

KINDS = (
    'Give "embedded" (SmolLM2-135M-Instruct, needs no network), a local folder with config.json and weights, '
    "a .gguf file, or a Hub id such as HuggingFaceTB/SmolLM2-135M-Instruct."
)
_POINTER = b"version https://git-lfs.github.com/"
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "*vocab*.txt", "*.tiktoken", "tekken.json", "tokenizer*.py")
_NO_DEVICE = re.compile(
    r"device string|not (compiled|linked) with|invalid device ordinal|No CUDA GPUs|no NVIDIA driver", re.IGNORECASE
)
"""How PyTorch says that there is no such device."""
_ANOTHER = "Download it again, or take another model."


class ModelNotFoundError(CotuneError, ValueError):
    """No model, tokenizer or adapter can be loaded under the given name. The message says why, and what to do."""


def check_folder(name: str, folder: Path) -> None:
    """Looks a model's folder over before anything in it is read.

    Raises:
        ModelNotFoundError: it is an adapter's, it holds two things at once, pointers in place of files, a damaged or
            missing file of weights, or no tokenizer.
    """
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            base = _json(f'model "{name}"', folder / "adapter_config.json").get("base_model_name_or_path") or "BASE"
            raise ModelNotFoundError(
                f'model "{name}" is a PEFT adapter of {base}: --model.lm.model {base} --model.lm.adapter {name}'
            )
        raise ModelNotFoundError(
            f'model "{name}": the folder holds no config.json; name a GGUF file in it by `gguf_file`. {KINDS}'
        )
    if (folder / "adapter_config.json").is_file():
        raise ModelNotFoundError(
            f'model "{name}" holds a model and an adapter (adapter_config.json), so it is not clear which to use. '
            "Move adapter_config.json and adapter_model.safetensors into another folder; to start from both, give "
            "that folder as --model.lm.adapter."
        )
    _check_files("model", name, folder)
    if not any(found for pattern in _TOKENIZERS for found in folder.glob(pattern)):
        raise ModelNotFoundError(
            f'model "{name}" has no tokenizer: the folder holds no tokenizer.json. Copy tokenizer.json, '
            "tokenizer_config.json and chat_template.jinja from the model that it was made of into it."
        )


def check_config(name: str, config: Any, *, trust: bool) -> None:
    """Refuses what is no causal LM.

    Raises:
        ModelNotFoundError: it is none.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = getattr(config, "model_type", "") or type(config).__name__
    own_code = trust and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not own_code and (
        type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_encoder_decoder", False)
    ):
        encoding = "an encoder-decoder" if getattr(config, "is_encoder_decoder", False) else "another kind of model"
        named = ", ".join(getattr(config, "architectures", None) or [kind])
        raise ModelNotFoundError(
            f'model "{name}" ({named}) is {encoding} ("{kind}"), and cotune tunes only causal LMs. '
            "Use an instruct model such as HuggingFaceTB/SmolLM2-135M-Instruct."
        )


def check_tokenizer(name: str, tokenizer: Any, config: Any) -> None:
    """Refuses a tokenizer that is not the model's.

    Raises:
        ModelNotFoundError: it reads no text, or has tokens for which the model has no row.
    """
    said = "The quick brown fox, 1 + 1"
    ids = tokenizer(said, add_special_tokens=False).input_ids
    letters = "".join(tokenizer.decode(ids).split()).casefold()
    if letters != "".join(said.split()).casefold():
        raise ModelNotFoundError(
            f'model "{name}": its tokenizer turns "{said}" into "{letters[:40]}", so its files are missing or damaged. '
            "Copy tokenizer.json and tokenizer_config.json from the model that it was made from."
        )
    rows = getattr(config.get_text_config(), "vocab_size", None)
    highest = max(tokenizer.get_vocab().values(), default=0)
    if rows is not None and highest >= rows:
        raise ModelNotFoundError(
            f'model "{name}": the tokenizer has {highest + 1} tokens, but the model has only {rows} (vocab_size in '
            "config.json). Use the model's own tokenizer, or resize the model's embeddings to this one."
        )


def check_weights(name: str, base: Any, info: Mapping[str, Any]) -> None:
    """Refuses a base with an adapter in it, and weights that were not in the files, and would be random.

    Args:
        base: the model as read.
        info: what `from_pretrained(output_loading_info=True)` gives beside it.

    Raises:
        ModelNotFoundError: there are some.
    """
    if holds_adapter(base):
        raise ModelNotFoundError(
            f'model "{name}" is, or holds, an adapter. Set model.lm.model to its base and model.lm.adapter to the '
            "folder of the adapter (get it with hf download)."
        )
    lacking = sorted(info.get("missing_keys") or ())
    if lacking:
        raise ModelNotFoundError(
            f'model "{name}": {len(lacking)} of its weights are not in its files ({lacking[0]}) and would be random. '
            f"The files are of another kind of model, or some are missing. {_ANOTHER}"
        )


def check_adapter(name: str) -> None:
    """Looks an adapter's folder over.

    Raises:
        ModelNotFoundError: it is none, it is damaged, or none that can be gone on with.
    """
    folder = Path(name).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise ModelNotFoundError(f'adapter "{name}" is not a folder that holds an adapter_config.json.')
    _check_files("adapter", name, folder)
    settings = _adapter_settings(name)
    if (kind := settings.get("peft_type")) != "LORA":
        raise ModelNotFoundError(
            f'adapter "{name}" is of the kind {kind}, and cotune tunes LoRA only. Leave model.lm.adapter out to begin '
            "with a fresh one."
        )
    odd = [option for option in ("alora_invocation_tokens", "layer_replication") if settings.get(option)]
    if odd:
        raise ModelNotFoundError(
            f'adapter "{name}" uses {odd[0]}, which cotune does not support when it generates. Merge it into its base '
            "with PEFT's merge_and_unload, and set model.lm.model to the merged model."
        )


@contextmanager
def reading(what: str, name: str, *, ours: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Whatever goes wrong while something is read, as a ModelNotFoundError of one line.

    Args:
        what: "model" or "adapter".
        name: as the user gave it.
        ours: errors that say it well already.
    """
    said_well: tuple[type[Exception], ...] = (ModelNotFoundError, *ours)
    try:
        yield
    except said_well:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise ModelNotFoundError(
                f'{what} "{name}": there is not enough memory. Use --model.lm.dtype bfloat16, --model.lm.quantization '
                "nf4, or a smaller model."
            ) from error
        raise ModelNotFoundError(_explained(what, name, error)) from error


def load_adapter(base: Any, name: str) -> Any:
    """The base with an adapter from a folder, to be trained on.

    Raises:
        ModelNotFoundError: it cannot be read, or does not fit this base, wholly.
    """
    from peft import PeftModel

    check_adapter(name)
    unknown: list[str] = []  # PEFT says nothing of keys that the model does not have; PyTorch does
    hook = base.register_load_state_dict_post_hook(lambda _, keys: unknown.extend(keys.unexpected_keys))
    with warnings.catch_warnings(record=True) as said, reading("adapter", name):
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, str(Path(name).expanduser()), is_trainable=True)
    hook.remove()
    missing = [str(one.message) for one in said if "missing adapter keys" in str(one.message)]
    if missing:
        raise ModelNotFoundError(
            f'adapter "{name}" lacks weights that its adapter_config.json lists, or belongs to another base. Set '
            "model.lm.model to the base that it was trained on."
        )
    if unknown:
        some = ", ".join(key.removeprefix("base_model.model.") for key in sorted(unknown)[:3])
        raise ModelNotFoundError(
            f'adapter "{name}" belongs to another base: {len(unknown)} of its weights are of layers that this one does '
            f"not have ({some}). Set model.lm.model to the base that it was trained on."
        )
    return model


def _adapter_settings(name: str) -> dict[str, Any]:
    """An adapter's adapter_config.json.

    Raises:
        ModelNotFoundError: it is no JSON.
    """
    return _json(f'adapter "{name}"', Path(name).expanduser() / "adapter_config.json")


def named_adapter(name: str, bases: Collection[str]) -> str:
    """An adapter's name; and the base that it says it was trained on, where that is none of these by its last part."""
    base = _adapter_settings(name).get("base_model_name_or_path") or ""
    known = not base or Path(base).name in {Path(one).name for one in bases}
    return f"the adapter {name}" + ("" if known else f", which was trained on another base ({base})")


def _check_files(kind: str, name: str, folder: Path) -> None:
    what = f'{kind} "{name}"'
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        with reading(kind, name), file.open("rb") as opened:
            head = opened.read(len(_POINTER))
        if head == _POINTER:
            raise ModelNotFoundError(
                f"{what}: {file.name} is a git-lfs pointer and not the file itself. Fetch the files: `git lfs pull` in "
                f"{folder}"
            )
        if file.suffix == ".safetensors" and (why := _damage(file)):
            raise ModelNotFoundError(f"{what}: {file.name} is damaged ({why}). {_ANOTHER}")
        if file.name.endswith("config.json"):
            _json(what, file)
        if file.name.endswith(".index.json"):
            _check_index(what, file)


def _check_index(what: str, index: Path) -> None:
    try:
        named = set(_json(what, index)["weight_map"].values())
    except (KeyError, AttributeError, TypeError) as error:
        raise ModelNotFoundError(f"{what}: {index.name} is no index of weights ({error!r}). {_ANOTHER}") from error
    missing = sorted(file for file in named if not (index.parent / str(file)).is_file())
    if missing:
        raise ModelNotFoundError(
            f"{what}: {len(missing)} of {len(named)} files of weights are missing, the first is {missing[0]}. "
            f"{_ANOTHER}"
        )


def _json(what: str, file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelNotFoundError(f"{what}: {file.name} is no JSON ({error}). Download it again.") from error
    if not isinstance(found, dict):
        raise ModelNotFoundError(f"{what}: {file.name} holds no JSON object. Download it again.")
    return found


def _damage(file: Path) -> str:
    """What is wrong with a safetensors file, by its header and its size; "" where nothing is."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(8)
        if len(head) < 8:
            return f"it has {size} bytes"
        (length,) = struct.unpack("<Q", head)
        if length > size - 8:
            return "it is no safetensors file, or is cut off"
        try:
            header = json.loads(opened.read(length))
            end = max((tensor["data_offsets"][1] for key, tensor in header.items() if key != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            return "its header is no JSON of tensors"
    return "" if size == 8 + length + end else f"it has {size:,} bytes and should have {8 + length + end:,}"


def _explained(what: str, name: str, error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    folder = Path(name).expanduser().is_dir()
    if isinstance(error, PermissionError):
        return f'{what} "{name}" cannot be read ({first}). Give yourself the right to read its files.'
    if isinstance(error, OSError) and what == "model":  # transformers and the Hub client raise subclasses of it
        why = "is a folder that lacks something" if folder else "is no local folder, and the Hub gave none by that name"
        return f'{what} "{name}" {why} ({first}). {KINDS}'
    if _NO_DEVICE.search(str(error)):
        unknown = re.search(r"device string: '?(.+?)'?$", first)
        why = f'there is no device "{unknown[1]}"' if unknown else first[:200]
        return (
            f'{what} "{name}" cannot be put on its device: {why}. Devices here: {_devices()}. Give one of them as '
            "model.lm.device, or as --device of a command that has it."
        )
    if "trust_remote_code" in str(error):
        return (
            f'{what} "{name}" comes with Python code of its own, which has to be run to load it. Read that code, and '
            "then set --model.lm.trust_remote_code true."
        )
    if "does not recognize this architecture" in str(error) or "model_type" in str(error):
        return f'{what} "{name}": {_unknown(name)}'
    if "ignore_mismatched_sizes" in str(error):
        return f'{what} "{name}" does not fit: its weights have other shapes than its config.json says. {_ANOTHER}'
    if "size mismatch" in str(error):
        return (
            f'{what} "{name}" does not fit: its weights have other shapes than this base has '
            f"({_line_with(error, 'size mismatch')[:160]}). Name the base that it was trained on by model.lm.model."
        )
    return f'{what} "{name}" cannot be loaded: {type(error).__name__}: {first[:300]}. {_ANOTHER}'


def _devices() -> str:
    import torch

    return ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])


def _unknown(name: str) -> str:
    from transformers import __version__

    path = Path(name).expanduser() / "config.json"
    kind = _json(f'model "{name}"', path).get("model_type") if path.is_file() else ""
    if kind is None:
        return 'its config.json names no "model_type". Copy config.json from the model that it was made of.'
    of = f'the model type "{kind}"' if kind else "its model type"
    return f"this transformers ({__version__}) does not know {of}. Update it (pip install -U transformers), if it does."


def _line_with(error: Exception, part: str) -> str:
    return next(" ".join(line.split()) for line in str(error).splitlines() if part in line)
