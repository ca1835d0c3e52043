"""On a real vLLM server of the embedded model, with faults before it: nothing foreign is kept.

COTUNE_VLLM is the server's address; it is started as docs/engines.md says, with --max-lora-rank 32 and in float32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from cotune.inference.local import LocalEngine
from cotune.inference.vllm import VLLMError, VLLMServer
from cotune.lightning_modules import LanguageModel, LoRA
from cotune.lightning_modules.lora import lora_layers
from cotune.programs import Request, Sampling
from cotune.programs.layout import Choices, Field, Fixed, Layout
from vllm_server import Fault, VLLMProxy

URL = os.environ.get("COTUNE_VLLM", "")
pytestmark = pytest.mark.skipif(not URL, reason="COTUNE_VLLM names no vLLM server of the embedded model")

SPECIES = Choices(("setosa", "versicolor", "virginica"))
FORM: Layout = (
    Field("why", stops=("\n",), max_tokens=6),
    Fixed("\nanswer:"),
    Field("answer", " ", syntax=SPECIES),
)
REQUESTS = [
    Request([{"role": "user", "content": f"Classify the flower: petal length {1 + i / 2:.1f}."}], layout=FORM)
    for i in range(6)
]
GREEDY = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def lm() -> Iterator[LanguageModel]:
    made = LanguageModel(device="cpu", lora=LoRA(r=8, alpha=16))
    made.load(seed=0)
    yield made
    made.close()


@pytest.fixture
def proxies() -> Iterator[list[VLLMProxy]]:
    (base,) = [one["id"] for one in httpx2.get(f"{URL}/v1/models").json()["data"] if not one["parent"]]
    made = [VLLMProxy(URL, base) for _ in range(3)]
    yield made
    for proxy in made:
        proxy.end()


def begin(lm: LanguageModel, proxies: list[VLLMProxy], tmp_path: Path, seed: int) -> None:
    """New weights, an empty store, and the engine; its folder is where the server can read it."""
    train(lm, seed)
    lm.keep_completions(tmp_path / "completions.sqlite")
    lm.use(VLLMServer([proxy.url for proxy in proxies], adapters=str(tmp_path / "adapters"), patience=5.0))


def train(lm: LanguageModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in lora_layers(lm.model):
            weight = layer.lora_B["default"].weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)


def texts(lm: LanguageModel) -> list[str]:
    return [done.text for done in lm.complete(REQUESTS, GREEDY)]


def here(lm: LanguageModel) -> list[str]:
    served, lm.completing.engine = lm.completing.engine, LocalEngine()
    lm.completing.engine.start(lm)
    found = texts(lm)
    lm.completing.engine = served
    return found


def once(proxy: VLLMProxy, fault: Fault, nth: int) -> None:
    left, start = iter([fault]), len(proxy.completions())

    def answer(path: str, body: Mapping[str, Any]) -> Fault | None:
        of_a_row = path == "/v1/completions" and "prompt_logprobs" not in body
        return next(left, None) if of_a_row and len(proxy.completions()) >= start + nth else None

    proxy.fault = answer


def test_foreign_weights_and_answers_without_ids_end_it_and_nothing_is_kept(
    lm: LanguageModel, proxies: list[VLLMProxy], tmp_path: Path
) -> None:
    (proxy, *_) = proxies
    begin(lm, [proxy], tmp_path, 1)
    (before,) = proxy.adapters
    train(lm, 2)
    lm.complete(REQUESTS[:1], GREEDY)
    now, paid = list(proxy.adapters)[-1], lm.paid.calls
    for answering in (proxy.base, before):
        proxy.answers_as[now] = answering
        with pytest.raises(VLLMError, match=f'"{answering}" is what it answers like'):
            texts(lm)
    proxy.answers_as.clear()
    for fault, error in (
        (Fault(choice={"token_ids": None}), "no ids"),
        (Fault(choice={"prompt_token_ids": [1, 2]}), "those of another prompt"),
        (Fault(changes={"model": "other"}), "another model"),
    ):
        once(proxy, fault, nth=5)
        with pytest.raises(VLLMError, match=error):
            texts(lm)
    proxy.fault = lambda path, body: None
    assert lm.paid.calls == paid
    assert texts(lm) == here(lm)


def test_resets_evictions_and_restarts_in_a_wave_change_no_token(
    lm: LanguageModel, proxies: list[VLLMProxy], tmp_path: Path
) -> None:
    (proxy, *_) = proxies
    begin(lm, [proxy], tmp_path, 3)
    expected = here(lm)
    for fault in (Fault(reset=True), Fault(half=True), Fault(status=503, text="busy")):
        lm.keep_completions(None)
        once(proxy, fault, nth=5)
        assert texts(lm) == expected
    seen, loads = len(proxy.completions()), len(proxy.loads())

    def evict(path: str, body: Mapping[str, Any]) -> None:
        if len(proxy.completions()) > seen + 5 and len(proxy.loads()) == loads:
            proxy.forget()

    proxy.fault = evict
    assert texts(lm) == expected
    assert len(proxy.loads()) > loads
    proxy.fault = lambda path, body: None
    proxy.restart()
    assert texts(lm) == expected


def test_two_of_three_can_go(lm: LanguageModel, proxies: list[VLLMProxy], tmp_path: Path) -> None:
    begin(lm, proxies, tmp_path, 4)
    expected = here(lm)
    lm.keep_completions(None)
    for proxy in proxies[:2]:
        start = len(proxy.completions())

        def leave(path: str, body: Mapping[str, Any], proxy: VLLMProxy = proxy, start: int = start) -> Fault | None:
            return Fault(reset=True) if len(proxy.completions()) > start + 1 else None

        proxy.fault = leave
    assert texts(lm) == expected
    assert all(len(proxy.completions()) > 1 for proxy in proxies)
