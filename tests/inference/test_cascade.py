"""Cascade attention gives what plain attention gives, for the ways in which families of models attend."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from cotune.inference import Codec
from cotune.inference.engine import Prompted
from cotune.inference.local.cascade import KeyValues, Packed, Shared, _merged, _Options
from cotune.inference.local.decoder import Decoder
from cotune.programs import Sampling
from tiny import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 24},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 12},
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 12},
    "granite": {},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "gpt_oss": {"sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def tiny(family: str) -> Any:
    """A random model of a family; where it has softcaps and sinks, they are large enough to matter."""
    transformers.set_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter, mean=1.0)
    return model


def noise(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 256) for _ in range(length)]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_logits_are_those_of_the_family_s_own_attention(family: str) -> None:
    model = tiny(family)
    prompts = [noise(150, 1) + noise(n, n) for n in (3, 9, 20)] + [noise(30, 40), noise(33, 41)]
    decoder = Decoder(model, codec=Codec(tiny_tokenizer(), end_ids=[]), window=512, cache_tokens=1 << 14)
    found = decoder.generate([Prompted(ids) for ids in prompts], Sampling(max_new_tokens=12))
    for ids, result in zip(prompts, found, strict=True):
        plain = plain_logits(model, [*ids, *result.ids])[len(ids) - 1 : -1]
        # Where two tokens are as likely as each other to the last bits, either is right.
        best, chosen = plain.max(-1).values, plain[range(len(result.ids)), result.ids]
        torch.testing.assert_close(chosen, best, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def plain_logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([list(ids)])).logits[0]


def test_a_model_with_recurrent_layers_is_refused_by_name() -> None:
    sizes = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    config = AutoConfig.for_model("mamba2", **sizes, num_heads=4, head_dim=16, n_groups=1)
    decoder = Decoder(
        AutoModelForCausalLM.from_config(config).eval(),
        codec=Codec(tiny_tokenizer(), end_ids=[]),
        window=64,
        cache_tokens=1024,
    )
    with pytest.raises(ValueError, match="0 layers of Mamba2ForCausalLM have keys and values"):
        decoder.generate([Prompted([5, 6, 7])], Sampling(max_new_tokens=2))


# The parts


def reference(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """softmax(QK'/sqrt(D))V over the seen keys, for (H, D) queries and (H, T, D) keys of one token."""
    scores = torch.einsum("hd,htd->ht", queries.double(), keys.double()) * queries.shape[-1] ** -0.5
    return torch.einsum("ht,htd->hd", scores.masked_fill(~seen, float("-inf")).softmax(-1), values.double())


@pytest.mark.parametrize("starts", [[0, 0, 0], [0, 4, 2]])
@pytest.mark.parametrize("lengths", [[3, 5, 1], [1, 1, 1], [70, 129, 3]])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("device_kernel", [True, False], ids=["fused", "plain"])
def test_every_token_reads_its_prefix_and_its_own_row_up_to_itself(
    starts: list[int], lengths: list[int], window: int | None, device_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    heads, kv_heads, width, prefixes = 4, 2, 8, (6, 0, 9)  # the middle row has no prefix
    total = sum(lengths)
    own = KeyValues(5, 140)
    homes = [(row, place) for row, start in enumerate(starts) for place in range(start)]
    if homes:
        rows, places = (torch.tensor(part) for part in zip(*homes, strict=True))
        own.write(0, *torch.randn(2, len(homes), kv_heads, width), rows + 1, places)
    tokens = [list(range(sum(lengths[:row]), sum(lengths[: row + 1]))) for row in range(3)]
    shared = []
    for row in (0, 2):
        states = KeyValues(1, prefixes[row])
        ones = torch.zeros(prefixes[row], dtype=torch.long)
        states.write(0, *torch.randn(2, prefixes[row], kv_heads, width), ones, torch.arange(prefixes[row]))
        shared.append(Shared(states, prefixes[row], torch.tensor(tokens[row])))
    positions = [prefixes[row] + starts[row] + i for row in range(3) for i in range(lengths[row])]
    packed = Packed(own, slice(1, 4), lengths, starts, shared, torch.tensor(positions))
    queries = torch.randn(1, heads, total, width)
    new = torch.randn(2, 1, kv_heads, total, width)
    softcap = None if device_kernel else 1e6  # any cap takes the plain products; this one changes no score
    read = packed.attend(0, queries, new[0], new[1], _Options(width**-0.5, window=window, softcap=softcap))
    for row in range(3):
        before = [part for part in shared if part.tokens is not None and part.tokens.tolist() == tokens[row]]
        for i, token in enumerate(tokens[row]):
            states = [own.layers[0][kind][row + 1, :, : starts[row] + i + 1] for kind in (0, 1)]
            if before:
                states = [torch.cat([before[0].states.layers[0][kind][0], mine], 1) for kind, mine in enumerate(states)]
            keys, values = (kind.repeat_interleave(heads // kv_heads, 0) for kind in states)
            seen = torch.arange(keys.shape[1]) > positions[token] - (window or 1 << 20)
            expected = reference(queries[0, :, token], keys, values, seen)
            torch.testing.assert_close(read[0, token].double(), expected, rtol=1e-5, atol=1e-5)


def test_merging_a_part_that_saw_nothing_changes_nothing() -> None:
    read, lse = torch.randn(2, 3, 4), torch.randn(2, 3)
    merged, merged_lse = _merged(read, lse, torch.zeros(2, 3, 4), torch.full((2, 3), float("-inf")))
    torch.testing.assert_close(merged, read)
    torch.testing.assert_close(merged_lse, lse)


def test_a_row_copied_into_another_slot_is_the_same_row() -> None:
    states = KeyValues(3, 4)
    states.write(0, *torch.randn(2, 4, 2, 8), torch.tensor([2, 2, 2, 2]), torch.arange(4))
    states.copy(0, states, 2, 3)
    keys, _ = states.layers[0]
    assert torch.equal(keys[0, :, :3], keys[2, :, :3])
    assert not keys[0, :, 3].any()
