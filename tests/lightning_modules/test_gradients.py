"""Gradients in parts: equal to those at once, also when memory runs out on the way."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cotune.datamodules.collate import Batch, Bearing, Pair, collate
from cotune.lightning_modules import LoRA
from cotune.lightning_modules.lora import attach
from cotune.lightning_modules.objectives import Rejection
from cotune.lightning_modules.training import gradients
from cotune.lightning_modules.training.gradients import (
    BatchGradients,
    Computed,
    TrainingMemoryError,
    is_finite,
    known_gradients,
)
from cotune.programs.ranks import Ranks
from side_by_side import side_by_side
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def model(tiny_model: Any) -> Any:
    """In fp64, where the order of a sum hides nothing."""
    model = attach(AutoModelForCausalLM.from_pretrained(tiny_model), LoRA(r=4), seed=0).train()
    with torch.no_grad():
        for i, p in enumerate(trained(model)):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return copy.deepcopy(model).double()


def trained(model: Any) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def pairs(shared: int, rows: int, seed: int) -> list[Pair]:
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 259, (count,), generator=generator).tolist()

    prefix = ids(shared)
    return [Pair([*prefix, *ids(2 + i)], ids(1 + 2 * i), name=f"{seed}-{i}") for i in range(rows)]


@pytest.fixture
def batch() -> Batch:
    return collate([pairs(20, 5, 1), pairs(9, 3, 2)])


def apart(one: Any, other: Any) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(one.gradients, other.gradients, strict=True))


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_parts_give_the_loss_and_gradients_of_the_whole(model: Any, batch: Batch, rows: int) -> None:
    whole = BatchGradients().compute(model, trained(model), batch, Rejection())
    parts = BatchGradients(rows).compute(model, trained(model), batch, Rejection())
    assert parts.size == whole.size == batch.tokens
    assert torch.allclose(parts.rows, whole.rows, rtol=1e-6)
    assert apart(parts, whole) < 1e-6


def test_parts_hold_every_row_once_in_order(batch: Batch) -> None:
    for rows in range(1, 10):
        parts = batch.parts(rows)
        assert [name for part in parts for name in part.names] == list(batch.names)
        assert all(part.rows == rows for part in parts[:-1])
        assert sum(part.tokens for part in parts) == batch.tokens


class Memory:
    """Runs out whenever more than `rows` rows are computed at once, from the k-th part on."""

    def __init__(self, rows: int, error: BaseException, *, at: int = 0) -> None:
        self.rows, self.error, self.at = rows, error, at
        self.asked: list[int] = []
        self.real = gradients.log_probs

    def __call__(self, model: Any, part: Batch, *given: Any) -> Any:
        self.asked.append(part.rows)
        if part.rows > self.rows and len(self.asked) > self.at:
            raise self.error
        return self.real(model, part, *given)


ERRORS = {
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(("at_once", "at"), [(None, 0), (3, 0), (3, 1)])
def test_a_batch_that_does_not_fit_is_halved_and_gives_the_same(
    model: Any,
    batch: Batch,
    error: str,
    at_once: int | None,
    at: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = BatchGradients().compute(model, trained(model), batch, Rejection())
    memory = Memory(2, ERRORS[error], at=at)
    monkeypatch.setattr(gradients, "log_probs", memory)
    computing = BatchGradients(at_once)
    found = computing.compute(model, trained(model), batch, Rejection())
    assert apart(found, whole) < 1e-6
    assert torch.allclose(found.rows, whole.rows, rtol=1e-6)
    assert "memory ran out on" in capsys.readouterr().out
    asked = len(memory.asked)
    computing.compute(model, trained(model), batch, Rejection())
    assert not capsys.readouterr().out  # remembered, so not run into again
    assert max(memory.asked[asked:]) <= 2


def test_memory_that_runs_out_in_the_backward_pass_is_noticed_as_well(
    model: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = BatchGradients().compute(model, trained(model), batch, Rejection())
    real = torch.autograd.grad
    calls: list[int] = []

    def grad(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:  # the first is the objective's, by log-probabilities
            raise ERRORS["CPU"]
        return real(*args, **options)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    assert apart(BatchGradients().compute(model, trained(model), batch, Rejection()), whole) < 1e-6
    assert len(calls) == 4


def test_a_single_row_that_does_not_fit_is_named_with_the_ways_out(
    model: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "log_probs", Memory(0, ERRORS["CUDA"]))
    with pytest.raises(TrainingMemoryError, match=r'a single training row of 23 tokens \("1-0"\).*gradient_checkpoint'):
        BatchGradients().compute(model, trained(model), batch, Rejection())


def test_another_error_is_not_taken_for_a_lack_of_memory(
    model: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "log_probs", Memory(0, RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        BatchGradients().compute(model, trained(model), batch, Rejection())


def test_known_gradients_come_out_of_a_backward_pass(model: Any, batch: Batch) -> None:
    computed = BatchGradients().compute(model, trained(model), batch, Rejection())
    loss = known_gradients(computed, trained(model))
    assert torch.equal(loss, computed.loss)
    found = torch.autograd.grad(loss * 3, trained(model))
    assert all(torch.equal(a, 3 * b) for a, b in zip(found, computed.gradients, strict=True))


def test_a_scale_changes_nothing_where_nothing_overflows(model: Any, batch: Batch) -> None:
    plain = BatchGradients(3).compute(model, trained(model), batch, Rejection())
    scaled = BatchGradients(3).compute(model, trained(model), batch, Rejection(), scale=1024.0)
    assert apart(scaled, plain) < 1e-12
    assert torch.equal(scaled.rows, plain.rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_gradients_are_finite_if_their_norm_is(value: float) -> None:
    fine = torch.ones(3)
    assert is_finite([fine, None])
    assert is_finite([])
    assert not is_finite([fine, torch.tensor([value, 0.0])])  # the norm of 1e30 overflows, and clipping divides by it


def test_no_rows_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="micro_batch_size 0 is below 1"):
        BatchGradients(0)


# -- several processes


class Surer(Rejection):
    """Reads both the LM's and the base's log-probabilities of the whole batch."""

    def loss(self, log_probs: torch.Tensor, tokens: Bearing) -> torch.Tensor:
        assert tokens.reference is not None
        return (log_probs[:, 0].exp() * tokens.ce + (log_probs - tokens.reference)[:, 0] ** 2).sum()

    def reads(self, tokens: Bearing) -> Sequence[Any]:
        return ("policy", "reference")


@pytest.mark.parametrize("objective", [Rejection(), Surer()], ids=["reads nothing", "reads all"])
@pytest.mark.parametrize("rows", [(5, 3), (2, 1)], ids=["as many as slices", "fewer"])
def test_slices_give_the_same_bits_in_one_process_and_in_many(
    model: Any, objective: Rejection, rows: tuple[int, int]
) -> None:
    """In fp32. Of three processes one has fewer slices than the others, of nine one has none."""
    batch, model = collate([pairs(20, rows[0], 1), pairs(9, rows[1], 2)]), copy.deepcopy(model).float()
    alone = BatchGradients(slices=8).compute(model, trained(model), batch, objective)

    def compute(ranks: Ranks) -> Computed:
        computing, own = BatchGradients(slices=8), copy.deepcopy(model)
        computing.ranks = ranks
        return computing.compute(own, trained(own), batch, objective)

    for count in (2, 3, 4, 9):
        for one in side_by_side(count, compute):
            assert isinstance(one, Computed), one
            assert torch.equal(one.rows, alone.rows)
            assert torch.equal(one.loss, alone.loss)
            assert all(torch.equal(a, b) for a, b in zip(one.gradients, alone.gradients, strict=True))


def test_memory_that_runs_out_in_one_process_counts_in_all_and_one_row_too_many_ends_all(
    model: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gradients.log_probs

    def little(fits: int) -> Any:
        def compute(model: Any, part: Batch, *given: Any) -> Any:
            if "2-2" in part.names and part.rows > fits:  # which is the second's alone
                raise ERRORS["CPU"]
            return real(model, part, *given)

        return compute

    monkeypatch.setattr(gradients, "log_probs", little(2))
    assert side_by_side(2, lambda ranks: sized(ranks, model, batch)) == [2, 2]
    monkeypatch.setattr(gradients, "log_probs", little(0))
    assert [type(one) for one in side_by_side(2, lambda ranks: sized(ranks, model, batch))] == [TrainingMemoryError] * 2


def sized(ranks: Ranks, model: Any, batch: Batch) -> int | None:
    """Rows at once after a batch."""
    computing, own = BatchGradients(), copy.deepcopy(model)
    computing.ranks = ranks
    computing.compute(own, trained(own), batch, Rejection())
    return computing.rows_at_once
