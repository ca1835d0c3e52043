"""The adapter: where it sits, what decides its values, and a merged copy that never touches the base."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from cotune.lightning_modules import LoRA
from cotune.lightning_modules.lora import (
    MergedCopy,
    adapter_state,
    attach,
    fingerprint,
    load_adapter_state,
    lora_layers,
    reset,
)
from transformers import AutoModelForCausalLM

IDS = torch.tensor([[5, 9, 200, 31, 7, 77, 120]])


def fresh(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **shape: Any) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return attach(base, LoRA(**{"r": 4, "alpha": 8, **shape}), seed=seed)


def tuned(folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose adapter changes what it says."""
    model = fresh(folder, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            weight = layer.lora_B["default"].weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    return model


def base_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if not p.requires_grad}


def bytes_of(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(t.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in tensors.items()
    }


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


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


# The merged copy


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
def test_a_hundred_switches_leave_the_base_where_and_what_it_was(tiny_model: Path, dtype: torch.dtype) -> None:
    model, merged = tuned(tiny_model, dtype=dtype), MergedCopy()
    pointers = {name: p.data_ptr() for name, p in base_weights(model).items()}
    content, said = bytes_of(base_weights(model)), logits(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for turn in range(100):
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


def test_freeing_gives_the_memory_back_and_the_copy_comes_again(tiny_model: Path) -> None:
    model, merged = tuned(tiny_model), MergedCopy()
    assert agrees(model, merged)
    merged.free()
    assert not merged._copies
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
