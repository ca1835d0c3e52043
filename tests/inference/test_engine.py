"""The seam between an LM and what completes its prompts: own engines, adapters by name, stores at either level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cotune.inference import StoredLM
from cotune.inference.local import LocalEngine
from cotune.lightning_modules import LanguageModel, LoRA, ProgramModule
from cotune.lightning_modules.lora import lora_layers
from cotune.programs import Completion, Request, Sampling
from cotune.programs.layout import FREE, Choices, Field, Fixed, Layout
from fakes import FakeLM, Loop
from own_engine import PlainEngine
from transformers import AutoModelForCausalLM

FORM: Layout = (Field("why", max_tokens=6), Fixed("\nanswer:"), Field("a", " ", syntax=Choices(("yes", "no"))))
GREEDY = Sampling(max_new_tokens=12)


def loaded(folder: Path, **settings: Any) -> LanguageModel:
    lm = LanguageModel(str(folder), device="cpu", lora=LoRA(r=4, alpha=8), **settings)
    lm.load(seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in lora_layers(lm.model):
            weight = layer.lora_B["default"].weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return lm


def asked(count: int = 3, **settings: Any) -> list[Request]:
    return [Request([{"role": "user", "content": f"Question {i}"}], **settings) for i in range(count)]


def test_an_engine_of_ones_own_writes_the_same(tiny_model: Path) -> None:
    own, local = loaded(tiny_model), loaded(tiny_model)
    own.use(PlainEngine())
    requests = [*asked(layout=FORM), *asked(layout=FREE), *asked(1, layout=(Field("a", stops=("e",)),))]
    found = own.complete(requests, GREEDY)
    expected = local.complete(requests, GREEDY)
    assert [replace(done, forced=()) for done in found] == [replace(done, forced=()) for done in expected]
    assert [done.forced for done in found[:3]] == [done.forced for done in expected[:3]]


@pytest.mark.parametrize("kind", ["merged", "unmerged", "own"])
def test_what_is_written_does_not_depend_on_mixed_precision_around_it(tiny_model: Path, kind: str) -> None:
    """Lightning's is on in validation, and off in searches and collections."""
    lm, mixed = (loaded(tiny_model, merge_while_generating=kind == "merged") for _ in range(2))
    if kind == "own":
        lm.use(PlainEngine())
        mixed.use(PlainEngine())
    requests = [*asked(layout=FORM, scores=True, chances=True), *asked(1, adapter="")]
    expected = lm.complete(requests, GREEDY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mixed.complete(requests, GREEDY) == expected


def test_engines_do_not_share_completions(tiny_model: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "completions.sqlite")
    local, own = loaded(tiny_model, completions=store), loaded(tiny_model, completions=store)
    local.complete(asked(), GREEDY)
    own.use(PlainEngine())
    own.complete(asked(), GREEDY)
    own.complete(asked(), GREEDY)
    assert (own.usage.calls, own.usage.cached) == (6, 3)


@pytest.mark.parametrize("merged", [True, False])
def test_a_request_names_who_answers_the_adapter_or_the_base_alone(
    tiny_model: Path, tmp_path: Path, merged: bool
) -> None:
    settings = {"completions": str(tmp_path / "completions.sqlite"), "merge_while_generating": merged}
    lm = loaded(tiny_model, **settings)
    before = {name: (vars(module).get("forward"), module.training) for name, module in lm.model.named_modules()}
    both = [request for pair in zip(asked(4), asked(4, adapter=""), strict=True) for request in pair]
    found = lm.complete(both, GREEDY)
    assert {name: (vars(m).get("forward"), m.training) for name, m in lm.model.named_modules()} == before
    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    for tuned, alone in zip(found[::2], found[1::2], strict=True):
        assert list(alone.completion_ids) == continued(base, alone.prompt_ids)
        assert list(tuned.completion_ids) == continued(lm.model.eval(), tuned.prompt_ids)
        assert tuned != alone
    again = loaded(tiny_model, **settings)
    assert again.complete(both, GREEDY) == found
    assert again.usage.cached == 8


def continued(model: Any, prompt: Sequence[int]) -> list[int]:
    ids = torch.tensor([list(prompt)])
    written = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    return list(written[0, len(prompt) :].tolist())


def test_an_adapter_that_is_not_there_is_named(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match='there is no adapter "other"; use "default", or "" for the base alone'):
        loaded(tiny_model).complete(asked(1, adapter="other"), GREEDY)


def test_settings_of_the_lm_reach_its_engine(tiny_model: Path) -> None:
    engine = loaded(tiny_model, cache_tokens=77, keep_prompts=True, merge_while_generating=False).completing.engine
    assert isinstance(engine, LocalEngine)
    assert (engine.cache_tokens, engine.keep_prompts, engine.merge_while_generating) == (77, True, False)


def test_a_run_selects_its_engine(tiny_model: Path) -> None:
    lm = LanguageModel(str(tiny_model), device="cpu", lora=LoRA(r=4, alpha=8))
    engine = PlainEngine()
    module = ProgramModule(Loop(), lm, engine=engine)
    module.configure_model()
    assert lm.completing.engine is engine
    assert lm.complete(asked(1), GREEDY)[0].completion_ids


# The store around an LM without ids


def test_an_lm_without_ids_is_asked_once_for_each_request(tmp_path: Path) -> None:
    inner = FakeLM(lambda request: Completion(request.messages[-1]["content"] + "!", finished="stop"))
    store = str(tmp_path / "completions.sqlite")
    lm = StoredLM(inner, store, identity={"model": "some", "url": "here"})
    first = lm.complete([*asked(3), *asked(1)], GREEDY)
    assert [done.text for done in first] == ["Question 0!", "Question 1!", "Question 2!", "Question 0!"]
    assert lm.complete([*asked(3), *asked(1)], GREEDY) == first
    assert inner.calls == 3
    warm = Sampling(temperature=1.0, max_new_tokens=12)
    for requests, sampling in (
        (asked(1, layout=FORM), GREEDY),
        (asked(1, adapter="b"), GREEDY),
        (asked(1), warm),
        (asked(1, seed=4), warm),
    ):
        calls = inner.calls
        lm.complete(requests, sampling)
        assert inner.calls == calls + 1
    lm.complete(asked(1, seed=9), GREEDY)
    assert inner.calls == 8, "a second opinion may be wanted where nothing is drawn, too"
    StoredLM(inner, store, identity={"model": "other"}).complete(asked(1), GREEDY)
    assert inner.calls == 9
    with pytest.raises(ValueError, match="FakeLM has no `identity`"):
        StoredLM(inner, store)


def test_a_refused_request_is_not_kept(tmp_path: Path) -> None:
    answers = iter([Completion("", finished="refused"), Completion("now", finished="eos")])
    inner = FakeLM(lambda request: next(answers))
    lm = StoredLM(inner, str(tmp_path / "completions.sqlite"), identity={"model": "some"})
    assert [lm.complete(asked(1), GREEDY)[0].text for _ in range(3)] == ["", "now", "now"]
    assert inner.calls == 2
