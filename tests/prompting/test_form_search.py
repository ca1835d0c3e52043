"""Claims about the form as a parameter of prompts: it is searched, and all that is made of the prompts is in it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cotune.datamodules.bootstrapping import Bootstrapping
from cotune.datamodules.collect import collect
from cotune.programs import Completion, Example, Predict, Request, Runner, Sampling, exact_match
from cotune.programs.form import ReasonThenFill
from cotune.programs.forms import form_named, form_of, in_form, names
from cotune.programs.prompt import prompts_from_dict, prompts_id, prompts_to_dict
from cotune.prompting import CalibratedSearch, FormSearch, Found, RandomDemoSearch, SearchTask
from cotune.reporting.prompt_changes import prompt_changes

from cotune.testing import FakeLM

SUMS = [Example.of({"question": f"{n} + {n}"}, {"answer": str(2 * n)}) for n in range(12)]
PROGRAM = Predict("question -> answer", reasoning=True)


def only_in_tags(request: Request) -> str:
    """Adds where it is asked for tags, and to answer straight away; else it talks."""
    asked = request.messages[0]["content"]
    if "<answer>" not in asked or "<reasoning>" in asked:
        return "I think so.\n\nanswer: I do not know"
    number = int(request.messages[-1]["content"].split(">")[1].split()[0])
    return f"<answer>{2 * number}</answer>"


def runner() -> Runner:
    return Runner(PROGRAM, FakeLM(only_in_tags), ReasonThenFill(), exact_match, Sampling(max_new_tokens=80), 1.0)


def test_the_form_that_does_best_is_found_and_searched_on_in() -> None:
    initial = PROGRAM.initial_prompts()
    task = SearchTask(runner(), initial, initial, SUMS[:6], SUMS[6:])
    found = FormSearch(["lines", "tags", "tags, straight"], RandomDemoSearch(num_candidates=1)).search(task)
    assert found.score == 1
    assert found.prompts["predict"].form == "tags, straight"
    why = [candidate.why for candidate in found.candidates]
    assert why[:4] == ["incumbent", "form: lines", "form: tags", "form: tags, straight"]
    assert any(one.prompts["predict"].demos for one in found.candidates)  # bootstrapped in that form
    assert prompts_from_dict(prompts_to_dict(found.prompts)) == found.prompts
    (change,) = prompt_changes(prompts_to_dict(initial), prompts_to_dict(in_form(initial, "tags")))
    assert change.changed


def test_what_the_forms_have_cost_is_not_spent_again_behind_them() -> None:
    initial = PROGRAM.initial_prompts()
    seen: list[int] = []

    class Seen(RandomDemoSearch):
        def search(self, task: SearchTask) -> Found:
            seen.append(task.lm_calls)
            return super().search(task)

    for asked in (0, 20, 100):
        task = SearchTask(runner(), initial, initial, SUMS[:6], SUMS[6:], lm_calls=asked)
        FormSearch(["lines", "tags"], Seen(num_candidates=0)).search(task)
    assert seen[:2] == [0, 2]  # three forms on six examples
    assert seen[2] == 82


def test_no_calibration_is_announced_for_a_program_without_choices() -> None:
    inside = RandomDemoSearch(num_candidates=1)
    around = FormSearch(["lines"], CalibratedSearch(inside))
    assert around.for_program(PROGRAM).most_runs(6, 6) == FormSearch(["lines"], inside).most_runs(6, 6)
    chooses = Predict("question -> answer: Literal['a', 'b']")
    assert around.for_program(chooses) is around


def test_traces_are_in_the_prompts_form() -> None:
    prompts = in_form(PROGRAM.initial_prompts(), "tags, straight")
    made = collect(SUMS, runner(), prompts, options=Bootstrapping(attempts=1), seed=0)
    (trace,) = made.traces(made.successes[3])
    assert trace.completion == "<answer>6</answer>"
    assert "<answer>" in trace.messages[0]["content"]


def test_prompts_without_a_form_of_their_own_are_as_before() -> None:
    initial = PROGRAM.initial_prompts()
    assert "form" not in prompts_to_dict(initial)["predict"]
    assert prompts_id(in_form(initial, "tags")) != prompts_id(initial) == prompts_id(in_form(initial, initial))


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("reasoning", [False, True])
def test_each_named_form_reads_what_it_writes(name: str, reasoning: bool) -> None:
    program = Predict("question -> answer: int, unit", reasoning=reasoning)
    signature = program.stages["predict"].signature
    form = form_of(ReasonThenFill(), replace(program.initial_prompts()["predict"], form=name))
    outputs = {"reasoning": "2 and 2", "answer": "4", "unit": "cm"}
    written = form.write(signature, {name: outputs[name] for name in signature.outputs})
    straight = "straight" in name
    assert ("2 and 2" in written) == (reasoning and not straight)
    expected = {name: "" if name == "reasoning" and straight else outputs[name] for name in signature.outputs}
    assert form.read(signature, Completion(text=written)) == expected
    assert form.unwritable(signature, outputs if reasoning else {"answer": "4", "unit": "cm"}) == ""


@pytest.mark.parametrize(("forms", "said"), [([], "forms is empty"), (["tag"], 'no form "tag"; the forms are')])
def test_forms_that_there_are_not_are_refused(forms: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FormSearch(forms)
    assert form_named("tags, straight").layout(PROGRAM.stages["predict"].signature)
