"""The adapter: where it sits, and what decides its values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import fresh, logits, tuned
from cotune.lightning_modules import LoRA
from cotune.lightning_modules.lora import (
    adapter_state,
    attach,
    attached,
    fingerprint,
    load_adapter_state,
    lora_layers,
    reset,
)
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GptOssConfig, Llama4TextConfig, LlamaConfig


def test_only_the_adapter_trains_and_it_sits_on_every_linear_layer_but_the_head(tiny_model: Path) -> None:
    model = fresh(tiny_model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2  # layers x (q, k, v, o, gate, up, down) x (A, B)
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert not any("lm_head" in name for name in trained)


def test_a_new_adapter_changes_no_logit(tiny_model: Path) -> None:
    plain = logits(AutoModelForCausalLM.from_pretrained(tiny_model))
    assert torch.equal(logits(fresh(tiny_model).eval()), plain)


def test_named_targets_are_adapted_and_no_others(tiny_model: Path) -> None:
    names = [name for name, _ in lora_layers(fresh(tiny_model, targets=["q_proj", "v_proj"]))]
    assert len(names) == 4
    assert all(name.endswith(("q_proj", "v_proj")) for name in names)


def test_targets_that_fit_no_layer_are_refused_with_the_names_that_exist(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=r"\['query'\] fit no layer .* gate_proj, k_proj, .*q_proj.*v_proj"):
        fresh(tiny_model, targets=["query"])


def test_the_seed_alone_decides_the_adapter(tiny_model: Path) -> None:
    torch.manual_seed(1)
    one = fingerprint(fresh(tiny_model, seed=3))
    torch.manual_seed(2)
    assert fingerprint(fresh(tiny_model, seed=3)) == one
    assert fingerprint(fresh(tiny_model, seed=4)) != one


def test_reset_gives_what_attaching_gave(tiny_model: Path) -> None:
    model = fresh(tiny_model, seed=5)
    made = fingerprint(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1.0)
    reset(model, seed=6)
    assert fingerprint(model) != made
    reset(model, seed=5)
    assert fingerprint(model) == made
    assert torch.equal(logits(model.eval()), logits(AutoModelForCausalLM.from_pretrained(tiny_model)))


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_reset_takes_what_else_an_adapter_trains_from_the_base(tiny_model: Path, settings: dict[str, Any]) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **settings))
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.add_(1.0)
    reset(model, seed=0)
    expected = logits(AutoModelForCausalLM.from_pretrained(tiny_model).eval())
    assert torch.allclose(logits(model.eval()), expected, atol=1e-4)
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in trained]  # an optimiser has these


def test_an_adapter_that_trains_the_bases_own_biases_is_not_reset(tiny_model: Path) -> None:
    base = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(tiny_model, attention_bias=True))
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], bias="all"))
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"also trains .*bias.* Set alternate\.weights to \"continue\""):
        reset(model, seed=0)
    assert fingerprint(model) == before


def test_the_global_generator_is_left_alone(tiny_model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = torch.random.get_rng_state()
    reset(attach(base, LoRA(r=2), seed=1), seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("r", "dropout"), [(0, 0.0), (4, 1.0), (4, -0.1)])
def test_impossible_shapes_are_refused(r: int, dropout: float) -> None:
    with pytest.raises(ValueError, match=r"below 1|outside"):
        LoRA(r=r, dropout=dropout)


# State


def test_a_state_loads_back_exactly(tiny_model: Path) -> None:
    source, target = tuned(tiny_model), fresh(tiny_model)
    load_adapter_state(target, adapter_state(source))
    assert fingerprint(target) == fingerprint(source)


def test_a_state_is_a_copy(tiny_model: Path) -> None:
    model = fresh(tiny_model)
    before, state = fingerprint(model), adapter_state(model)
    for tensor in state.values():
        tensor.add_(1.0)
    assert fingerprint(model) == before


@pytest.mark.parametrize("wrong", ["missing", "unexpected", "shape"])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(tiny_model: Path, wrong: str) -> None:
    model = fresh(tiny_model)
    before, state = fingerprint(model), adapter_state(tuned(tiny_model))
    last = list(state)[-1]
    if wrong == "missing":
        del state[last]
    elif wrong == "unexpected":
        state["another.weight"] = torch.zeros(1)
    else:
        state[last] = state[last][:-1]
    with pytest.raises(ValueError, match="does not fit: 1 tensors differ, the first is"):
        load_adapter_state(model, state)
    assert fingerprint(model) == before


def test_the_fingerprint_sees_any_single_weight(tiny_model: Path) -> None:
    model = fresh(tiny_model)
    seen = {fingerprint(model)}
    adapted = [p for p in model.parameters() if p.requires_grad]
    for p in adapted:
        with torch.no_grad():
            p.view(-1)[-1] = torch.nextafter(p.view(-1)[-1], torch.tensor(9.0))  # the smallest step there is
        seen.add(fingerprint(model))
    assert len(seen) == len(adapted) + 1


def test_the_fingerprint_does_not_see_the_base(tiny_model: Path) -> None:
    model = fresh(tiny_model)
    before = fingerprint(model)
    next(p for p in model.parameters() if not p.requires_grad).data.add_(1.0)
    assert fingerprint(model) == before


# What fits, and what is said of it


def test_one_target_of_three_that_fits_no_layer_is_refused_with_its_neighbours(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=r"\['v_prj', 'up_poj'\] fit no layer .* \(did you mean v_proj, up_proj\?\)"):
        fresh(tiny_model, targets=["q_proj", "v_prj", "up_poj"])


def mixture(config: type[Any], **more: Any) -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 1}
    return AutoModelForCausalLM.from_config(config(**{**sizes, "pad_token_id": 0, **more}))


def test_experts_that_are_left_out_are_said_and_an_option_takes_them() -> None:
    without = attached(attach(mixture(GptOssConfig), LoRA(r=2, alpha=4), seed=0))
    assert without.targets == ("k_proj", "o_proj", "q_proj", "v_proj")
    assert 0.5 < without.left_out["experts"] < 1
    assert "without the experts" in str(without)
    taken = attached(attach(mixture(GptOssConfig), LoRA(r=2, alpha=4, also=["experts"]), seed=0))
    assert taken.targets == ("down_proj", "gate_up_proj", "k_proj", "o_proj", "q_proj", "v_proj")
    assert not taken.left_out


def test_a_router_that_gives_more_than_a_product_is_left_out() -> None:
    model = attach(mixture(Llama4TextConfig, intermediate_size_mlp=32), LoRA(r=2, alpha=4), seed=0)
    assert not any("router" in name for name, _ in lora_layers(model))
    model(input_ids=torch.arange(5)[None])


def test_the_head_is_adapted_where_it_is_asked_for(tiny_model: Path) -> None:
    assert "lm_head" in attached(fresh(tiny_model, also=["head"])).targets
    with pytest.raises(ValueError, match=r"also \['vision'\]: this model has no such part"):
        fresh(tiny_model, also=["vision"])
