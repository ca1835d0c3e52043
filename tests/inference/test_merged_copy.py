"""The merged copy: it says what base and adapter say, follows the adapter, and never touches the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import IDS, base_weights, bytes_of, fresh, logits, tuned
from cotune.inference.local.merged_copy import MergedCopy, base_alone
from cotune.lightning_modules.lora import adapter_state, load_adapter_state, lora_layers, reset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_merged_logits_are_those_of_base_and_adapter(tiny_model: Path, dtype: torch.dtype, tolerance: float) -> None:
    model, merged = tuned(tiny_model, dtype=dtype), MergedCopy()
    apart = logits(model)
    with merged.swapped(model):
        together = logits(model)
    assert (together - apart).abs().max() <= tolerance * apart.abs().max()
    with model.disable_adapter():
        without = logits(model)
    assert (apart - without).abs().max() > 0.1 * apart.abs().max()  # the adapter does matter here


def test_the_adapter_is_not_added_a_second_time_while_swapped(tiny_model: Path) -> None:
    model, merged = tuned(tiny_model), MergedCopy()
    _, layer = lora_layers(model)[0]
    calls: list[int] = []
    hook = layer.lora_A["default"].register_forward_hook(lambda *_: calls.append(1))
    with merged.swapped(model):
        logits(model)
    assert not calls
    logits(model)
    hook.remove()
    assert calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_switches_leave_the_base_where_and_what_it_was(tiny_model: Path, dtype: torch.dtype) -> None:
    model, merged = tuned(tiny_model, dtype=dtype), MergedCopy()
    pointers = {name: p.data_ptr() for name, p in base_weights(model).items()}
    content, said = bytes_of(base_weights(model)), logits(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for turn in range(30):
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).add_(0.0)  # written to, so the copy is made anew
        if turn % 10 == 0:
            with pytest.raises(RuntimeError, match="inside"), merged.swapped(model):
                raise RuntimeError("inside")
        else:
            with merged.swapped(model):
                pass
        optimizer.step()
    assert {name: p.data_ptr() for name, p in base_weights(model).items()} == pointers
    assert bytes_of(base_weights(model)) == content
    assert torch.equal(logits(model), said)


def test_gradients_of_the_adapter_flow_after_switching(tiny_model: Path) -> None:
    model, merged = tuned(tiny_model), MergedCopy()
    with merged.swapped(model), torch.inference_mode():
        model(input_ids=IDS)
    model(input_ids=IDS, labels=IDS).loss.backward()
    adapted = [p for p in model.parameters() if p.requires_grad]
    assert len(adapted) == 28
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in adapted)
    assert all(p.grad is None for p in base_weights(model).values())


def agrees(model: Any, merged: MergedCopy) -> bool:
    with merged.swapped(model):
        together = logits(model)
    return bool(torch.allclose(together, logits(model), atol=1e-4))


@pytest.mark.parametrize("foreach", [False, True])
def test_the_copy_follows_an_optimiser_step(tiny_model: Path, foreach: bool) -> None:
    model, merged = tuned(tiny_model), MergedCopy()
    assert agrees(model, merged)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, foreach=foreach)
    for _ in range(2):
        before = logits(model)
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        assert (logits(model) - before).abs().max() > 0.1
        assert agrees(model, merged)


def test_the_copy_follows_a_loaded_state_and_a_reset(tiny_model: Path) -> None:
    model, merged = tuned(tiny_model), MergedCopy()
    first = adapter_state(model)
    assert agrees(model, merged)
    reset(model, seed=0)
    assert agrees(model, merged)
    load_adapter_state(model, first)
    assert agrees(model, merged)


def test_the_copy_is_not_made_anew_for_nothing(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, merged = tuned(tiny_model), MergedCopy()
    made: list[int] = []
    _, layer = lora_layers(model)[0]
    delta = layer.get_delta_weight
    monkeypatch.setattr(layer, "get_delta_weight", lambda adapter: made.append(1) or delta(adapter))
    for _ in range(3):
        with merged.swapped(model):
            logits(model)
    assert len(made) == 1


def test_a_copy_made_in_inference_mode_is_renewed_outside_of_it(tiny_model: Path) -> None:
    # Lightning validates in inference mode; the weight step's next traces are collected outside of it.
    model, merged = tuned(tiny_model), MergedCopy()
    with torch.inference_mode(), merged.swapped(model):
        model(input_ids=IDS)
    reset(model, seed=9)
    assert agrees(model, merged)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_copy_follows_a_change_of_dtype(tiny_model: Path) -> None:
    model, merged = tuned(tiny_model), MergedCopy()
    assert agrees(model, merged)
    model.double()
    with merged.swapped(model):
        assert model(input_ids=IDS).logits.dtype == torch.float64
    assert agrees(model, merged)


def test_layers_and_head_compute_as_they_did_before_once_the_copy_is_out(tiny_model: Path) -> None:
    model, merged = tuned(tiny_model), MergedCopy()
    (_, first), (_, second) = lora_layers(model)[:2]
    own = first.forward = lambda x: type(first).forward(first, x)
    with merged.swapped(model):
        assert "forward" in vars(model.get_output_embeddings())
    assert first.forward is own
    assert not {"forward"} & (vars(second).keys() | vars(model.get_output_embeddings()).keys())


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_the_laid_out_head_gives_the_plain_head_s_logits(tiny_model: Path, rows: int) -> None:
    model, merged = tuned(tiny_model), MergedCopy()
    head = model.get_output_embeddings()
    hidden = torch.randn(1, rows, head.in_features)
    with torch.no_grad(), merged.swapped(model):
        found = head(hidden)
    torch.testing.assert_close(found, head(hidden), rtol=1e-5, atol=1e-5)


def test_on_a_cpu_layers_without_an_adapter_are_laid_out_too(tiny_model: Path) -> None:
    model, merged = fresh(tiny_model, targets=["q_proj"]).eval(), MergedCopy()
    layer = model.base_model.model.model.layers[0]
    with merged.swapped(model):
        assert all("forward" in vars(part) for part in (layer.self_attn.q_proj, layer.mlp.up_proj))
    assert agrees(model, merged)
    assert "forward" not in vars(layer.mlp.up_proj)


def test_the_base_alone_knows_nothing_of_a_head_that_is_trained_whole(tiny_model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = logits(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])).eval()
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    assert not torch.allclose(logits(model), expected)
    with base_alone(model):
        assert torch.equal(logits(model), expected)
