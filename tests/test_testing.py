"""The fakes that come with the package: the engine fills in forms as any other, by what a function says."""

from __future__ import annotations

from pathlib import Path

from cotune.lightning_modules import LanguageModel
from cotune.programs import Completion, Request, Sampling
from cotune.programs.layout import Choices, Field, Fixed

from cotune.testing import FakeEngine


def completed(model: Path, *answers: dict[str, str]) -> list[Completion]:
    said = iter(answers)
    lm = LanguageModel(str(model))
    lm.use(FakeEngine(lambda prompt: next(said)))
    lm.load(seed=0)
    layout = (
        Fixed("why:"),
        Field("why", " ", ("\n",)),
        Fixed("\nanswer:"),
        Field("answer", " ", syntax=Choices(("red", "blue"))),
    )
    request = Request(({"role": "user", "content": "Which?"},), layout=layout)
    return lm.complete([request] * len(answers), Sampling(max_new_tokens=60))


def test_the_engine_writes_what_it_is_told_in_the_fields_of_the_form(tiny_model: Path) -> None:
    (done,) = completed(tiny_model, {"why": "so", "answer": "blue"})
    assert done.text == "why: so\nanswer: blue"
    assert {field.name: field.text.strip() for field in done.fields} == {"why": "so", "answer": "blue"}


def test_a_constraint_holds_whatever_it_is_told(tiny_model: Path) -> None:
    (done,) = completed(tiny_model, {"why": "so", "answer": "green"})
    assert done.fields[-1].text in (" red", " blue")
