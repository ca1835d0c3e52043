"""Claims about calibrated search: an LM with a favourite answer is heard out, and nothing is claimed where none is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cotune.callbacks.loggers.program_tables import prompt_text
from cotune.programs import Completion, Example, Filled, Predict, Program, Request, Runner, Sampling, Stage, exact_match
from cotune.programs.form import ReasonThenFill
from cotune.programs.json_form import Json
from cotune.programs.layout import Choices, Field
from cotune.programs.prompt import prompts_to_dict
from cotune.programs.ranks import Ranks
from cotune.prompting import CalibratedSearch, Found, RandomDemoSearch, SearchTask
from cotune.reporting.prompt_changes import prompt_changes
from side_by_side import side_by_side

from cotune.testing import FakeLM

MOODS = {"good": ["sunny", "warm"], "bad": ["rainy", "cold"]}
ROWS = [
    Example.of({"text": f"{word} {n}"}, {"answer": mood})
    for n in range(4)
    for mood, words in MOODS.items()
    for word in words
]
PROGRAM = Predict("text -> answer", types={"answer": list(MOODS)})


def log_probs(request: Request) -> dict[str, float]:
    """Twice as likely where the text says so, and a favourite that drowns it."""
    text = request.messages[-1]["content"]
    return {mood: any(word in text for word in MOODS[mood]) * 0.7 + 5.0 * (mood == "good") for mood in MOODS}


def favouring(request: Request) -> Completion:
    """Answers as it would decode: with the request's offsets, and with chances where they are asked for."""
    (field,) = (part for part in request.layout if isinstance(part, Field))
    assert isinstance(field.syntax, Choices)
    offsets = field.syntax.offsets or (0.0, 0.0)
    nats = {mood: nat + more for (mood, nat), more in zip(log_probs(request).items(), offsets, strict=True)}
    said = max(nats, key=nats.__getitem__)
    chances: Mapping[str, Mapping[str, float]] = {"answer": nats} if request.chances else {}
    return Completion(said, (1,), (2,), fields=(Filled("answer", said, 0, 1, "complete"),), chances=chances)


def task(program: Program = PROGRAM, lm: FakeLM | None = None, lm_calls: int = 0) -> SearchTask:
    runner = Runner(program, lm or FakeLM(favouring), ReasonThenFill(), exact_match, Sampling(), 1.0)
    prompts = program.initial_prompts()
    return SearchTask(runner, prompts, prompts, ROWS[:8], ROWS[8:], lm_calls=lm_calls)


def test_without_a_label_the_favourite_is_taken_off() -> None:
    found = CalibratedSearch(RandomDemoSearch(num_candidates=1)).search(task())
    assert found.score == 1
    assert [one.score for one in found.candidates[:2]] == [0.5, 1]
    assert found.candidates[1].why == "calibrated zero-shot"
    nats = found.prompts["predict"].calibration["answer"]
    assert nats["bad"] - nats["good"] > 4
    (change,) = prompt_changes(*(prompts_to_dict(one.prompts) for one in found.candidates[:2]))
    assert change.changed  # as a report shows it
    assert "Calibration: nats on answer: good -" in prompt_text(found.prompts["predict"])
    # What the search inside tries is built upon them.
    assert all(one.prompts["predict"].calibration for one in found.candidates[1:])


def test_calls_for_calibration_are_counted() -> None:
    seen: list[tuple[int, int]] = []
    lm = FakeLM(favouring)

    class Seen(RandomDemoSearch):
        def search(self, task: SearchTask) -> Found:
            seen.append((lm.calls, task.lm_calls))
            return super().search(task)

    CalibratedSearch(Seen(num_candidates=0), anew=1).search(task(lm=lm, lm_calls=300))
    (_, own_size), (made, left) = seen
    assert own_size == 0
    assert made + left == 300, "what is left after the calibrations goes to the search inside once more"
    assert CalibratedSearch(anew=1).most_runs(8, 8) is not None


def test_an_lm_that_tells_no_chances_is_searched_as_it_is_and_that_is_said() -> None:
    lm = FakeLM(lambda _: "good")
    found = CalibratedSearch(RandomDemoSearch(num_candidates=1)).search(task(lm=lm))
    other = FakeLM(lambda _: "good")
    plain = RandomDemoSearch(num_candidates=1).search(task(lm=other))
    assert found.prompts == plain.prompts
    assert any("nothing was calibrated: the LM tells no probabilities" in note for note in found.notes)
    assert lm.calls - other.calls == 2


class Late(Program):
    """Asks only about what is beyond the first inputs of train."""

    predict = PROGRAM.predict
    asked = 4

    def run(self, text: str):  # type: ignore[no-untyped-def]  # a generator of calls
        if text in [row.inputs["text"] for row in ROWS[: 8 - self.asked]]:
            return {"answer": "good"}
        return (yield self.predict(text=text))


class Hardly(Late):
    asked = 1


def test_a_stage_that_the_first_inputs_do_not_reach_is_calibrated_and_one_that_none_reaches_is_said() -> None:
    found = CalibratedSearch(RandomDemoSearch(num_candidates=0)).search(task(Late()))
    assert found.prompts["predict"].calibration
    assert not any("nothing was calibrated" in note for note in found.notes)
    lm = FakeLM(lambda request: '{"answer": "good"}')
    calibrated = CalibratedSearch(RandomDemoSearch(num_candidates=0))
    assert "no stage filled in its choices twice (train inputs run: 8)" in calibrated.search(task(Hardly())).notes[0]
    assert "it takes a form with a place for each field" in calibrated.search(in_json(task(lm=lm))).notes[0]
    assert not any(request.chances for request in lm.requests)


def in_json(given: SearchTask) -> SearchTask:
    return replace(given, runner=replace(given.runner, form=Json()))


def test_a_program_without_choices_costs_nothing_more() -> None:
    program, lms = Predict("text -> answer"), (FakeLM(lambda _: "good"), FakeLM(lambda _: "good"))
    found = CalibratedSearch(RandomDemoSearch(num_candidates=1)).search(task(program, lms[0]))
    assert found == RandomDemoSearch(num_candidates=1).search(task(program, lms[1]))
    assert lms[0].calls == lms[1].calls


class Twice(Program):
    """Two stages with choices; the second sees what the first says."""

    first = Stage(PROGRAM.predict.signature)
    second = Stage(PROGRAM.predict.signature)

    def run(self, text: str):  # type: ignore[no-untyped-def]  # a generator of calls
        mood = yield self.first(text=text)
        return (yield self.second(text=f"{text} {mood['answer']}"))


def test_all_stages_are_calibrated() -> None:
    found = CalibratedSearch(RandomDemoSearch(num_candidates=0)).search(task(Twice()))
    assert found.score == 1
    assert all(prompt.calibration["answer"]["bad"] > 0 for prompt in found.prompts.values())


def test_several_processes_calibrate_alike_and_count_alike() -> None:
    def run(ranks: Ranks) -> tuple[object, int]:
        seen: list[int] = []

        class Seen(RandomDemoSearch):
            def search(self, task: SearchTask) -> Found:
                seen.append(task.lm_calls)
                return super().search(task)

        mine = task(lm_calls=100)
        mine = replace(mine, runner=replace(mine.runner, ranks=ranks))
        return CalibratedSearch(Seen(num_candidates=1)).search(mine), seen[-1]

    assert side_by_side(2, run) == [run(Ranks())] * 2
