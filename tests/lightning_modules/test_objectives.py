"""Objectives: three streams in one batch, losses that couple rows, and one of a user's own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import own_objective
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name for it)
from cotune.callbacks.schedule import WeightStep
from cotune.datamodules import Batch, Bearing, Bootstrapping, Pair, collate
from cotune.lightning_modules import LoRA
from cotune.lightning_modules.lora import attach
from cotune.lightning_modules.objectives import DPO, GRPO, KTO, Objective, Rejection
from cotune.lightning_modules.training import gradients
from cotune.lightning_modules.training.gradients import BatchGradients, Computed
from tiny_fit import tiny_fit
from torch import Tensor
from transformers import AutoModelForCausalLM


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


def judged(model: Any) -> list[Pair]:
    """The rows with a weight of 1/4 a token, advantages, and log-probabilities from before, near to today's."""
    rows = []
    for i, row in enumerate(pairs()):
        count = len(row.completion_ids)
        with torch.no_grad():
            own = plain_log_probs(model, [row])[:, 0]
        noise = torch.randn(2, count, generator=torch.Generator().manual_seed(50 + i))
        weights = {"kl": (0.25,) * count, "pg": ((-1.0) ** i * 0.25 * (1 + i),) * count}
        before = {"sampled": (own + 0.3 * noise[0]).tolist(), "reference": (own - 1 + noise[1])[:, None].tolist()}
        rows.append(replace(row, ce=(), **weights, **before))
    return rows


LOSSES: dict[str, Objective] = {
    "pairs": DPO(),
    "good and bad": KTO(good=1.5),
    "streams": Rejection(),
    **{variant: GRPO(variant, length=7) for variant in ("grpo", "dr_grpo", "dapo", "cispo")},
    "near the base": GRPO(kl=0.3),
}


def rows_for(name: str, model: Any) -> list[Pair]:
    if name == "streams":
        return streams("ce", "pg", "kl")
    return judged(model) if name != "near the base" else [replace(row, reference=()) for row in judged(model)]


def published(name: str, own_n: Tensor, tokens: Bearing) -> Tensor:
    """The formulas of TRL 1.16's trainers on the same rows, written out; its masked means over (B, T) as loops."""
    rows = [tokens.rows == row for row in range(len(tokens.groups))]
    if name in ("pairs", "good and bad"):
        assert tokens.reference is not None
        ratios = [0.25 * (own_n - tokens.reference[:, 0])[row].sum() for row in rows]  # 0.25: what a token weighs here
        if name == "pairs":
            losses = [-F.logsigmoid(0.1 * (ratios[i] - ratios[i + 1])) for i in range(0, len(rows), 2)]
        else:
            kl = torch.stack(ratios).mean().detach().clamp(min=0)
            losses = [
                1.5 * (1 - F.sigmoid(0.1 * (ratio - kl))) if good else 1 - F.sigmoid(0.1 * (kl - ratio))
                for ratio, good in zip(ratios, tokens.desirable, strict=True)
            ]
        return torch.stack(losses).mean()
    high = {"dapo": 1.28, "cispo": 4.0}.get(name, 1.2)
    advantages, ratio = tokens.pg / 0.25, (own_n - tokens.sampled).exp()
    each = -torch.min(ratio * advantages, ratio.clamp(0.8, high) * advantages)
    if name == "cispo":
        each = -ratio.clamp(max=high).detach() * advantages * own_n
    if name == "near the base":
        assert tokens.reference is not None
        apart = tokens.reference[:, 0] - own_n
        each = each + 0.3 * (apart.exp() - apart - 1)
    if name == "dr_grpo":
        return 0.25 * each.sum() / len(rows)  # the rows' weights are their 1 / length
    return each.mean()  # in equal parts: the rows of "grpo" all have the weight that a run of 4 tokens gives


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "streams"])
def test_losses_and_gradients_are_those_of_the_published_formulas(model: Any, name: str) -> None:
    rows = rows_for(name, model)
    found = compute(model, batch(rows), LOSSES[name])
    own = plain_log_probs(model, rows)[:, 0]
    tokens = batch(rows).bearing(model.device, torch.float64)
    if name == "near the base":
        with torch.no_grad(), model.disable_adapter():
            tokens = tokens.with_reference(plain_log_probs(model, rows))
    expected = published(name, own, tokens)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert apart(found.gradients, torch.autograd.grad(expected, trained(model))) < 1e-6


def test_gradients_are_those_of_the_loss_by_autograd(model: Any) -> None:
    rows = streams("ce", "pg", "kl")
    assert apart(compute(model, batch(rows), Rejection()).gradients, plain(model, rows, Rejection())) < 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_cut_into_parts_gives_the_same(model: Any, name: str) -> None:
    given = batch(rows_for(name, model))
    whole = compute(model, given, LOSSES[name])
    for rows_at_once in (1, 5):
        parts = compute(model, given, LOSSES[name], rows=rows_at_once)
        assert apart(parts.gradients, whole.gradients) < 1e-6
        assert torch.allclose(parts.loss, whole.loss, rtol=1e-9)
        assert parts.size == whole.size


def test_rows_whose_pair_was_left_out_and_groups_of_one_kind_pull_nowhere_or_finitely(model: Any) -> None:
    rows = judged(model)
    unpaired = compute(model, batch(rows[::2]), DPO())
    assert unpaired.loss == 0
    assert all(not gradient.any() for gradient in unpaired.gradients if gradient is not None)
    twice = compute(model, batch([*rows[:2], *rows[:2]]), DPO()).loss  # a group may stand twice in a batch
    assert torch.allclose(twice, compute(model, batch(rows[:2]), DPO()).loss)
    assert compute(model, batch(rows[1::2]), KTO()).finite  # none of them good


def test_parts_alone_would_not_know_of_the_whole(model: Any) -> None:
    """What the pass over the whole batch is for: rows alone have another mean."""
    whole = compute(model, batch(judged(model)), KTO()).gradients
    alone = [compute(model, part, KTO()) for part in batch(judged(model)).parts(1)]
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
        (KTO(), judged(model), [False, True]),
    ):
        passes.clear()
        compute(model, batch(rows), objective)
        assert passes == made


def test_memory_that_runs_out_in_a_pass_before_leaves_the_same(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compute(model, batch(judged(model)), KTO())
    real = gradients.log_probs

    def scarce(model: Any, part: Batch, *given: Any) -> Any:
        if part.rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(model, part, *given)

    monkeypatch.setattr(gradients, "log_probs", scarce)
    assert apart(compute(model, batch(judged(model)), KTO()).gradients, whole.gradients) < 1e-6


def test_rows_that_make_a_coupled_loss_no_number_are_named_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gradients.log_probs

    def poisoned(model: Any, part: Batch, *given: Any) -> Any:
        found, weighted = real(model, part, *given)
        bad = torch.tensor([pair.name == "row 3" for pair in part.pairs for _ in pair.bearing])
        return found.masked_fill(bad[:, None], float("nan")), weighted

    monkeypatch.setattr(gradients, "log_probs", poisoned)
    computing, given = BatchGradients(), batch(judged(model))
    found = computing.compute(model, trained(model), given, DPO())
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
