"""Merged weights: plain transformers computes with them what base and adapter computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import logits
from cotune.lightning_modules import LanguageModel
from cotune.lightning_modules.merged import save_merged
from cotune.programs import Sampling
from peft import LoraConfig, get_peft_model
from tiny import save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A model whose head is its input embedding."""
    folder = save_tiny_model(tmp_path / "tied")
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = True
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize(
    ("settings", "stays_tied"),
    [
        ({"target_modules": ["q_proj"]}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    ],
)
def test_an_adapter_on_one_end_of_a_tied_model_is_merged_into_that_end_alone(
    tied: Path, tmp_path: Path, settings: dict[str, Any], stays_tied: bool
) -> None:
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tied), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    out = tmp_path / "merged"
    save_merged(LanguageModel(str(tied), device="cpu"), tmp_path / "adapter", out, sampling=Sampling(max_new_tokens=4))
    merged = AutoModelForCausalLM.from_pretrained(out).eval()
    assert torch.allclose(logits(merged), logits(model), atol=1e-3)
    assert merged.config.tie_word_embeddings is stays_tied
