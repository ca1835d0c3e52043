"""Claims about calibration: what is taken off choices, and what becomes of it on the way to an LM."""

from __future__ import annotations

import math

import pytest
from cotune.programs import Predict, Prompt, Signature
from cotune.programs.calibration import calibrated, is_calibrated, offsets_of
from cotune.programs.form import ReasonThenFill
from cotune.programs.forms import in_form
from cotune.programs.json_form import Json
from cotune.programs.layout import Choices, Field
from cotune.programs.prompt import prompts_from_dict, prompts_id, prompts_to_dict

SIGNATURE = Signature.parse("text -> mood, answer", types={"mood": ["good", "bad"]})
LAYOUT = ReasonThenFill().layout(SIGNATURE)


def offsets(layout: object) -> dict[str, tuple[float, ...]]:
    assert isinstance(layout, tuple)
    return {p.name: p.syntax.offsets for p in layout if isinstance(p, Field) and isinstance(p.syntax, Choices)}


def test_offsets_lift_each_choice_to_the_same_mean() -> None:
    told = [{"good": math.log(0.9), "bad": math.log(0.1)}, {"good": math.log(0.99), "bad": math.log(0.01)}]
    nats = offsets_of(told, {})
    means = {choice: sum(one[choice] + nats[choice] for one in told) / 2 for choice in nats}
    assert means["good"] == pytest.approx(means["bad"], abs=1e-4)
    assert sum(nats.values()) == pytest.approx(0, abs=1e-3)
    # Told again with these in force, by an LM that decodes with them, there is nothing left to add.
    lifted = [{choice: log_p + nats[choice] for choice, log_p in one.items()} for one in told]
    assert offsets_of(lifted, nats) == pytest.approx(nats, abs=1e-3)


def test_a_choice_that_the_lm_never_takes_has_a_finite_offset() -> None:
    nats = offsets_of([{"good": 0.0, "bad": -math.inf}], {})
    assert nats == {"good": -50, "bad": 50}


def test_the_layout_carries_the_offsets_of_the_choices_that_are_named() -> None:
    assert offsets(calibrated(LAYOUT, {"mood": {"bad": 1.5}})) == {"mood": (0.0, 1.5)}
    assert calibrated(LAYOUT, {}) is LAYOUT
    assert is_calibrated(calibrated(LAYOUT, {"mood": {"bad": 1.5}}))
    assert not is_calibrated(LAYOUT)


@pytest.mark.parametrize(
    ("form", "calibration", "said"),
    [
        (ReasonThenFill(), {"mood": {"odd": 1.0}}, '"mood" names "odd"; its choices are good, bad'),
        (ReasonThenFill(), {"answer": {"yes": 1.0}}, '"answer" names "yes"; it has no choices'),
        (Json(), {"mood": {"bad": 1.0}}, "it has no choices in this form"),
    ],
)
def test_a_calibration_that_does_not_fit_the_form_is_refused(form: object, calibration: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        calibrated(form.layout(SIGNATURE), calibration)  # type: ignore[attr-defined, arg-type]


def test_it_goes_with_the_prompts_and_prompts_without_one_are_as_before() -> None:
    bare = Predict("text -> answer").initial_prompts()
    lifted = {"predict": Prompt(bare["predict"].instruction, calibration={"answer": {"a": 0.5}})}
    assert prompts_from_dict(prompts_to_dict(lifted)) == lifted
    assert prompts_id(lifted) != prompts_id(bare)
    assert "calibration" not in prompts_to_dict(bare)["predict"]


def test_it_stays_behind_in_another_form() -> None:
    lifted = {"predict": Prompt("Say.", calibration={"answer": {"a": 0.5}})}
    assert in_form(lifted, "") == lifted
    assert in_form(lifted, "json") == {"predict": Prompt("Say.", form="json")}
