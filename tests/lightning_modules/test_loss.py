"""The completion loss: computed over shared prefixes, equal to computing it row by row."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from cotune.datamodules.collate import Pair, collate
from cotune.lightning_modules import LoRA
from cotune.lightning_modules.findings import Findings, Way, findings, remember
from cotune.lightning_modules.lora import attach
from cotune.lightning_modules.training import loss, packed_attention, packing
from cotune.lightning_modules.training.fused import fuse_adapter
from cotune.lightning_modules.training.packing import Abilities
from losses import completion_loss, row_losses
from transformers import AutoModelForCausalLM


def row_by_row(model: Any, pairs: Sequence[Pair]) -> torch.Tensor:
    """No prefix, no padding, no cache: each row through the plain model, the mean over all completions' tokens."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for pair in pairs:
        prompt, completion = list(pair.prompt_ids), list(pair.completion_ids)
        logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0].double()
        scores = torch.log_softmax(logits, dim=-1)
        for at, token in enumerate(completion, start=len(prompt) - 1):
            total = total - scores[at, token]
            count += 1
    return total / count


def ids(length: int, seed: int) -> list[int]:
    return torch.randint(3, 259, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def family(shared: int, shape: Sequence[tuple[int, int]], seed: int) -> list[Pair]:
    """Pairs whose prompts share `shared` tokens; (own prompt tokens, completion tokens) of each."""
    prefix = ids(shared, seed)
    return [
        Pair(prefix + ids(own, seed + 10 * i + 1), ids(new, seed + 10 * i + 2)) for i, (own, new) in enumerate(shape)
    ]


GROUPS: dict[str, list[list[Pair]]] = {
    "one segment": [family(30, [(5, 3), (5, 3)], 1)],
    "uneven lengths": [family(40, [(1, 1), (17, 9), (6, 20)], 100)],
    "nothing shared": [family(0, [(4, 2), (9, 7), (1, 12)], 200)],
    "several segments": [family(25, [(3, 4), (8, 1)], 300), family(0, [(6, 6)], 400), family(12, [(2, 9)] * 3, 500)],
    "one row": [family(0, [(12, 5)], 600)],
    "identical prompts": [[Pair(ids(20, 7), ids(4, 8)), Pair(ids(20, 7), ids(6, 9))]],
    "a prompt that is a prefix of another": [[Pair(ids(20, 7), ids(4, 8)), Pair(ids(20, 7)[:5], ids(6, 9))]],
}


@pytest.fixture(scope="module")
def model(tiny_model: Any) -> Any:
    model = attach(AutoModelForCausalLM.from_pretrained(tiny_model), LoRA(r=4), seed=0).train()
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model


@pytest.fixture(scope="module")
def exact(model: Any) -> Any:
    """The same model in fp64, where what differs is arithmetic and not rounding."""
    import copy

    return copy.deepcopy(model).double()


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    adapted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(adapted, torch.autograd.grad(loss, list(adapted.values())), strict=True))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


WAYS = {
    "packed": Abilities(packed=True, plain_head=True),
    "packed, the model's own head": Abilities(packed=True, plain_head=False),
    "padded": Abilities(packed=False, plain_head=False),
}


@pytest.fixture(params=WAYS)
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to compute a batch, whatever the model would have chosen."""
    monkeypatch.setattr(loss, "abilities", lambda *_: WAYS[request.param])
    return str(request.param)


@pytest.mark.parametrize("name", GROUPS)
def test_loss_and_gradients_are_those_of_row_by_row(exact: Any, name: str, way: str) -> None:
    groups = GROUPS[name]
    found = completion_loss(exact, collate(groups))
    expected = row_by_row(exact, [pair for group in groups for pair in group])
    assert relative(found, expected) < 2e-7  # fp64, but for Llama's norm, which always computes in fp32
    ours, theirs = gradients(exact, found), gradients(exact, expected)
    assert max(relative(ours[n], theirs[n]) for n in ours) < 1e-6


@pytest.mark.parametrize("name", GROUPS)
def test_fp32_is_as_near_to_the_truth_as_row_by_row_is(model: Any, exact: Any, name: str, way: str) -> None:
    groups = GROUPS[name]
    pairs = [pair for group in groups for pair in group]
    truth = gradients(exact, row_by_row(exact, pairs))
    theirs = gradients(model, row_by_row(model, pairs))
    ours = gradients(model, completion_loss(model, collate(groups)))
    off = {name: max(relative(found[n], truth[n]) for n in truth) for name, found in (("o", ours), ("t", theirs))}
    assert off["o"] < 2 * off["t"]


def test_attention_on_other_devices_gives_the_same(exact: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of CUDA is made of PyTorch's own attention, so it can be followed here."""
    batch = collate([group for groups in GROUPS.values() for group in groups])
    fused = completion_loss(exact, batch)
    theirs = gradients(exact, fused)

    class Plain:
        apply = staticmethod(packed_attention._plain)

    monkeypatch.setattr(packed_attention, "_FusedOnCPU", Plain)
    plain = completion_loss(exact, batch)
    ours = gradients(exact, plain)
    assert relative(plain, fused) < 1e-12
    assert max(relative(ours[n], theirs[n]) for n in ours) < 1e-7


def test_a_fused_adapter_computes_what_pefts_does(exact: Any) -> None:
    import copy

    batch = collate(GROUPS["several segments"])
    fused = copy.deepcopy(exact)
    fuse_adapter(fused)
    ours, theirs = gradients(fused, completion_loss(fused, batch)), gradients(exact, completion_loss(exact, batch))
    assert max(relative(ours[n], theirs[n]) for n in ours) < 1e-7
    assert any(not torch.equal(ours[n], theirs[n]) for n in ours)  # it was used: sums come in another order
    twin = copy.deepcopy(fused)  # a copy trains its own adapter, not that of the model it was copied from
    assert gradients(twin, completion_loss(twin, batch)).keys() == ours.keys()


def test_rows_are_told_apart_by_their_losses(exact: Any, way: str) -> None:
    groups = GROUPS["several segments"]
    pairs = [pair for group in groups for pair in group]
    found = row_losses(exact, collate(groups))
    each = torch.stack([row_by_row(exact, [pair]) * len(pair.completion_ids) for pair in pairs])
    assert torch.allclose(found, each, rtol=1e-6)


class NoExtras(torch.nn.Module):
    """A model as some are: its layers do not hand on to attention what they do not know."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.device, self.dtype = model, model.config, model.device, model.dtype

    def forward(self, families: Any = None, **arguments: Any) -> Any:
        return self.model(**arguments)


def bare(model: Any) -> NoExtras:
    """It, though a small copy that was tried did hand them on."""
    without = NoExtras(model)
    remember(without, Findings())
    return without


def test_a_model_that_cannot_be_packed_is_found_out_and_said(model: Any) -> None:
    batch = collate(GROUPS["several segments"])
    with pytest.warns(UserWarning, match="cannot be trained on packed rows .*hand keyword arguments"):
        assert not packing.abilities(bare(model), 30).packed
    assert packing.abilities(model, 30) == Abilities(packed=True, plain_head=True)
    with pytest.warns(UserWarning, match="packed rows"):
        found = completion_loss(bare(model), batch)
    assert relative(found, completion_loss(model, batch)) < 1e-6


def test_rows_longer_than_what_was_found_to_fit_go_another_way(model: Any) -> None:
    longest = max(len(pair.prompt_ids) + len(pair.completion_ids) for pair in GROUPS["one segment"][0])
    batch, before = collate(GROUPS["one segment"]), findings(model)
    expected = completion_loss(model, batch)
    try:
        remember(model, Findings(packs=Way(up_to=longest - 1)))
        assert packing.abilities(model, longest - 1).packed
        assert packing.abilities(model, longest) == Abilities(packed=False, plain_head=False, padded=True)
        assert relative(completion_loss(model, batch), expected) < 1e-6
        remember(model, Findings(packs=Way("no"), pads=Way("no")))
        assert not packing.abilities(model, longest).padded
        assert relative(completion_loss(model, batch), expected) < 1e-6
    finally:
        remember(model, before)


def test_the_models_own_attention_stands_again_afterwards(model: Any) -> None:
    before = model.config._attn_implementation
    completion_loss(model, collate(GROUPS["one segment"]))
    assert model.config._attn_implementation == before != packed_attention.NAME


@pytest.mark.parametrize("way_", WAYS)
def test_checkpointed_layers_give_the_same_gradients(
    exact: Any, tiny_model: Any, way_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import copy

    monkeypatch.setattr(loss, "abilities", lambda *_: WAYS[way_])
    batch = collate(GROUPS["several segments"])
    theirs = gradients(exact, completion_loss(exact, batch))
    thrifty = copy.deepcopy(exact)
    packing.checkpoint_layers(thrifty)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = gradients(thrifty, completion_loss(thrifty, batch))
    assert max(relative(ours[n], theirs[n]) for n in ours) < 1e-7
    assert ["with gradient checkpointing" in str(each.message) for each in said] == ([True] if way_ == "padded" else [])


def test_the_loss_is_finite_where_padding_attends_to_nothing(model: Any, way: str) -> None:
    found = completion_loss(model, collate([family(0, [(1, 1), (40, 1)], 11)]))
    assert torch.isfinite(found)
    assert all(torch.isfinite(g).all() for g in gradients(model, found).values())


def test_how_rows_fall_into_segments_changes_nothing(exact: Any) -> None:
    pairs = family(30, [(3, 2), (4, 9), (5, 5)], 12)
    together = completion_loss(exact, collate([pairs]))
    apart = completion_loss(exact, collate([[pair] for pair in pairs]))
    assert relative(together, apart) < 1e-6


def test_only_the_completions_bear_loss(exact: Any) -> None:
    """The loss is the log-likelihood of the completions given the prompts, so it says nothing of the prompts' own."""
    (pair,) = family(0, [(30, 4)], 14)
    found = completion_loss(exact, collate([[pair]]))
    logits = exact(input_ids=torch.tensor([[*pair.prompt_ids, *pair.completion_ids]])).logits[0, -5:-1]
    each = torch.nn.functional.cross_entropy(logits, torch.tensor(pair.completion_ids), reduction="none")
    assert relative(found, each.mean()) < 1e-6


def test_a_token_without_weight_bears_no_loss_and_one_with_weight_does(exact: Any, way: str) -> None:
    (pair,) = family(10, [(3, 6)], 15)
    hidden = collate([[replace(pair, ce=(1, 1, 0, 1, 1, 1))]])
    whole = collate([[pair]])
    assert (hidden.tokens, whole.tokens) == (5, 6)
    tokens = whole.bearing(exact.device, torch.float64)
    each = -loss.log_probs(exact, whole, tokens.ids)[0][:, 0]
    assert relative(row_losses(exact, hidden)[0], each.sum() - each[2]) < 1e-6


def test_candidates_are_read_at_every_place_and_missing_ones_are_0(exact: Any, way: str) -> None:
    (first, second) = family(10, [(3, 2), (3, 3)], 16)
    batch = collate([[replace(first, candidates=((7, 8, 9), (9, 9, 7))), second]])
    tokens = batch.bearing(exact.device, torch.float64)
    assert tokens.ids.tolist()[:2] == [[first.completion_ids[0], 7, 8, 9], [first.completion_ids[1], 9, 9, 7]]
    assert tokens.ids.tolist()[4] == [second.completion_ids[2], -1, -1, -1]
    given = torch.randn(tokens.ids.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given = given.masked_fill(tokens.ids < 0, 0.0)
    found, weighted = loss.log_probs(exact, batch, tokens.ids, given)
    rows = []
    for pair in (first, second):
        row = torch.tensor([[*pair.prompt_ids, *pair.completion_ids]])
        rows.append(exact(input_ids=row).logits[0, len(pair.prompt_ids) - 1 : -1].double().log_softmax(dim=-1))
    expected = torch.cat(rows).gather(1, tokens.ids.clamp(min=0)).masked_fill(tokens.ids < 0, 0.0)
    assert torch.allclose(found, expected, rtol=1e-6)
    assert (found[2:, 1:] == 0).all()
    ours, theirs = gradients(exact, weighted), gradients(exact, (expected * given).sum())
    assert max(relative(ours[n], theirs[n]) for n in ours) < 1e-6


def test_dropout_acts_while_training(tiny_model: Any) -> None:
    model = attach(AutoModelForCausalLM.from_pretrained(tiny_model), LoRA(r=4, dropout=0.5), seed=0).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                p.fill_(0.05)
    batch = collate(GROUPS["one segment"])
    torch.manual_seed(0)
    assert completion_loss(model, batch) != completion_loss(model, batch)
    model.eval()
    assert completion_loss(model, batch) == completion_loss(model, batch)
