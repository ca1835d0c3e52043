"""Objectives: three streams in one batch, losses that couple rows, and one of a user's own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import own_objective
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name for it)
from cotune.callbacks.schedule import WeightStep
from cotune.datamodules import Batch, Bearing, Bootstrapping, Collected, Pair, Trace, collate
from cotune.lightning_modules import LoRA
from cotune.lightning_modules.lora import attach
from cotune.lightning_modules.objectives import Objective, Rejection
from cotune.lightning_modules.training import gradients
from cotune.lightning_modules.training.gradients import BatchGradients, Computed
from tiny_fit import tiny_fit
from torch import Tensor
from transformers import AutoModelForCausalLM


class WithoutRows(Objective):
    def rows(self, collected: Collected) -> list[Trace]:
        raise NotImplementedError


class Preference(WithoutRows):
    """Of the two rows of a group the first is preferred to the second (DPO, Rafailov et al., 2023)."""

    def loss(self, log_probs: Tensor, tokens: Bearing) -> Tensor:
        assert tokens.reference is not None
        rewards_R = tokens.by_row(log_probs[:, 0] - tokens.reference[:, 0])
        pairs = [[row for row, _ in rows] for _, rows in groupby(enumerate(tokens.groups), key=lambda row: row[1])]
        chosen, rejected = torch.tensor(pairs).unbind(dim=1)
        return -F.logsigmoid(0.1 * (rewards_R[chosen] - rewards_R[rejected])).sum()

    def reads(self, tokens: Bearing) -> Any:
        return ("policy", "reference")

    def size(self, tokens: Bearing) -> float:
        return len(tokens.groups) / 2


class Desirability(Preference):
    """Good and bad rows against the batch's mean distance from the reference (KTO, Ethayarajh et al., 2024)."""

    def loss(self, log_probs: Tensor, tokens: Bearing) -> Tensor:
        assert tokens.reference is not None
        rewards_R = tokens.by_row(log_probs[:, 0] - tokens.reference[:, 0])
        sign_R = torch.tensor([1.0 if good else -1.0 for good in tokens.desirable], dtype=rewards_R.dtype)
        return (1 - torch.sigmoid(0.1 * sign_R * (rewards_R - rewards_R.mean().detach().clamp(min=0)))).sum()

    def size(self, tokens: Bearing) -> float:
        return len(tokens.groups)


class Distillation(WithoutRows):
    """The divergence of the LM from its teacher over the candidates, each way of counting it in by the `kl` weight."""

    def loss(self, log_probs: Tensor, tokens: Bearing) -> Tensor:
        assert tokens.reference is not None
        teacher, known = tokens.reference[:, 1:], tokens.ids[:, 1:] >= 0
        each = torch.where(known, teacher.exp() * (teacher - log_probs[:, 1:]), 0.0)
        return (tokens.kl * each.sum(dim=1)).sum()


@pytest.fixture(scope="module")
def model(tiny_model: Any) -> Any:
    """In fp64, where the order of a sum hides nothing."""
    model = attach(AutoModelForCausalLM.from_pretrained(tiny_model), LoRA(r=4), seed=0).train()
    with torch.no_grad():
        for i, p in enumerate(trained(model)):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return copy.deepcopy(model).double()


def trained(model: Any) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, 259, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def pairs(count: int = 6) -> list[Pair]:
    """Rows that share a prompt prefix, two a group, good and bad by turns."""
    return [
        Pair(
            [*ids(20, 1), *ids(2 + i, 10 + i)],
            ids(1 + (5 * i) % 7, 100 + i),
            name=f"row {i}",
            group=f"g{i // 2}",
            desirable=i % 2 == 0,
        )
        for i in range(count)
    ]


def batch(rows: Sequence[Pair]) -> Batch:
    return collate([rows[:4], rows[4:]])


def compute(model: Any, given: Batch, objective: Objective, *, rows: int | None = None) -> Computed:
    return BatchGradients(rows).compute(model, trained(model), given, objective)


def apart(found: Sequence[Any], expected: Sequence[Any]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def plain_log_probs(model: Any, rows: Sequence[Pair]) -> Tensor:
    """(n, 1) by the plain model, row by row, differentiable."""
    found = []
    for row in rows:
        text = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
        scores = model(input_ids=text, use_cache=False).logits[0].log_softmax(dim=-1)
        places = [len(row.prompt_ids) + place for place in row.bearing]
        found.append(torch.stack([scores[place - 1, text[0, place]] for place in places]))
    return torch.cat(found)[:, None]


def plain(model: Any, rows: Sequence[Pair], objective: Objective) -> tuple[Tensor, ...]:
    """The loss's gradients by autograd alone: no coefficients, no parts, no packing."""
    tokens = batch(rows).bearing(model.device, torch.float64)
    with torch.no_grad(), model.disable_adapter():
        tokens = tokens.with_reference(plain_log_probs(model, rows))
    loss = objective.loss(plain_log_probs(model, rows), tokens) / objective.size(tokens)
    return torch.autograd.grad(loss, trained(model))


def weights(row: Pair, seed: int) -> tuple[float, ...]:
    return tuple(torch.randn(len(row.completion_ids), generator=torch.Generator().manual_seed(seed)).tolist())


def streams(*names: str) -> list[Pair]:
    """The rows with weights in these streams only, the same for a stream whatever stands beside it."""
    given = []
    for i, row in enumerate(pairs()):
        every = {name: weights(row, 7 * i + k) for k, name in enumerate(("ce", "pg", "kl"))}
        given.append(
            replace(row, **{name: every[name] if name in names else (0.0,) * len(every[name]) for name in every})
        )
    return given


LOSSES: dict[str, Objective] = {
    "pairs": Preference(),
    "good and bad": Desirability(),
    "streams": Rejection(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_loss_by_autograd(model: Any, name: str) -> None:
    rows = streams("ce", "pg", "kl") if name == "streams" else pairs()
    found = compute(model, batch(rows), LOSSES[name])
    assert apart(found.gradients, plain(model, rows, LOSSES[name])) < 1e-6


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rows_at_once", [1, 2, 5])
def test_a_batch_cut_into_parts_gives_the_same(model: Any, name: str, rows_at_once: int) -> None:
    given = batch(streams("ce", "pg", "kl") if name == "streams" else pairs())
    whole = compute(model, given, LOSSES[name])
    parts = compute(model, given, LOSSES[name], rows=rows_at_once)
    assert apart(parts.gradients, whole.gradients) < 1e-6
    assert torch.allclose(parts.loss, whole.loss, rtol=1e-9)
    assert parts.size == whole.size


def test_parts_alone_would_not_know_of_the_whole(model: Any) -> None:
    """What the pass over the whole batch is for: rows alone have another mean."""
    whole = compute(model, batch(pairs()), Desirability()).gradients
    alone = [compute(model, part, Desirability()) for part in batch(pairs()).parts(1)]
    summed = [sum(each) / len(alone) for each in zip(*(one.gradients for one in alone), strict=True)]  # type: ignore[arg-type]
    assert apart(summed, whole) > 1e-3


def test_three_streams_in_one_batch_are_the_sum_of_the_three(model: Any) -> None:
    each = [compute(model, batch(streams(name)), Rejection()) for name in ("ce", "pg", "kl")]
    together = compute(model, batch(streams("ce", "pg", "kl")), Rejection())
    sizes = {one.size for one in each} | {together.size}
    assert len(sizes) == 1
    summed = [sum(parts) for parts in zip(*(one.gradients for one in each), strict=True)]  # type: ignore[arg-type]
    assert apart(together.gradients, summed) < 1e-6
    assert torch.allclose(together.loss, sum(one.loss for one in each), rtol=1e-9)  # type: ignore[arg-type]


def test_the_reference_is_the_base_unless_the_rows_bring_their_own(model: Any) -> None:
    rows = streams("kl")
    with torch.no_grad(), model.disable_adapter():
        base = plain_log_probs(model, rows)
    assert torch.allclose(compute(model, batch(rows), Rejection()).tokens.reference, base, rtol=1e-9)  # type: ignore[arg-type]
    brought = [replace(row, reference=[(-0.5,)] * len(row.completion_ids)) for row in rows]
    found = compute(model, batch(brought), Rejection()).tokens.reference
    assert found is not None
    assert (found == -0.5).all()
    mixed = compute(model, batch([*brought[:3], *rows[3:]]), Rejection()).tokens
    assert mixed.reference is not None
    assert (mixed.reference[mixed.rows < 3] == -0.5).all()
    assert torch.allclose(mixed.reference[mixed.rows >= 3], base[mixed.rows >= 3], rtol=1e-9)


def test_candidates_are_distilled_beside_rows_that_have_none(model: Any) -> None:
    rows = pairs()
    taught = []
    for i, row in enumerate(rows[:3]):
        shape = (len(row.completion_ids), 21)
        teacher = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i)).log_softmax(
            dim=-1
        )
        candidates = [ids(20, 1000 * i + place) for place in range(shape[0])]
        taught.append(replace(row, ce=(), kl=(1.0,) * shape[0], candidates=candidates, reference=teacher.tolist()))
    given = batch([*taught, *rows[3:]])
    found = compute(model, given, Distillation())
    scores = []
    for row in taught:
        text = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
        logits = model(input_ids=text, use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1]
        teacher = torch.tensor(row.reference, dtype=torch.float64)[:, 1:]
        own = logits.log_softmax(dim=-1).gather(1, torch.tensor(row.candidates))
        scores.append((teacher.exp() * (teacher - own)).sum())
    expected = torch.autograd.grad(torch.stack(scores).sum() / given.tokens, trained(model))
    assert apart(found.gradients, expected) < 1e-6
    assert apart(compute(model, given, Distillation(), rows=1).gradients, expected) < 1e-6


def test_a_pass_before_is_made_only_where_its_result_is_read(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real, passes = gradients.log_probs, []

    def counted(*given: Any) -> Any:
        passes.append(torch.is_grad_enabled())
        return real(*given)

    monkeypatch.setattr(gradients, "log_probs", counted)
    for objective, rows, made in (
        (Rejection(), pairs(), [True]),
        (Rejection(), streams("ce", "pg"), [True]),
        (Rejection(), streams("kl"), [False, False, True]),
        (Preference(), pairs(), [False, False, True]),
    ):
        passes.clear()
        compute(model, batch(rows), objective)
        assert passes == made


def test_memory_that_runs_out_in_a_pass_before_leaves_the_same(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compute(model, batch(pairs()), Preference())
    real = gradients.log_probs

    def scarce(model: Any, part: Batch, *given: Any) -> Any:
        if part.rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(model, part, *given)

    monkeypatch.setattr(gradients, "log_probs", scarce)
    assert apart(compute(model, batch(pairs()), Preference()).gradients, whole.gradients) < 1e-6


def test_rows_that_make_a_coupled_loss_no_number_are_named_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gradients.log_probs

    def poisoned(model: Any, part: Batch, *given: Any) -> Any:
        found, weighted = real(model, part, *given)
        bad = torch.tensor([pair.name == "row 3" for pair in part.pairs for _ in pair.bearing])
        return found.masked_fill(bad[:, None], float("nan")), weighted

    monkeypatch.setattr(gradients, "log_probs", poisoned)
    computing, given = BatchGradients(), batch(pairs())
    found = computing.compute(model, trained(model), given, Preference())
    assert not found.finite
    assert computing.not_finite(model, trained(model), given, found) == ["row 3"]


def test_an_objective_of_ones_own_needs_no_edit_here(tiny_model: Path, tmp_path: Path) -> None:
    fits = {}
    for name, objective in (("theirs", own_objective.LeaveOneOut()), ("ours", None)):
        fit = tiny_fit(
            tiny_model,
            tmp_path / name,
            "w",
            bootstrapping=Bootstrapping(attempts=4, traces_per_example=4, fresh_demos=0),
            keep="last",
            steps={"w": WeightStep(objective=objective, epochs=1)},
        )
        fits[name] = fit.run()
    batches = fits["theirs"].data.epoch_batches()
    scores = {trace.score for trace in batches.traces}
    assert scores == {0.0, 1.0}  # failing runs are learnt from as well
    weights = [w for i in range(len(batches)) for pair in batches[i].pairs for w in pair.pg]
    assert min(weights) < 0 < max(weights)
    assert fits["theirs"].outcome["adapter"] != fits["ours"].outcome["adapter"]
