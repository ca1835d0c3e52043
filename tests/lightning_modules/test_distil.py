"""Distil: the divergence of a student from a teacher that read other prompts, and its gradient."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name for it)
from cotune.datamodules import PairMaker, Trace, collate
from cotune.inference.local.engine import evaluating
from cotune.lightning_modules import LoRA
from cotune.lightning_modules.lora import attach
from cotune.lightning_modules.objectives import Distil
from cotune.lightning_modules.training.gradients import BatchGradients
from cotune.lightning_modules.training.reference import with_reference
from cotune.programs import Demo, Lines, Predict, Prompt
from tiny import save_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

PROGRAM = Predict("number -> answer", instruction="Double.")
PLAIN = PROGRAM.initial_prompts()
TUNED = {"predict": Prompt("Give twice the number.", (Demo({"number": "2"}, {"answer": "4"}, "2"),))}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """In fp64, with an adapter that does something and that would drop inputs while it trains."""
    base = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("model")))
    model = attach(base, LoRA(r=4, dropout=0.5), seed=0).double().eval()
    with torch.no_grad():
        for i, p in enumerate(trained(model)):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model


def trained(model: Any) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def maker(prompts: Any, window: int = 1000) -> PairMaker:
    def encode(messages: Any) -> list[int]:
        return [3 + byte for message in messages for byte in message["content"].encode()]

    return PairMaker(PROGRAM, Lines(), prompts, encode, end_id=2, window=window)


def calls() -> list[Trace]:
    """Three calls: the second with a token that was put there, the last cut off at its only token."""
    written: list[tuple[tuple[int, ...], tuple[bool, ...], bool]] = [
        ((60, 61, 2), (), True),
        ((70, 71, 72, 2), (False, True, False, True), True),
        ((80,), (), False),
    ]
    return [
        Trace(str(i), 0, 0.0, "predict", 0, {"number": str(i)}, {}, (), "", ids, complete, "x", forced=forced)
        for i, (ids, forced, complete) in enumerate(written)
    ]


def taught(model: Any, objective: Distil) -> list[Trace]:
    assert objective.reference is not None
    rows = [replace(call, ce=(), kl=call.free()) for call in calls()]
    gradients = BatchGradients()
    return with_reference(
        rows, maker(TUNED), lambda batch: gradients.likeliest(model, batch, objective.reference.top_k)
    )


def logits(model: Any, prompts: Any, call: Trace) -> Tensor:
    """(T, V) of the free tokens, of one row alone by the plain model."""
    pair = maker(prompts).pair(call)
    text = torch.tensor([[*pair.prompt_ids, *call.completion_ids]])
    scores = model(input_ids=text, use_cache=False).logits[0, len(pair.prompt_ids) - 1 : -1]
    return scores[[bool(weight) for weight in call.free()]]


def with_tail(log_probs: Tensor) -> Tensor:
    """TRL 1.16's way to write what is left (`add_tail_bucket`)."""
    inside = log_probs.logsumexp(dim=-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([log_probs, (-torch.expm1(inside)).log()], dim=-1)


def divergence(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """TRL 1.16's published divergences (SDFT), written out."""
    if alpha == 0:
        return F.kl_div(student, teacher, reduction="sum", log_target=True)
    if alpha == 1:
        return F.kl_div(teacher, student, reduction="sum", log_target=True)
    mixed = torch.logaddexp(student + math.log(1 - alpha), teacher + math.log(alpha))
    kl_teacher = F.kl_div(mixed, teacher, reduction="sum", log_target=True)
    return alpha * kl_teacher + (1 - alpha) * F.kl_div(mixed, student, reduction="sum", log_target=True)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows_at_once", [None, 1])
def test_loss_and_gradient_are_those_of_the_published_formula(
    model: Any, alpha: float, rows_at_once: int | None
) -> None:
    objective = Distil(top_k=20, alpha=alpha)
    rows = taught(model, objective)
    batch = collate([[maker(PLAIN).pair(row) for row in rows]])
    found = BatchGradients(rows_at_once).compute(model, trained(model), batch, objective)
    expected = torch.zeros((), dtype=torch.float64)
    for call in calls():
        with torch.no_grad():
            teacher = logits(model, TUNED, call).log_softmax(dim=-1).topk(20, dim=-1)
        student = logits(model, PLAIN, call).log_softmax(dim=-1).gather(1, teacher.indices)
        expected = expected + divergence(with_tail(student), with_tail(teacher.values), alpha)
    expected = expected / 6  # free tokens
    assert batch.tokens == 6
    assert float(found.loss) == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(found.gradients, torch.autograd.grad(expected, trained(model)), strict=True):
        assert ours is not None
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


def test_nothing_pulls_where_student_and_teacher_agree(model: Any) -> None:
    objective = Distil(top_k=259)
    rows = [replace(call, ce=(), kl=call.free()) for call in calls()]
    gradients = BatchGradients()
    rows = with_reference(rows, maker(PLAIN), lambda batch: gradients.likeliest(model, batch, 300))
    assert {len(ids) for row in rows for ids in row.candidates} == {259}  # no more than there are
    found = gradients.compute(model, trained(model), collate([[maker(PLAIN).pair(row) for row in rows]]), objective)
    assert float(found.loss) == pytest.approx(0, abs=1e-4)
    assert max(float(each.abs().max()) for each in found.gradients if each is not None) < 1e-8


def test_calls_that_do_not_fit_behind_the_teachers_prompts_are_left_out(model: Any) -> None:
    sizes = [len(maker(TUNED).pair(call).prompt_ids) + len(call.completion_ids) for call in calls()]
    score = BatchGradients().likeliest
    rows = [replace(call, ce=(), kl=call.free()) for call in calls()]
    left = with_reference(rows, maker(TUNED, window=sorted(sizes)[1]), lambda batch: score(model, batch, 2))
    assert [row.example for row in left] == [
        row.example for row, size in zip(rows, sizes, strict=True) if size < max(sizes)
    ]


def test_a_teacher_answers_without_dropout(model: Any) -> None:
    model.train()
    try:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
        assert all(module.training for module in model.modules())
    finally:
        model.eval()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"top_k": 0}, "top_k 0 is below 1"),
        ({"alpha": 1.5}, "alpha 1.5 is outside"),
        ({"choice_temperature": 0.0}, "choice_temperature 0 is outside"),
        ({"decay": 1.0}, "decay 1 of the average is outside"),
        ({"runs": 2, "temperature": 0.0}, "temperature 0 is too low for 2 runs per example"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Distil(**settings)
