"""The completion loss: computed over shared prefixes, equal to computing it row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cotune.datamodules.collate import IGNORED, Batch, Pair, Segment, collate
from cotune.lightning_modules import LoRA
from cotune.lightning_modules.lora import attach
from cotune.lightning_modules.loss import completion_loss
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


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_loss_and_gradients_are_those_of_row_by_row(model: Any, exact: Any, name: str, precision: str) -> None:
    used, tolerance = (model, 2e-6) if precision == "fp32" else (exact, 1e-6)
    groups = GROUPS[name]
    found = completion_loss(used, collate(groups, pad_id=0))
    expected = row_by_row(used, [pair for group in groups for pair in group])
    assert relative(found, expected) < 1e-6
    ours, theirs = gradients(used, found), gradients(used, expected)
    assert max(relative(ours[n], theirs[n]) for n in ours) < tolerance


def test_the_loss_is_finite_where_padding_attends_to_nothing(model: Any) -> None:
    loss = completion_loss(model, collate([family(0, [(1, 1), (40, 1)], 11)], pad_id=0))
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients(model, loss).values())


def test_how_rows_fall_into_segments_changes_nothing(exact: Any) -> None:
    pairs = family(30, [(3, 2), (4, 9), (5, 5)], 12)
    together = completion_loss(exact, collate([pairs], pad_id=0))
    apart = completion_loss(exact, collate([[pair] for pair in pairs], pad_id=0))
    assert relative(together, apart) < 1e-6


def test_what_stands_in_the_padding_does_not_matter(model: Any) -> None:
    groups = [family(10, [(1, 2), (20, 8)], 13)]
    with torch.no_grad():
        assert torch.equal(
            completion_loss(model, collate(groups, pad_id=0)), completion_loss(model, collate(groups, pad_id=77))
        )


def test_only_the_completions_bear_loss(exact: Any) -> None:
    """The loss is the log-likelihood of the completions given the prompts, so it says nothing of the prompts' own."""
    (pair,) = family(0, [(30, 4)], 14)
    loss = completion_loss(exact, collate([[pair]], pad_id=0))
    logits = exact(input_ids=torch.tensor([[*pair.prompt_ids, *pair.completion_ids]])).logits[0, -5:-1]
    each = torch.nn.functional.cross_entropy(logits, torch.tensor(pair.completion_ids), reduction="none")
    assert relative(loss, each.mean()) < 1e-6


def test_an_ignored_label_bears_no_loss_and_a_completion_token_does(exact: Any) -> None:
    batch = collate([family(10, [(3, 2), (3, 6)], 15)], pad_id=0)
    (segment,) = batch.segments
    assert (segment.labels == IGNORED).sum() == 4  # before the shorter completion

    def with_label(row: int, column: int, label: int) -> Batch:
        labels = segment.labels.clone()
        labels[row, column] = label
        return Batch((Segment(segment.prefix, segment.ids, segment.mask, labels),))

    with torch.no_grad():
        loss = completion_loss(exact, batch)
        assert completion_loss(exact, with_label(1, 5, 9)) != loss
        hidden = with_label(1, 5, IGNORED)
        assert hidden.tokens == batch.tokens - 1
        assert completion_loss(exact, hidden) * hidden.tokens < loss * batch.tokens


def test_dropout_acts_while_training(tiny_model: Any) -> None:
    model = attach(AutoModelForCausalLM.from_pretrained(tiny_model), LoRA(r=4, dropout=0.5), seed=0).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                p.fill_(0.05)
    batch = collate(GROUPS["one segment"], pad_id=0)
    torch.manual_seed(0)
    assert completion_loss(model, batch) != completion_loss(model, batch)
    model.eval()
    assert completion_loss(model, batch) == completion_loss(model, batch)
