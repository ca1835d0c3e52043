"""Merged weights: base and adapter as one ordinary model, in full precision, for tools that know neither."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from cotune.inference.local.transformers_internals import make_plain
from cotune.lightning_modules.embedded import gguf_source
from cotune.lightning_modules.foreign import load_adapter, reading
from cotune.lightning_modules.language_model import LanguageModel
from cotune.lightning_modules.lora import peft_of_today
from cotune.lightning_modules.quantization import QuantizationError, bitsandbytes_config, quantized_as
from cotune.programs import Sampling
from torch import nn


def save_merged(lm: LanguageModel, adapter: Path, folder: Path, *, sampling: Sampling) -> str:
    """Writes W + BA as safetensors, with config, tokenizer, chat template and generation settings.

    The base is read anew, and the sum is made and kept in `lm.dtype`: adding to a 4- or 8-bit weight would round the
    adapter away. Where `lm` has a quantization, or the checkpoint is one of bitsandbytes, the weights are rounded as
    they were in the run, and unpacked: the adapter was trained to go with just these.

    Args:
        lm: names the base; its own weights are not loaded.
        sampling: what `model.generate` does by default.

    Returns:
        What the adapter was merged into, in words.

    Raises:
        ModelNotFoundError: as `LanguageModel.load`.
        QuantizationError: the base is quantised in a way that cannot be undone.
    """
    lm.load_tokenizer()
    base, into = _full_precision(lm)
    model = _merged(base, adapter)
    make_plain(model, Path(lm.source).name)
    model.generation_config = _generation_config(lm, sampling)
    model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, and the folder is made to be shared
    return into


def _merged(base: Any, adapter: Path) -> Any:
    """W + BA. A head that shares the input embedding's weight has its own where the adapter makes them differ."""
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = head is not None and head.weight.data_ptr() == embedding.weight.data_ptr()
    settings = [
        (config, getattr(config, "tie_word_embeddings", True))
        for config in (base.config, base.config.get_text_config())
    ]
    with peft_of_today(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        adapted = load_adapter(base, str(adapter))
        if tied:  # what is added to the one would change the other
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model = adapted.merge_and_unload(safe_merge=True)
    if tied:
        same = torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        for config, was in settings:
            config.tie_word_embeddings = was and same
        if same:
            model.tie_weights()
    return model


def _full_precision(lm: LanguageModel) -> tuple[Any, str]:
    from transformers import AutoModelForCausalLM

    already, dtype = quantized_as(lm.config), str(lm.dtype).removeprefix("torch.")
    if already and not already.startswith("bitsandbytes"):
        raise QuantizationError(
            f'model "{lm.name}" is quantised as {already}, and nothing can be added to its weights without rounding. '
            "Serve the adapter beside the base (--what adapter), or tune the unquantised model."
        )
    options: dict[str, Any] = {"dtype": lm.dtype, "trust_remote_code": lm.trust_remote_code}
    if lm.quantization:
        options["quantization_config"] = bitsandbytes_config(
            lm.quantization, double=lm.double_quantization, dtype=lm.dtype
        )
        already = f"bitsandbytes {lm.quantization}"
    if not already:
        gguf = gguf_source(lm.source).get("file")
        read = f"the weights of {gguf}, unpacked to {dtype}" if gguf else f"the unquantised base in {dtype}"
        with reading("model", lm.name):
            return AutoModelForCausalLM.from_pretrained(lm.source, **options), read
    with reading("model", lm.name):
        base = AutoModelForCausalLM.from_pretrained(lm.source, device_map={"": _device(lm)}, **options)
    return base.dequantize(lm.dtype), f"the {already} weights of the base, unpacked to {dtype}"


def _device(lm: LanguageModel) -> str:
    return lm.device_name or ("cuda" if torch.cuda.is_available() else "cpu")


def _generation_config(lm: LanguageModel, sampling: Sampling) -> Any:
    """Ends where cotune's completions end, and draws as they were drawn."""
    from transformers import GenerationConfig

    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p} if sampling.temperature > 0 else {}
    return GenerationConfig(
        bos_token_id=lm.generation_config.bos_token_id,
        eos_token_id=lm.end_ids,
        pad_token_id=lm.pad_id,
        max_new_tokens=sampling.max_new_tokens,
        do_sample=bool(drawn),
        **drawn,
    )
