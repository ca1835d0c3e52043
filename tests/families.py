"""Model families as tiny random models: each with its architecture, its special tokens and its chat template's rules.

The templates are written to the format that each family documents, cut down to what a chat of texts needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

_ALTERNATE = (
    "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif %}"
)

MISTRAL = (
    "{{- bos_token }}{%- for m in messages %}" + _ALTERNATE + "{%- if m['role'] == 'user' %}"
    "{{- '[INST] ' + m['content'] + ' [/INST]' }}{%- elif m['role'] == 'assistant' %}{{- m['content'] + eos_token }}"
    "{%- else %}{{- raise_exception('Only user and assistant roles are supported!') }}{%- endif %}{%- endfor %}"
)
LLAMA_2 = (
    "{%- set system = false %}{%- set turns = messages %}{%- if messages[0]['role'] == 'system' %}"
    "{%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}{%- endif %}"
    "{%- for m in turns %}" + _ALTERNATE + "{%- set content = m['content'] %}"
    "{%- if loop.first and system %}{%- set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + content %}{%- endif %}"
    "{%- if m['role'] == 'user' %}{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{%- else %}{{- ' ' + content.strip() + ' ' + eos_token }}{%- endif %}{%- endfor %}"
)
_HEADED = (
    "{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
    " + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
LLAMA_3 = "{{- bos_token }}" + _HEADED
LLAMA_3_2 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{%- set system = '' %}{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: ' }}"
    "{{- date_string + '\n\n' + system + '<|eot_id|>' }}" + _HEADED
)
GEMMA_2 = (
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}"
    "{{- raise_exception('System role not supported') }}{%- endif %}"
    "{%- for m in messages %}" + _ALTERNATE + "{{- '<start_of_turn>' }}"
    "{{- 'model' if m['role'] == 'assistant' else m['role'] }}{{- '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"
)
GEMMA_3 = (
    "{{- bos_token }}{%- set prefix = '' %}{%- if messages[0]['role'] == 'system' %}"
    "{%- set prefix = messages[0]['content'] + '\n\n' %}{%- set messages = messages[1:] %}{%- endif %}"
    "{%- for m in messages %}" + _ALTERNATE + "{{- '<start_of_turn>' }}"
    "{{- 'model' if m['role'] == 'assistant' else m['role'] }}{{- '\n' }}{%- if loop.first %}{{- prefix }}{%- endif %}"
    "{{- m['content'] | trim + '<end_of_turn>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"
)
_CHATML = (
    "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endfor %}"
)
QWEN_2 = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    + _CHATML
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
QWEN_3 = (
    _CHATML + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
PHI_4 = (
    "{%- for m in messages %}{{- '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- else %}{{- eos_token }}{%- endif %}"
)


@dataclass(frozen=True)
class Family:
    """One family: how to make a tiny model of it.

    Attributes:
        special: its special tokens; the first is bos, the second eos, the third ends a turn where eos does not.
        added: tokens that the tokenizer adds without marking them special.
    """

    config: Callable[..., Any]
    template: str
    special: Sequence[str]
    added: Sequence[str] = ()
    options: tuple[tuple[str, Any], ...] = ()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: i for i, token in enumerate([*self.special, *self.added, *alphabet])}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        bos, eos, *_ = self.special
        made = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token=bos,
            eos_token=eos,
            pad_token=eos,
            extra_special_tokens=list(self.special[2:]),
            clean_up_tokenization_spaces=False,
        )
        made.add_tokens(list(self.added))
        made.chat_template = self.template
        return made

    def save(self, folder: Path) -> Path:
        """Writes a two-layer model of the family's architecture and its tokenizer."""
        tokenizer = self.tokenizer()
        sizes: dict[str, Any] = {
            "vocab_size": len(tokenizer),
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "bos_token_id": 0,
            "eos_token_id": [1, 2] if len(self.special) > 2 else 1,
            "pad_token_id": 1,
            "initializer_range": 0.3,
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(self.config(**{**sizes, **dict(self.options)}))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder


_LLAMA_3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
_CHATML_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
_GEMMA_TOKENS = ("<bos>", "<eos>", "<end_of_turn>", "<start_of_turn>")
_PHI_TOKENS = ("<|begin|>", "<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")

FAMILIES = {
    "mistral-v0.2": Family(MistralConfig, MISTRAL, ("<s>", "</s>"), options=(("sliding_window", None),)),
    "llama-2": Family(LlamaConfig, LLAMA_2, ("<s>", "</s>"), options=(("num_key_value_heads", 4),)),
    "llama-3": Family(LlamaConfig, LLAMA_3, _LLAMA_3_TOKENS),
    "llama-3.2": Family(LlamaConfig, LLAMA_3_2, _LLAMA_3_TOKENS, options=(("tie_word_embeddings", True),)),
    "gemma-2": Family(Gemma3TextConfig, GEMMA_2, _GEMMA_TOKENS, options=(("head_dim", 16),)),  # the template alone
    "gemma-3": Family(Gemma3TextConfig, GEMMA_3, _GEMMA_TOKENS, options=(("head_dim", 16), ("sliding_window", 64))),
    "qwen2.5": Family(Qwen2Config, QWEN_2, _CHATML_TOKENS),
    "qwen3": Family(Qwen3Config, QWEN_3, _CHATML_TOKENS, ("<think>", "</think>"), options=(("head_dim", 16),)),
    "phi-4": Family(Phi3Config, PHI_4, _PHI_TOKENS),
}
