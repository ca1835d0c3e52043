"""Logits that are not finite are an error that names the cause, and never an answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cotune.inference.local.finite import NotFiniteError, check_finite
from cotune.lightning_modules import LanguageModel, LoRA
from cotune.programs import Request, Sampling
from torch import nn

ASKED = [Request([{"role": "user", "content": "hello"}])] * 2


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.ModuleDict({"head": nn.Linear(2, 2, dtype=dtype), "lora_A": nn.Linear(2, 2)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_number_in_a_row_is_an_error(value: float) -> None:
    logits_RV = torch.zeros(3, 4)
    check_finite(logits_RV, model())
    logits_RV[1, 2] = value
    with pytest.raises(NotFiniteError, match=r"in 1 of 3 completions .* overflow in float32"):
        check_finite(logits_RV, model())


def test_tokens_that_are_ruled_out_are_no_error_while_one_is_left() -> None:
    logits_RV = torch.full((1, 4), -torch.inf)
    with pytest.raises(NotFiniteError):
        check_finite(logits_RV, model())
    logits_RV[0, 1] = 0.0
    check_finite(logits_RV, model())


def test_float16_is_named_with_what_to_take_instead() -> None:
    with pytest.raises(NotFiniteError, match=r"float16 holds no number above 65,504.*--model.lm.dtype bfloat16"):
        check_finite(torch.full((1, 4), torch.nan), model(torch.float16))


@pytest.mark.parametrize(("part", "said"), [("head", "the base are not finite, head.weight"), ("lora_A", "diverged")])
def test_weights_that_are_not_finite_are_named(part: str, said: str) -> None:
    broken = model()
    with torch.no_grad():
        broken.get_parameter(f"{part}.weight").fill_(torch.nan)
    with pytest.raises(NotFiniteError, match=said):
        check_finite(torch.full((1, 4), torch.nan), broken)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_generation_stops_at_the_first_batch(tiny_model: Path, temperature: float) -> None:
    lm = LanguageModel(str(tiny_model), lora=LoRA(r=2, alpha=2), device="cpu")
    lm.load(seed=0)
    with torch.no_grad():
        lm.model.get_output_embeddings().weight[5] = torch.inf
    with pytest.raises(NotFiniteError, match="weights of the base"):
        lm.complete(ASKED, Sampling(temperature=temperature, max_new_tokens=2))
