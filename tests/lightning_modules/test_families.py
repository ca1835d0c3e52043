"""Model families: what a prompt with demos reads like in each chat template, and a fit of each architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cotune.datamodules import ChatEncoder, Pair, collate
from cotune.lightning_modules import LanguageModel, LoRA
from cotune.lightning_modules.objectives import Rejection
from cotune.lightning_modules.training.gradients import BatchGradients
from cotune.programs import Demo, Lines, Prompt, Request, Sampling, Signature
from families import FAMILIES

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs" / "models").glob("*.yaml"))
MESSAGES = Lines().render(Signature.parse("a -> b"), Prompt("Add.", (Demo({"a": "1+1"}, {"b": "2"}),)), {"a": "2+2"})
SYSTEM = MESSAGES[0]["content"]

READS = {
    "mistral-v0.2": "<s>[INST] {system}\n\na: 1+1 [/INST]2</s>[INST] a: 2+2 [/INST]",
    "llama-2": "<s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\na: 1+1 [/INST] 2 </s><s>[INST] a: 2+2 [/INST]",
    "llama-3": "<|begin_of_text|>{system-header}{system}<|eot_id|>{user}a: 1+1<|eot_id|>{assistant}2<|eot_id|>"
    "{user}a: 2+2<|eot_id|>{assistant}",
    "llama-3.2": "<|begin_of_text|>{system-header}Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    "{system}<|eot_id|>{user}a: 1+1<|eot_id|>{assistant}2<|eot_id|>{user}a: 2+2<|eot_id|>{assistant}",
    "gemma-2": "<bos><start_of_turn>user\n{system}\n\na: 1+1<end_of_turn>\n<start_of_turn>model\n2<end_of_turn>\n"
    "<start_of_turn>user\na: 2+2<end_of_turn>\n<start_of_turn>model\n",
    "gemma-3": "<bos><start_of_turn>user\n{system}\n\na: 1+1<end_of_turn>\n<start_of_turn>model\n2<end_of_turn>\n"
    "<start_of_turn>user\na: 2+2<end_of_turn>\n<start_of_turn>model\n",
    "qwen2.5": "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\na: 1+1<|im_end|>\n<|im_start|>assistant\n2"
    "<|im_end|>\n<|im_start|>user\na: 2+2<|im_end|>\n<|im_start|>assistant\n",
    "qwen3": "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\na: 1+1<|im_end|>\n<|im_start|>assistant\n2"
    "<|im_end|>\n<|im_start|>user\na: 2+2<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "phi-4": "<|system|>{system}<|end|><|user|>a: 1+1<|end|><|assistant|>2<|end|><|user|>a: 2+2<|end|><|assistant|>",
}
HEADERS = {
    f"{{{name}}}": f"<|start_header_id|>{name.removesuffix('-header')}<|end_header_id|>\n\n"
    for name in ("system-header", "user", "assistant")
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_with_a_demo_reads_as_the_family_documents_it(family: str) -> None:
    tokenizer = FAMILIES[family].tokenizer()
    expected = READS[family]
    for name, header in HEADERS.items():
        expected = expected.replace(name, header)
    assert tokenizer.decode(ChatEncoder(tokenizer)(MESSAGES)) == expected.replace("{system}", SYSTEM)


@pytest.mark.parametrize("family", ["mistral-v0.2", "llama-2", "gemma-2", "gemma-3"])
def test_where_roles_must_alternate_two_user_turns_become_one(family: str) -> None:
    tokenizer = FAMILIES[family].tokenizer()
    chat = [{"role": "system", "content": "S"}, *({"role": "user", "content": text} for text in ("one", "two"))]
    joined = [chat[0], {"role": "user", "content": "one\n\ntwo"}]
    assert ChatEncoder(tokenizer)(chat) == ChatEncoder(tokenizer)(joined)


def test_two_user_turns_stay_two_where_the_template_takes_them() -> None:
    tokenizer = FAMILIES["qwen2.5"].tokenizer()
    chat = [{"role": "user", "content": text} for text in ("one", "two")]
    assert tokenizer.decode(ChatEncoder(tokenizer)(chat)).count("<|im_start|>user") == 2


def test_a_chat_without_a_user_turn_after_the_system_text_opens_with_the_system_text() -> None:
    tokenizer = FAMILIES["gemma-2"].tokenizer()
    chat = [{"role": "system", "content": "S"}, {"role": "assistant", "content": "A"}]
    text = tokenizer.decode(ChatEncoder(tokenizer)(chat))
    assert text.startswith("<bos><start_of_turn>user\nS<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>")


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"gemma-2"}))
def test_each_architecture_generates_and_takes_a_training_step(family: str, tmp_path: Path) -> None:
    lm = LanguageModel(str(FAMILIES[family].save(tmp_path / "m")), device="cpu", lora=LoRA(r=4, alpha=8))
    lm.load(seed=0)
    done = lm.complete([Request(MESSAGES), Request(MESSAGES[:1] + MESSAGES[-1:])], Sampling(max_new_tokens=5))
    assert [len(completion.completion_ids) > 0 for completion in done] == [True, True]
    pairs = [Pair(c.prompt_ids, (*c.completion_ids, lm.end_ids[0])) for c in done]
    trained = [p for p in lm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    losses = []
    for _ in range(6):
        computed = BatchGradients().compute(lm.model, trained, collate([pairs]), Rejection())
        assert computed.finite
        for parameter, gradient in zip(trained, computed.gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        losses.append(float(computed.loss))
    assert losses[-1] < losses[0]


def options_of(path: Path) -> dict[str, Any]:
    lm = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["lm"]
    assert lm["class_path"] == "cotune.lightning_modules.LanguageModel"
    return dict(lm["init_args"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_model_config_names_a_hub_model_that_the_class_takes(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert "GB" in first, "the first line says what memory it takes"
    options = options_of(path)
    assert options["model"].count("/") == 1
    LanguageModel(**options)  # keeps its arguments, and loads nothing


def test_there_is_a_config_for_each_of_the_papers_models() -> None:
    papers = {"mistral-7b-instruct-v0.2", "llama-2-7b-chat", "llama-3-8b-instruct"}
    assert papers <= {path.stem for path in CONFIGS}
