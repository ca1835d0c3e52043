"""Claims about chances: they are the probabilities with which choices are decoded, offsets included."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cotune.inference.automata import CalibratedChoices
from cotune.inference.fields import Plan
from cotune.lightning_modules import LanguageModel, LoRA
from cotune.programs import ReasonThenFill, Request, Sampling, Signature
from cotune.programs.calibration import calibrated, offsets_of
from cotune.programs.layout import Choices, Field, Layout

CHOICES = ("red", "blue", "dark blue", "dark", "reddish")
BEGIN = ("red", "dark")
"""Choices that others begin with."""
LAYOUT = ReasonThenFill().layout(Signature.parse("question -> answer", types={"answer": list(CHOICES)}))
NATS = {"red": 0.7, "blue": -1.0, "dark blue": 2.0, "dark": 0.1, "reddish": -0.3}


@pytest.fixture(scope="module")
def lm(tiny_model: Path) -> LanguageModel:
    made = LanguageModel(str(tiny_model), device="cpu", lora=LoRA(r=4, alpha=8))
    made.load(seed=0)
    return made


def asks(layout: Layout, count: int = 1, **more: Any) -> list[Request]:
    return [
        Request([{"role": "user", "content": f"which? {n % 3}"}], seed=n, layout=layout, **more) for n in range(count)
    ]


@pytest.mark.parametrize("calibration", [{"answer": dict.fromkeys(CHOICES, 0.0)}, {"answer": NATS}])
def test_chances_are_what_sampling_takes(lm: LanguageModel, calibration: dict[str, dict[str, float]]) -> None:
    layout, drawn = calibrated(LAYOUT, calibration), Sampling(temperature=1.0, log_probs=True)
    done = lm.complete(asks(layout, 600, chances=True), drawn)
    for one in done:
        chances = one.chances["answer"]
        assert math.fsum(map(math.exp, chances.values())) == pytest.approx(1, abs=1e-3)
        value = one.fields[0].text.strip()
        noted = sum(one.log_probs)  # by the engine, which notes no end of the value
        assert chances[value] <= noted + 1e-3 if value in BEGIN else noted == pytest.approx(chances[value], abs=1e-3)
    found = Counter(one.fields[0].text.strip() for one in done)
    for choice in CHOICES:
        expected = math.fsum(math.exp(one.chances["answer"][choice]) for one in done)
        assert found[choice] == pytest.approx(expected, abs=4 * math.sqrt(expected) + 1)


def test_offsets_change_a_choices_odds_by_their_difference(lm: LanguageModel) -> None:
    two = ReasonThenFill().layout(Signature.parse("question -> answer", types={"answer": ["red", "blue"]}))
    odds = []
    for nats in (0.0, 3.0):
        layout = calibrated(two, {"answer": {"red": nats}})
        (done,) = lm.complete(asks(layout, chances=True), Sampling())
        odds.append(done.chances["answer"]["red"] - done.chances["answer"]["blue"])
    assert odds[1] - odds[0] == pytest.approx(3, abs=1e-4)


def test_what_the_lm_always_says_is_said_as_often_as_others_once_calibrated(lm: LanguageModel) -> None:
    bare = calibrated(LAYOUT, {"answer": dict.fromkeys(CHOICES, 0.0)})
    done = lm.complete(asks(bare, 12, chances=True), Sampling())
    nats = offsets_of([one.chances["answer"] for one in done], {})
    again = lm.complete(asks(calibrated(LAYOUT, {"answer": nats}), 12, chances=True), Sampling())
    for choice in CHOICES:
        mean = math.fsum(math.exp(one.chances["answer"][choice]) for one in again) / len(again)
        assert mean == pytest.approx(1 / len(CHOICES), abs=0.05)


def test_prompts_of_several_completions_are_read_together(lm: LanguageModel) -> None:
    alone = [lm.complete([one], Sampling())[0] for one in asks(LAYOUT, 3, chances=True)]
    together = lm.complete(asks(LAYOUT, 3, chances=True), Sampling())
    for one, other in zip(alone, together, strict=True):
        assert one.chances["answer"] == pytest.approx(other.chances["answer"], abs=1e-4)
    assert lm.complete(asks(LAYOUT), Sampling())[0].chances == {}


def test_a_way_is_the_tokenizers_own_and_its_offsets_add_up(lm: LanguageModel) -> None:
    (field,) = (part for part in LAYOUT if isinstance(part, Field))
    assert isinstance(field.syntax, Choices)
    offset = replace(field, syntax=replace(field.syntax, offsets=tuple(NATS.values())))
    (language,) = Plan((offset,), lm.codec).languages
    assert isinstance(language, CalibratedChoices)
    for choice in CHOICES:
        ids, states = language.way(choice)
        assert lm.codec.decode(ids) == choice
        if choice not in BEGIN:
            added = math.fsum(language.added(state)[token] for state, token in zip(states, ids, strict=False))
            crossed = [state for state in states[:-1] if language.may_end(state)]
            assert crossed or added == pytest.approx(NATS[choice] - language.offset(b""))
    assert language.offsets(b"", torch.device("cpu"))[0].tolist() == list(language.moves(b""))
