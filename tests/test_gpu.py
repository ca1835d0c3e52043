"""On an NVIDIA GPU: the completions and gradients of the CPU, bases in 4 and 8 bits, and a whole run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import cotune, fit
from cotune.datamodules.collate import Pair, collate
from cotune.inference.local.cascade import _attention, _bias, _Options
from cotune.lightning_modules import LanguageModel, LoRA
from cotune.lightning_modules.training.packing import abilities, rounds_products
from cotune.programs import Completion, Request, Sampling
from losses import completion_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

DEVICE = "cuda"
CHATS = [Request([{"role": "user", "content": f"{'hello ' * n}you"}]) for n in range(1, 20)]
PAIRS = [Pair(list(range(5, 30)), [50 + n, 60, 2]) for n in range(4)]


def loaded(model: Path, device: str, **settings: object) -> LanguageModel:
    lm = LanguageModel(str(model), device=device, lora=LoRA(r=4, alpha=8), **settings)  # type: ignore[arg-type]
    lm.load(seed=0)
    return lm


def completed(lm: LanguageModel) -> list[Completion]:
    return lm.complete(CHATS, Sampling(max_new_tokens=8, log_probs=True))


def test_completions_are_those_of_the_cpu(tiny_model: Path) -> None:
    ours, theirs = (completed(loaded(tiny_model, device)) for device in (DEVICE, "cpu"))
    equal = [a.completion_ids == b.completion_ids for a, b in zip(ours, theirs, strict=True)]
    assert sum(equal) >= len(equal) - 1  # a tie may fall otherwise
    for a, b, same in zip(ours, theirs, equal, strict=True):
        assert not same or a.log_probs == pytest.approx(b.log_probs, abs=1e-3)


@pytest.mark.parametrize("masked", ["causal", "own lengths", "all seen"])
@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_the_fused_attention_reads_what_the_cpu_does(dtype: str, close: float, masked: str) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(3, 4, 21 if masked == "causal" else 5, 16, generator=generator)
    keys, values = (torch.randn(3, 2, 21, 16, generator=generator) for _ in range(2))
    seen = torch.arange(21) <= torch.tensor([4, 20, 11])[:, None, None, None]
    found = []
    for device, kind in ((DEVICE, getattr(torch, dtype)), ("cpu", torch.float32)):
        bias = _bias(seen.to(device)) if masked == "own lengths" else None
        states = (states.to(device, kind) for states in (queries, keys, values))
        found.append(_attention(*states, bias, _Options(scale=0.25), causal=masked == "causal"))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.float().cpu(), theirs, atol=close, rtol=close)


def test_rows_are_packed_where_products_are_tf32(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    lm = loaded(tiny_model, DEVICE)
    assert rounds_products(lm.model.device)
    assert abilities(lm.model, 64).packed


def test_gradients_are_those_of_the_cpu(tiny_model: Path) -> None:
    found = []
    for device in (DEVICE, "cpu"):
        lm = loaded(tiny_model, device)
        completion_loss(lm.model, collate([PAIRS])).backward()
        trained = [p.grad.flatten().cpu() for p in lm.model.parameters() if p.grad is not None]
        found.append(torch.cat(trained))
    assert torch.linalg.vector_norm(found[0] - found[1]) < 1e-3 * torch.linalg.vector_norm(found[1])


@pytest.mark.filterwarnings("ignore:inner dimension .* is not aligned")  # the tiny model's 48; slower there, and right
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_writes_and_trains(tiny_model: Path, kind: str) -> None:
    lm = loaded(tiny_model, DEVICE, quantization=kind, dtype="bfloat16")
    assert all(done.completion_ids for done in completed(lm))
    loss = completion_loss(lm.model, collate([PAIRS]))
    loss.backward()
    assert torch.isfinite(loss)


def test_a_whole_run(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--trainer.accelerator", "gpu", "--model.lm.device", DEVICE, "--runs_dir", str(tmp_path)]
    assert cotune(fit(tiny_model, *options, schedule="p -> w"), capsys).code == 0
    assert (tmp_path / "tiny" / "export" / "program.json").is_file()
