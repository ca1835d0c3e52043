"""Claims about calibrated prompts that are distilled: the teacher is the LM as it decodes with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cotune.datamodules import PairMaker, Trace
from cotune.lightning_modules import LanguageModel, LoRA
from cotune.lightning_modules.training.calibrated_teacher import with_offsets
from cotune.programs import Predict, Prompts, ReasonThenFill, Request, Sampling
from cotune.programs.calibration import calibrated

CHOICES = ["red", "blue", "dark blue", "dark", "reddish"]
NATS = {"red": 0.7, "blue": -1.0, "dark blue": 2.0, "dark": 0.1, "reddish": -0.3}
PROGRAM = Predict("question -> answer", types={"answer": CHOICES})
PLAIN = PROGRAM.initial_prompts()
LIFTED = {"predict": replace(PLAIN["predict"], calibration={"answer": NATS})}
FORM = ReasonThenFill()


@pytest.fixture(scope="module")
def lm(tiny_model: Path) -> LanguageModel:
    made = LanguageModel(str(tiny_model), device="cpu", lora=LoRA(r=4, alpha=8))
    made.load(seed=0)
    return made


def written(lm: LanguageModel, prompts: Prompts, count: int) -> list[tuple[Trace, tuple[float, ...]]]:
    """Runs with these prompts: as traces that a teacher has said nothing of yet, and how likely each token was."""
    signature = PROGRAM.predict.signature
    layout = calibrated(FORM.layout(signature), prompts["predict"].calibration)
    asked = [{"question": f"which? {n}"} for n in range(count)]
    requests = [
        Request(FORM.render(signature, prompts["predict"], inputs), seed=n, layout=layout)
        for n, inputs in enumerate(asked)
    ]
    done = lm.complete(requests, Sampling(temperature=1.0, log_probs=True))
    return [
        (
            Trace(
                str(n), 0, 0.0, "predict", 0, inputs, {}, (), one.text, one.completion_ids, True, "",
                candidates=[(7,) * 6] * len(one.completion_ids), reference=[(-9.0,) * 7] * len(one.completion_ids),
            ),
            one.log_probs,
        )
        for n, (inputs, one) in enumerate(zip(asked, done, strict=True))
    ]  # fmt: skip


def maker(lm: LanguageModel, prompts: Prompts) -> PairMaker:
    return PairMaker(PROGRAM, FORM, prompts, lm.encode, end_id=lm.end_ids[0], window=500)


def test_where_a_choice_is_decided_the_teacher_is_the_lm_with_the_offsets(lm: LanguageModel) -> None:
    rows = written(lm, LIFTED, 40)
    taught = with_offsets([trace for trace, _ in rows], maker(lm, LIFTED), lm.codec, lm.model)
    forks = 0
    for trace, (_, drawn) in zip(taught, rows, strict=True):
        for place, (own, *values) in enumerate(trace.reference):
            if own == -9.0:
                assert trace.candidates[place] == (7,) * 6  # as it was: nothing was decided there
                continue
            forks += 1
            ids = [i for i in trace.candidates[place] if i >= 0]
            if trace.completion_ids[place] in ids:  # and not the end of a choice that others begin with
                assert own == pytest.approx(drawn[place], abs=1e-3)
                assert values[ids.index(trace.completion_ids[place])] == own
    assert forks >= 40
    assert {len(trace.candidates[0]) for trace in taught} == {6}


def test_a_choice_is_taught_as_sharply_as_is_asked(lm: LanguageModel) -> None:
    rows = [trace for trace, _ in written(lm, LIFTED, 10)]
    whole, sharp = (with_offsets(rows, maker(lm, LIFTED), lm.codec, lm.model, t) for t in (1.0, 0.25))
    for one, other in zip(whole, sharp, strict=True):
        assert one.candidates[0] == other.candidates[0]
        known = [at for at, token in enumerate(one.candidates[0], 1) if token >= 0]
        plain, raised = (torch.tensor([trace.reference[0][at] for at in known]) for trace in (one, other))
        assert raised.tolist() == pytest.approx((plain / 0.25).log_softmax(0).tolist(), abs=1e-4)


def test_other_ways_of_writing_a_choice_are_taught_against_and_plain_prompts_teach_as_they_are(
    lm: LanguageModel,
) -> None:
    rows = [trace for trace, _ in written(lm, PLAIN, 20)]
    assert with_offsets(rows, maker(lm, PLAIN), lm.codec, lm.model) == rows
    taught = with_offsets(rows, maker(lm, LIFTED), lm.codec, lm.model)
    firsts = [trace.reference[0] for trace in taught]
    assert all(own != -9.0 for own, *_ in firsts)
    strange = [
        own
        for (own, *_), trace in zip(firsts, taught, strict=True)
        if trace.completion_ids[0] not in trace.candidates[0]
    ]
    assert all(own < -40 for own in strange)
