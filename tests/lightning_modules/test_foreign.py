"""Models, tokenizers and adapters of others: what cannot be used is refused in one line: which file, and why."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cotune.datamodules.encode import ChatTemplateError
from cotune.lightning_modules import LanguageModel, LoRA, ModelNotFoundError, embedded
from cotune.programs import Request, Sampling
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from tiny import save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification, T5Config

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 99\n"


def altered(folder: Path, **settings: Any) -> None:
    """Writes other values into config.json; None takes one out."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **settings}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def pointer(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(POINTER)


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def own_code(folder: Path) -> None:
    altered(folder, model_type="mine", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    (folder / "own.py").write_text("raise RuntimeError('it was run')\n")


def two_tokens_more(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(folder)


def missing_shard(folder: Path) -> None:
    shards = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def classifier(folder: Path) -> None:
    LlamaForSequenceClassification(LlamaConfig.from_pretrained(folder)).save_pretrained(folder)
    altered(folder, architectures=["LlamaForCausalLM"])


def encoder(folder: Path) -> None:
    sizes = {"vocab_size": 259, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    shutil.rmtree(folder)
    from transformers import BertConfig, BertForMaskedLM

    BertForMaskedLM(BertConfig(**sizes, num_attention_heads=4)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def wrong_shape(folder: Path) -> None:
    altered(folder, intermediate_size=64)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pointer to weights": (pointer("model.safetensors"), r"model\.safetensors is a git-lfs pointer .* `git lfs pull`"),
    "pointer to a tokenizer": (pointer("tokenizer.json"), r"tokenizer\.json is a git-lfs pointer"),
    "weights cut off": (cut, r"model\.safetensors is damaged \(it has [\d,]+ bytes and should have"),
    "no weights": (lambda f: (f / "model.safetensors").write_bytes(b"{}"), r"damaged \(it has 2 bytes\)"),
    "a web page": (lambda f: (f / "model.safetensors").write_text("<html>" * 99), r"it is no safetensors file"),
    "a shard is missing": (missing_shard, r"1 of 2 files of weights are missing, the first is model-00002"),
    "unknown type": (lambda f: altered(f, model_type="qwen9"), r'does not know the model type "qwen9"\. Update it'),
    "no type": (lambda f: altered(f, model_type=None), r'names no "model_type"'),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json is no JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json holds no JSON object"),
    "code of its own": (own_code, r"Read that code, and then set --model\.lm\.trust_remote_code true"),
    "no tokenizer": (no_tokenizer, r"has no tokenizer: the folder holds no tokenizer\.json\. Copy"),
    "tokenizer is no JSON": (lambda f: (f / "tokenizer.json").write_text("{}"), r"cannot be loaded|has no tokenizer"),
    "tokens without rows": (two_tokens_more, r"the tokenizer has 261 tokens, but the model has only 259"),
    "a classifier": (classifier, r"1 of its weights are not in its files \(lm_head\.weight\) and would be random"),
    "an encoder": (encoder, r"depends on what comes after it, so it is no causal LM"),
    "other shapes": (wrong_shape, r"its weights have other shapes than its config\.json says"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_model_is_refused_in_one_line_that_says_why(tmp_path: Path, name: str) -> None:
    spoil, why = BAD[name]
    folder = save_tiny_model(tmp_path / "model")
    spoil(folder)
    with pytest.raises(ModelNotFoundError, match=why) as error:
        LanguageModel(str(folder), device="cpu").load()
    assert f'"{folder}"' in str(error.value)
    assert "\n" not in str(error.value)


def test_a_broken_template_is_refused_as_one(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}")
    with pytest.raises(ChatTemplateError, match=r"is no valid Jinja \(line 1: .*\)\. Fix chat_template\.jinja"):
        LanguageModel(str(folder), device="cpu").load()


@pytest.mark.parametrize(
    ("device", "why"), [("cud", 'there is no device "cud"'), ("cuda:x", 'there is no device "cuda:x"')]
)
def test_a_device_that_is_not_there_is_named_with_those_that_are(tiny_model: Path, device: str, why: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        LanguageModel(str(tiny_model), device=device).load()
    said = str(caught.value)
    assert f"cannot be put on its device: {why}" in said
    assert re.search(r"Devices here: cpu(, cuda:\d)*\. Give one of them as model.lm.device, or as --device", said)
    assert "Download it again" not in said


def test_an_encoder_decoder_is_no_causal_lm(tmp_path: Path) -> None:
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"\(T5ForConditionalGeneration\) is an encoder-deco"):
        LanguageModel(str(tmp_path)).load()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(embedded.EmbeddedModelError, match=r"file/cache cannot be made .* Set COTUNE_CACHE"):
        embedded.embedded_model()


# Adapters


def adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """Saves an adapter whose tensors change what the base says."""
    shape = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **settings}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**shape, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    return folder


def loaded(base: Path, **settings: Any) -> LanguageModel:
    lm = LanguageModel(str(base), device="cpu", **settings)
    lm.load(seed=0)
    return lm


def test_an_adapters_folder_given_as_the_model_is_told_from_one(tiny_model: Path, tmp_path: Path) -> None:
    folder = adapter(tiny_model, tmp_path / "adapter")
    with pytest.raises(ModelNotFoundError) as error:
        LanguageModel(str(folder)).load()
    assert str(error.value).endswith(f"--model.lm.model {tiny_model} --model.lm.adapter {folder}")


def test_a_folder_with_a_model_and_an_adapter_is_ambiguous(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    adapter(folder, folder)
    with pytest.raises(ModelNotFoundError, match=r"holds a model and an adapter .* not clear which to use"):
        LanguageModel(str(folder)).load()


def test_what_is_attached_is_said_and_not_what_was_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    folder = adapter(tiny_model, tmp_path / "adapter", rank_pattern={"v_proj": 4})
    lm = loaded(tiny_model, adapter=str(folder), lora=LoRA(r=16, alpha=99))
    assert str(lm.attached) == "LoRA r 4 to 8, alpha 16 on q_proj, v_proj"
    assert lm.remarks == [f"begins from the adapter {folder}; its shape stands, and model.lm.lora is not used"]


def test_another_base_of_the_same_shape_and_a_variant_of_lora_are_said(tiny_model: Path, tmp_path: Path) -> None:
    folder = adapter(tiny_model, tmp_path / "adapter", use_rslora=True)
    lm = loaded(save_tiny_model(tmp_path / "other"), adapter=str(folder))
    assert "alpha 16 (rank-stabilised) on" in str(lm.attached)
    assert lm.remarks == [f"begins from the adapter {folder}, which was trained on another base ({tiny_model})"]


def no_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def half(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[: len(weights) // 2]), folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (pointer("adapter_model.safetensors"), "is a git-lfs pointer"),
        (no_json, r"adapter_config\.json is no JSON"),
        (half, "lacks weights that"),
    ],
)
def test_a_bad_adapter_is_refused_in_one_line(
    tiny_model: Path, tmp_path: Path, spoil: Callable[[Path], Any], why: str
) -> None:
    folder = adapter(tiny_model, tmp_path / "adapter")
    spoil(folder)
    with pytest.raises(ModelNotFoundError, match=why):
        loaded(tiny_model, adapter=str(folder))


def test_an_adapter_of_another_base_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = adapter(save_tiny_model(tmp_path / "wide", width=64), tmp_path / "adapter")
    with pytest.raises(ModelNotFoundError, match=r"other shapes than this base has .* Name the base"):
        loaded(tiny_model, adapter=str(folder))


def test_an_adapter_of_more_layers_than_the_base_has_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = adapter(save_tiny_model(tmp_path / "deep", layers=4), tmp_path / "adapter")
    with pytest.raises(
        ModelNotFoundError, match=r"8 of its weights are of layers .* not have \(model\.layers\.2\.self_"
    ):
        loaded(tiny_model, adapter=str(folder))


def test_an_adapter_that_is_no_lora_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelNotFoundError, match="of the kind PROMPT_TUNING, and cotune tunes LoRA only"):
        loaded(tiny_model, adapter=str(tmp_path / "adapter"))


@pytest.mark.parametrize("merge", [True, False])
def test_decoding_sees_a_head_that_is_trained_whole(tiny_model: Path, tmp_path: Path, merge: bool) -> None:
    folder = adapter(tiny_model, tmp_path / "adapter", modules_to_save=["lm_head"])
    lm = loaded(tiny_model, adapter=str(folder), merge_while_generating=merge)
    assert str(lm.attached) == "LoRA r 8, alpha 16 on q_proj, v_proj; whole: lm_head"
    asked = [Request([{"role": "user", "content": "hello"}])]
    lm.complete(asked, Sampling(max_new_tokens=1))
    head = dict(lm.model.named_parameters())["base_model.model.lm_head.modules_to_save.default.weight"]
    with torch.no_grad():
        head.copy_(head.roll(1, 0))
    (done,) = lm.complete(asked, Sampling(max_new_tokens=1))
    logits = lm.model.eval()(input_ids=torch.tensor([done.prompt_ids])).logits[0, -1]
    assert done.completion_ids == (int(logits.argmax()),)


@pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape")
def test_biases_of_an_adapter_are_not_lost_in_the_merged_copy(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "model")
    altered(base, attention_bias=True)
    model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(base))
    model.save_pretrained(base)
    folder = adapter(base, tmp_path / "adapter", lora_bias=True)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.normal_(std=3.0, generator=torch.Generator().manual_seed(1))
    peft.save_pretrained(folder)
    asked = [Request([{"role": "user", "content": text}]) for text in ("hello", "bye")]
    said = [
        loaded(base, adapter=str(folder), merge_while_generating=merge).complete(asked, Sampling(max_new_tokens=6))
        for merge in (True, False)
    ]
    assert said[0] == said[1]
