"""Quantised bases: what is refused before a weight is read, and checkpoints that come quantised."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cotune.datamodules.collate import Pair, collate
from cotune.lightning_modules import LanguageModel, LoRA, ModelNotFoundError, ProgramModule, quantization
from cotune.lightning_modules.objectives import Rejection
from cotune.lightning_modules.quantization import FORMATS, QuantizationError, check_trainable, quantized_as, refusal
from cotune.lightning_modules.training.gradients import BatchGradients, Computed
from cotune.programs import Predict, Request, Sampling
from cotune.programs.ranks import Ranks
from lightning.pytorch.plugins import BitsandbytesPrecision
from losses import completion_loss
from side_by_side import side_by_side
from tiny import save_wide_model

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")


def saved_quantised(folder: Path, wide: Path, kind: str, *, double: bool = False) -> Path:
    """A folder as others publish them: weights quantised by bitsandbytes, computing in bf16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    if why := refusal(kind, "cpu"):
        pytest.skip(f"bitsandbytes refuses {kind} here: {why}")
    four_bit = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": torch.bfloat16}
    config = BitsAndBytesConfig(
        **({"load_in_8bit": True} if kind == "int8" else {**four_bit, "bnb_4bit_use_double_quant": double})
    )
    model = AutoModelForCausalLM.from_pretrained(wide, quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(wide).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wide_model(tmp_path_factory.mktemp("wide"))


def gradients(lm: LanguageModel) -> list[torch.Tensor]:
    prompt = lm.encode([{"role": "user", "content": "What is it?"}])
    completion_loss(lm.model, collate([[Pair(prompt, [50, 60, 2])]])).backward()
    return [p.grad for name, p in lm.model.named_parameters() if "lora_B" in name]


@pytest.mark.parametrize(("kind", "double"), [("nf4", False), ("nf4", True), ("fp4", False), ("int8", False)])
def test_a_checkpoint_that_is_quantised_already_generates_and_trains(
    wide_model: Path, tmp_path: Path, kind: str, double: bool
) -> None:
    lm = LanguageModel(
        str(saved_quantised(tmp_path / "saved", wide_model, kind, double=double)), device="cpu", lora=LoRA(r=4)
    )
    lm.load()
    assert lm.complete([Request([{"role": "user", "content": "a"}])], Sampling(max_new_tokens=4))[0].completion_ids
    assert all(g is not None and bool(g.abs().sum() > 0) for g in gradients(lm))
    assert quantized_as(lm.config) == f"bitsandbytes {kind}" + (" with double quantisation" if double else "")


def test_each_process_with_its_own_quantised_copy_gets_the_gradients_of_one(wide_model: Path) -> None:
    if why := refusal("nf4", "cpu"):
        pytest.skip(f"bitsandbytes refuses nf4 here: {why}")

    lms = [LanguageModel(str(wide_model), device="cpu", quantization="nf4", lora=LoRA(r=4)) for _ in range(3)]
    for lm in lms:
        lm.load(seed=0)
    prompt = lm.encode([{"role": "user", "content": "What is it?"}])
    batch = collate([[Pair(prompt, [50 + i] * (1 + i)) for i in range(5)]])  # of unequal lengths, and an odd number

    def compute(ranks: Ranks, model: Any) -> Computed:
        computing = BatchGradients(slices=8)
        computing.ranks = ranks
        return computing.compute(model, [p for p in model.parameters() if p.requires_grad], batch, Rejection())

    alone = compute(Ranks(), lms[2].model)
    for one in side_by_side(2, lambda ranks: compute(ranks, lms[ranks.index].model)):
        assert isinstance(one, Computed), one
        assert all(torch.equal(a, b) for a, b in zip(one.gradients, alone.gradients, strict=True))


def test_such_a_checkpoint_computes_in_the_dtype_that_is_asked_for(wide_model: Path, tmp_path: Path) -> None:
    # It was saved to compute in bf16; float32 must still be what float32 means elsewhere.
    folder = saved_quantised(tmp_path / "saved", wide_model, "nf4")
    for dtype in ("float32", "bfloat16"):
        lm = LanguageModel(str(folder), device="cpu", dtype=dtype, lora=LoRA(r=4))
        lm.load()
        layers = [m for m in lm.model.modules() if hasattr(m, "compute_dtype")]
        assert {str(layer.compute_dtype) for layer in layers} == {f"torch.{dtype}"}
        assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_quantising_what_is_quantised_is_refused_and_not_ignored(wide_model: Path, tmp_path: Path) -> None:
    folder = saved_quantised(tmp_path / "saved", wide_model, "int8")
    with pytest.raises(QuantizationError, match=r"quantised already \(bitsandbytes int8\), so quantization nf4 cannot"):
        LanguageModel(str(folder), device="cpu", quantization="nf4").load()


@pytest.mark.parametrize("kind", ["int8", None])
def test_double_quantisation_without_four_bits_is_refused(kind: Any) -> None:
    with pytest.raises(QuantizationError, match=r"Set model\.lm\.quantization to nf4 or fp4"):
        LanguageModel(quantization=kind, double_quantization=True)


def test_a_device_that_cannot_run_the_format_is_refused_in_its_own_words(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "refusal", lambda kind, device: f"no {kind} on {device}")
    with pytest.raises(QuantizationError, match=r"cannot run int8 on cpu here: no int8 on cpu\. .*cotune doctor"):
        LanguageModel(str(tiny_model), device="cpu", quantization="int8").load()


def test_a_format_is_tried_without_moving_the_generator() -> None:
    pytest.importorskip("bitsandbytes")
    before = torch.random.get_rng_state()
    assert [refusal.__wrapped__(kind, "cpu") for kind in FORMATS] == [""] * 3
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_a_reason() -> None:
    assert "CUDA" in refusal("nf4", "cuda") or "NVIDIA" in refusal("nf4", "cuda")


def test_a_quantiser_without_gradients_is_refused() -> None:
    config = SimpleNamespace(quantization_config={"quant_method": "mxfp4"})
    base = SimpleNamespace(config=config, hf_quantizer=SimpleNamespace(is_trainable=False))
    with pytest.raises(QuantizationError, match="is quantised as mxfp4, which transformers cannot train"):
        check_trainable("some/model", base)


def test_lightnings_plugin_is_refused_with_what_to_set_instead() -> None:
    module = ProgramModule(Predict("question -> answer"), LanguageModel())
    plugin = BitsandbytesPrecision.__new__(BitsandbytesPrecision)  # without a GPU no Trainer takes it
    module.trainer = SimpleNamespace(precision_plugin=plugin)  # type: ignore[assignment]
    with pytest.raises(QuantizationError, match=r"Leave the plugin out .* set model\.lm\.quantization"):
        module.setup("fit")


def test_a_gguf_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "half.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match=r"half\.gguf is no GGUF file that transformers can read"):
        LanguageModel(str(tmp_path / "half.gguf")).load()


def test_what_bitsandbytes_says_in_vain_is_not_shown_and_the_rest_is(
    wide_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="bitsandbytes")  # the command line has it at ERROR
    folder = saved_quantised(tmp_path / "saved", wide_model, "int8")
    lm = LanguageModel(str(folder), device="cpu", lora=LoRA(r=4))
    lm.load()
    lm.complete([Request([{"role": "user", "content": "a"}])], Sampling(max_new_tokens=2))
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]
    logging.getLogger("bitsandbytes.autograd._functions").warning("something else")
    assert "something else" in caplog.text
