"""Fast paths: what each is found fit for, and that what it is not fit for is computed as plain transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cotune.datamodules.collate import Pair, collate
from cotune.inference import Codec, Prompted
from cotune.inference.local.decoder import Decoder
from cotune.inference.local.transformers_internals import alone
from cotune.lightning_modules import findings as known
from cotune.lightning_modules import probe
from cotune.lightning_modules.findings import Findings, Way, find, findings
from cotune.lightning_modules.training import plain
from cotune.programs import Sampling
from losses import row_losses
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
)

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
}
CONFIGS: dict[str, Any] = {
    "a sliding window": MistralConfig(**SIZES, sliding_window=32),
    "long rotary factors": Phi3Config(
        **SIZES, max_position_embeddings=512, original_max_position_embeddings=64, rope_parameters=LONGROPE
    ),
    "growing rotary factors": LlamaConfig(
        **SIZES, max_position_embeddings=64, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    ),
    "no attention": MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, initializer_range=0.3),
}
FOUND = {
    "a sliding window": Findings(packs=Way(up_to=32)),
    "long rotary factors": Findings(Way(up_to=64), Way(up_to=64), Way(up_to=64)),
    "growing rotary factors": Findings(Way(up_to=64), Way(up_to=64), Way(up_to=64)),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "_tried", {})
    return tmp_path / "cache"


def model_of(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [ids(50, 0) + ids(4, 1), ids(50, 0) + ids(30, 2), ids(6, 3), ids(60, 4)]


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_those_of_one_row_at_a_time(name: str) -> None:
    model = model_of(name)
    pairs = [Pair(prompt, ids(5, i)) for i, prompt in enumerate(PROMPTS)]
    found = row_losses(model, collate([pairs[:2], pairs[2:]]))
    targets = [torch.tensor(pair.completion_ids) for pair in pairs]
    logits = [plain.last_logits(model, [*pair.prompt_ids, *pair.completion_ids], 5) for pair in pairs]
    each = [F.cross_entropy(row, target, reduction="sum") for row, target in zip(logits, targets, strict=True)]
    assert torch.allclose(found, torch.stack(each), rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_completions_are_those_of_the_models_own_generate(name: str) -> None:
    model = model_of(name)
    codec = Codec(None, end_ids=[1000], encode=lambda text: [], decode=str)
    fits = findings(model).decodes.fits
    decoder = Decoder(model, codec=codec, window=512, cache_tokens=4096, together=fits)
    done = decoder.generate([Prompted(prompt) for prompt in PROMPTS], Sampling(max_new_tokens=10))
    for prompt, one in zip(PROMPTS, done, strict=True):
        given = torch.tensor([prompt])
        model.generation_config.eos_token_id = None
        with alone(model):
            out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=10, do_sample=False)
        assert one.ids == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", FOUND)
def test_each_way_is_known_to_fit_up_to_a_length(name: str) -> None:
    assert findings(model_of(name)) == FOUND[name]


def test_a_small_copy_has_every_kind_of_layer_before_and_behind_where_layers_read_the_keys_of_others() -> None:
    config = Gemma3nTextConfig()
    shared, kinds = config.num_kv_shared_layers, set(config.layer_types)
    assert shared > 1
    probe._fewer_layers(config, 2)
    begins = config.num_hidden_layers - config.num_kv_shared_layers
    assert set(config.layer_types[:begins]) == set(config.layer_types[begins:]) == kinds
    assert config.num_hidden_layers == 4


def test_attention_dropout_by_any_name_is_noticed() -> None:
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=128, attn_pdrop=0.1)
    assert find(config, AutoModelForCausalLM.from_config).drops


def test_a_config_is_tried_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find(CONFIGS["a sliding window"], AutoModelForCausalLM.from_config)
    assert len(list((cache / "probes").iterdir())) == 1
    monkeypatch.setattr(known, "_tried", {})
    assert find(CONFIGS["a sliding window"], lambda config: pytest.fail("tried again")) == found


def test_what_cannot_be_tried_goes_the_plain_way_and_says_so() -> None:
    def fails(config: Any) -> Any:
        raise RuntimeError("no")

    found = find(CONFIGS["a sliding window"], fails)
    assert not found.decodes.fits(1)
    assert found.remarks == [
        "prompts are completed one at a time: equal, but slower (it could not be tried: RuntimeError: no)",
        "training rows are computed one at a time: equal, but slower (it could not be tried: RuntimeError: no)",
    ]
