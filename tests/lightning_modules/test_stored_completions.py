"""Claims about an LM that keeps its completions: it answers as one that does not, and generates nothing twice."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cotune.lightning_modules import LanguageModel, LoRA
from cotune.lightning_modules.lora import lora_layers
from cotune.programs import Request, Sampling
from cotune.programs.layout import Field

UNTIL_E = (Field("text", stops=("e",)),)
GREEDY = Sampling(max_new_tokens=5)
DRAWN = Sampling(temperature=1.0, max_new_tokens=5)


class Watched(LanguageModel):
    """Knows how many prompts each wave had generated."""

    def load(self, *, seed: int = 0) -> None:
        super().load(seed=seed)
        if hasattr(self, "waves"):
            return
        self.waves: list[int] = []
        engine = self.completing.engine
        generate = engine.generate

        def watched(prompts: Any, sampling: Sampling, *, adapter: str) -> Any:
            self.waves.append(len(prompts))
            return generate(prompts, sampling, adapter=adapter)

        engine.generate = watched  # type: ignore[method-assign]


def loaded(model: Path, store: Path | None, *, seed: int = 0, **settings: Any) -> Watched:
    options: dict[str, Any] = {"lora": LoRA(r=4, alpha=8), "device": "cpu", **settings}
    lm = Watched(str(model), completions=None if store is None else str(store), **options)
    lm.load(seed=seed)
    return lm


def asked(count: int, first: int = 0) -> list[Request]:
    return [Request([{"role": "user", "content": f"Question {i}"}], seed=i) for i in range(first, first + count)]


def disturb(lm: LanguageModel, by: float = 0.1) -> None:
    """Gives the adapter something to say."""
    with torch.no_grad():
        for _, layer in lora_layers(lm.model):
            layer.lora_B["default"].weight.add_(by)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "completions.sqlite"


def test_a_second_process_generates_nothing_and_counts_what_was_asked(tiny_model: Path, store: Path) -> None:
    first, second, without = (loaded(tiny_model, path) for path in (store, store, None))
    requests = [*asked(6), *asked(2)]
    answers = [lm.complete(requests, DRAWN) for lm in (first, second, without)]
    assert answers[0] == answers[1] == answers[2]
    assert (first.waves, second.waves, without.waves) == ([6], [], [6]), "equal requests are generated once"
    usages = [asdict(lm.usage) for lm in (first, second, without)]
    assert [usage.pop("cached") for usage in usages] == [2, 8, 2]
    for usage in usages:
        del usage["seconds"]
    assert usages[0] == usages[1] == usages[2]
    assert usages[0]["calls"] == 8


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_only_what_decides_a_completion_makes_it_another(tiny_model: Path, store: Path, sampling: Sampling) -> None:
    lm = loaded(tiny_model, store)
    lm.complete(asked(3), sampling)
    others = [replace(request, seed=request.seed + 100) for request in asked(3)]
    lm.complete(others, sampling)
    assert lm.waves == ([3] if sampling is GREEDY else [3, 3]), "a seed decides only where something is drawn"
    lm.complete([replace(request, layout=UNTIL_E) for request in asked(3)], sampling)
    lm.complete(asked(3), Sampling(temperature=sampling.temperature, max_new_tokens=4))
    assert lm.waves[-2:] == [3, 3]


def test_untrained_adapters_share_completions_and_trained_ones_do_not(tiny_model: Path, store: Path) -> None:
    first, second = loaded(tiny_model, store, seed=0), loaded(tiny_model, store, seed=1)
    assert first.fingerprint() != second.fingerprint()
    assert first.complete(asked(3), GREEDY) == second.complete(asked(3), GREEDY)
    assert second.waves == []
    untrained = first.adapter_state()
    disturb(first)
    first.complete(asked(3), GREEDY)
    disturb(second)
    second.complete(asked(3), GREEDY)
    assert (first.waves, second.waves) == ([3, 3], [3]), "B is equal, A is not"
    first.load_adapter_state(untrained)
    first.complete(asked(3), GREEDY)
    assert first.waves == [3, 3]


@pytest.mark.parametrize("settings", [{"lora": LoRA(r=4, alpha=16)}, {"merge_while_generating": False}])
def test_how_an_adapter_is_applied_is_part_of_what_it_is(
    settings: dict[str, Any], tiny_model: Path, store: Path
) -> None:
    lms = [loaded(tiny_model, store), loaded(tiny_model, store, **settings)]
    for lm in lms:
        disturb(lm)
        lm.complete(asked(2), GREEDY)
    assert [lm.waves for lm in lms] == [[2], [2]]


def test_an_optimiser_step_makes_another_adapter(tiny_model: Path, store: Path) -> None:
    lm = loaded(tiny_model, store)
    parameters = [p for p in lm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    before = lm.adapter_state()
    lm.complete(asked(1), GREEDY)
    optimizer.step()
    lm.complete(asked(1), GREEDY)
    assert lm.waves == [1, 1]
    assert any(not torch.equal(before[name], tensor) for name, tensor in lm.adapter_state().items())


class PastAutograd(torch.optim.SGD):
    """Writes as the optimisers of bitsandbytes do: no tensor's version counts up."""

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data.add_(0.1)


@pytest.mark.parametrize("merge", [True, False])
def test_what_an_optimiser_writes_past_autograd_is_what_generates(tiny_model: Path, store: Path, merge: bool) -> None:
    lm, other = (loaded(tiny_model, path, merge_while_generating=merge) for path in (store, None))
    requests = asked(6)
    before = lm.complete(requests, GREEDY)
    for one in (lm, other):
        PastAutograd([p for p in one.model.parameters() if p.requires_grad], lr=1.0).step()
    after = lm.complete(requests, GREEDY)
    assert after != before
    assert [c.text for c in after] == [c.text for c in other.complete(requests, GREEDY)]


def test_other_weights_under_the_same_path_are_another_base(tiny_model: Path, store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    first = loaded(folder, store)
    first.complete(asked(2), GREEDY)
    name = first.base_identity()
    assert name == loaded(tiny_model, None).base_identity(), "the content counts, not the place"
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    second = loaded(folder, store)
    second.complete(asked(2), GREEDY)
    assert second.waves == [2]
    assert second.base_identity() != name


def test_a_call_broken_off_goes_on_at_the_wave_where_it_stopped(
    tiny_model: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cotune.inference.engine.WAVE", 4)
    whole = loaded(tiny_model, None)
    expected = whole.complete(asked(10), DRAWN)
    first = loaded(tiny_model, store)

    def stop() -> None:
        if len(first.waves) == 2:
            raise KeyboardInterrupt

    first.before_wave = stop
    with pytest.raises(KeyboardInterrupt):
        first.complete(asked(10), DRAWN)
    assert first.usage.calls == 0, "a call counts once it is answered"
    second = loaded(tiny_model, store)
    assert second.complete(asked(10), DRAWN) == expected
    assert (whole.waves, first.waves, second.waves) == ([4, 4, 2], [4, 4], [2])
    assert second.usage.calls == 10


def test_a_wave_holds_what_is_missing_of_it_whatever_is_asked_beside(
    tiny_model: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cotune.inference.engine.WAVE", 4)
    lm = loaded(tiny_model, store)
    lm.complete(asked(2, first=4), GREEDY)
    lm.complete(asked(10), GREEDY)
    assert sum(lm.waves) == 10
    assert max(lm.waves) <= 4


def test_off_and_null_keep_nothing(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    requests: Sequence[Request] = asked(2)
    for completions in (None, "off", ""):
        lm = Watched(str(tiny_model), completions=completions, lora=LoRA(r=4), device="cpu")
        lm.load()
        lm.complete(requests, GREEDY)
        lm.complete(requests, GREEDY)
        assert lm.waves == [2, 2]
    assert not list(tmp_path.iterdir())
