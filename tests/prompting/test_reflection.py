"""What a reflection LM is shown: every call by number, the worst run first, and what came of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cotune.programs import DescribeThenDecide, Example, Program, Rollout, Score
from cotune.prompting.reflection import reflection
from fakes import FakeLM, Loop, asked, doubles, doubling, instruction, runner


def ran(program: Program, lm: FakeLM, examples: list[Example], **changes: Any) -> list[Rollout]:
    return runner(lm, program, **{"max_error_rate": 1.0, **changes}).run(examples, program.initial_prompts())


def shown(program: Program, stage: str, runs: list[Rollout], **options: Any) -> str:
    return reflection(program, stage, program.initial_prompts()[stage], runs, rules="RULES", **options)


def test_every_call_of_the_stage_is_shown_by_number() -> None:
    text = shown(Loop(3), "double", ran(Loop(3), FakeLM(doubling), doubles(5)))
    calls = [text.index(f'Call {n} of "double"\nIt was given\n  number: {5 * 2 ** (n - 1)}\n') for n in (1, 2, 3)]
    assert calls == sorted(calls)
    assert "Call 4" not in text


def test_failing_runs_come_first_and_errors_before_low_scores() -> None:
    def answer(request: Any) -> str:
        return {"1": "2", "2": "wrong", "3": ""}[asked(request, "number")]

    text = shown(Loop(1), "double", ran(Loop(1), FakeLM(answer), doubles(1, 2, 3)))
    places = [text.index(f"  number: {n}\n") for n in (3, 2, 1)]
    assert places == sorted(places)
    assert 'Error: stage "double": the completion has no "answer"' in text


def test_what_came_after_the_stage_is_shown() -> None:
    program = DescribeThenDecide("number -> answer", "Describe.", "Decide.")
    lm = FakeLM(lambda r: "a big one" if instruction(r) == "Describe." else "seven")
    text = shown(program, "describe", ran(program, lm, doubles(8), metric=lambda e, p: 0.0))
    call, later, result = (
        text.index(part) for part in ("  description: a big one", 'Then "decide" wrote', "The program's result")
    )
    assert call < later < result
    assert "  answer: seven\nScore: 0 of 1\nExpected\n  answer: 16" in text
    assert 'The instruction of "describe" now:\n```\nDescribe.\n```' in text
    assert "- decide: number, description -> answer" in text
    assert text.endswith("RULES")


def test_feedback_takes_the_place_of_what_was_expected() -> None:
    def metric(example: Example, prediction: Mapping[str, Any]) -> Score:
        return Score(0.25, "the unit is missing", stages={"double": "you forgot to carry"})

    text = shown(Loop(1), "double", ran(Loop(1), FakeLM(doubling), doubles(8), metric=metric))
    assert "Score: 0.25 of 1\nFeedback: you forgot to carry\nFeedback: the unit is missing" in text
    assert "Expected" not in text


def test_feedback_for_another_stage_is_not_shown() -> None:
    program = DescribeThenDecide("number -> answer", "Describe.", "Decide.")

    def metric(example: Example, prediction: Mapping[str, Any]) -> Score:
        return Score(0.0, stages={"decide": "no number"})

    runs = ran(program, FakeLM(lambda r: "x"), doubles(8), metric=metric)
    assert "no number" not in shown(program, "describe", runs)
    assert "Feedback: no number" in shown(program, "decide", runs)


def test_blank_feedback_is_none_and_huge_feedback_is_cut() -> None:
    for said, part in ((" \n", "Expected\n  answer: 16"), ("y" * 10**6, "characters left out")):
        runs = ran(Loop(1), FakeLM(doubling), doubles(8), metric=lambda e, p, said=said: Score(0.0, said))
        text = shown(Loop(1), "double", runs)
        assert part in text
        assert len(text) < 4000


def test_feedback_that_is_no_text_is_a_fault_of_the_metric_and_shown_as_one() -> None:
    runs = ran(Loop(1), FakeLM(doubling), doubles(8), metric=lambda e, p: Score(1.0, 7))  # type: ignore[arg-type]
    assert runs[0].score == 0
    assert "Error: the metric's feedback is 7, which is not text" in shown(Loop(1), "double", runs)


def test_a_stage_that_a_run_did_not_call_is_said_so() -> None:
    runs = ran(Loop(0), FakeLM(doubling), doubles(8), metric=lambda e, p: 0.0)
    assert '"double" was not called.' in shown(Loop(0), "double", runs)
