"""Bootstrapping: what is a success, what becomes a demo, and what another attempt runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from cotune.programs import (
    Demo,
    Example,
    FaultyProgramError,
    Metric,
    Predict,
    Program,
    Prompt,
    Request,
    Sampling,
    exact_match,
)
from cotune.prompting import Bootstrapped, RandomDemoSearch, SearchTask, bootstrap
from fakes import Branch, FakeLM, Loop, asked, doubles, doubling, search_task, shown

WARM = Sampling(temperature=0.7)


def task(lm: FakeLM, program: Program, train: list[Example], **changes: Any) -> SearchTask:
    return search_task(lm, program, train=train, **{"dev": doubles(1000), **changes})


def run(lm: FakeLM, program: Program, train: list[Example], attempts: int = 1, **changes: Any) -> Bootstrapped:
    made = task(lm, program, train, **changes)
    return bootstrap(made, made.initial, attempts=attempts)


def sources(made: Bootstrapped) -> list[str]:
    return [solved.source for solved in made.solved]


def test_successes_become_demos_in_train_order() -> None:
    lm = FakeLM(lambda request: "7" if asked(request, "number") == "2" else doubling(request))
    made = run(lm, Loop(1), doubles(5, 2, 1))
    assert sources(made) == ["5", "1"]
    assert made.solved[0].demos == {"double": (Demo({"number": "5"}, {"answer": "10"}, source="5"),)}
    assert made.notes == ("bootstrap: 2 of 3 train examples solved (score at least 1)",)


def test_demos_of_texts_are_written_as_the_types_of_their_fields_write_them() -> None:
    lm = FakeLM(lambda request: f"{doubling(request)}.0.")
    made = run(lm, Predict("number -> answer: int"), doubles(5))
    assert made.solved[0].demos["predict"][0].outputs == {"answer": "10"}


def test_train_runs_in_one_batch_a_round() -> None:
    lm = FakeLM(doubling)
    run(lm, Loop(2), doubles(1, 2, 3))
    assert [len(batch) for batch in lm.batches] == [3, 3]


def test_a_stage_called_twice_gives_two_demos_of_one_name() -> None:
    made = run(FakeLM(doubling), Loop(2), [Example.of({"number": 3}, {"answer": "12"}, id="e")])
    assert made.solved[0].demos == {
        "double": (Demo({"number": "3"}, {"answer": "6"}, "e"), Demo({"number": "6"}, {"answer": "12"}, "e"))
    }


def test_a_stage_that_was_not_called_gives_none() -> None:
    rows = [Example.of({"number": 3}, {"answer": "6"}, id="odd"), Example.of({"number": 0}, {"answer": "0"}, id="zero")]
    made = run(FakeLM(doubling), Branch(), rows)
    assert [(one.source, list(one.demos)) for one in made.solved] == [("odd", ["double"]), ("zero", [])]


def give(score: float) -> Metric:
    def metric(example: Example, prediction: Mapping[str, Any]) -> float:
        return score

    return metric


@pytest.mark.parametrize(
    ("score", "threshold", "solved"), [(0.05, 1.0, 0), (0.99, 1.0, 0), (0.5, 0.5, 1), (1.0, 1.0, 1)]
)
def test_a_soft_score_succeeds_from_the_threshold_on(score: float, threshold: float, solved: int) -> None:
    made = run(FakeLM(doubling), Loop(1), doubles(1), metric=give(score), threshold=threshold)
    assert len(made.solved) == solved


def test_no_success_is_noted_with_the_best_score() -> None:
    made = run(FakeLM(doubling), Loop(1), doubles(1, 2), metric=give(0.25))
    assert made.notes == ("bootstrap: 0 of 2 train examples solved (score at least 1); the best score was 0.25",)


def test_a_parse_failure_is_never_a_success_however_low_the_threshold() -> None:
    made = run(FakeLM(lambda request: ""), Loop(1), doubles(1, 2), metric=give(1.0), threshold=1e-9)
    assert made.solved == ()
    assert "bootstrap: 2 format errors" in made.notes


def test_a_later_attempt_runs_the_unsolved_only_with_new_draws() -> None:
    tries: dict[str, int] = {}

    def stubborn(request: Request) -> str:
        number = asked(request, "number")
        tries[number] = tries.get(number, 0) + 1
        return doubling(request) if tries[number] >= int(number) else "no"

    lm = FakeLM(stubborn)
    made = run(lm, Loop(1), doubles(3, 1, 2, 9), attempts=3, sampling=WARM)
    assert [[asked(request, "number") for request in batch] for batch in lm.batches] == [
        ["3", "1", "2", "9"],
        ["3", "2", "9"],
        ["3", "9"],
    ]
    assert sources(made) == ["3", "1", "2"]  # train order, not the order of solving
    assert len({request.seed for request in lm.requests}) == lm.calls


def test_attempts_end_when_all_is_solved() -> None:
    lm = FakeLM(doubling)
    run(lm, Loop(1), doubles(1, 2), attempts=5, sampling=WARM)
    assert lm.calls == 2


def test_greedy_attempts_are_not_repeated_and_this_is_noted() -> None:
    lm = FakeLM(lambda request: "no")
    made = run(lm, Loop(1), doubles(1), attempts=3)
    assert lm.calls == 1
    assert "attempts 2 to 3 not run" in made.notes[-1]


def unlucky(example: Example, prediction: Mapping[str, Any]) -> float:
    if example.id == "13":
        raise RuntimeError("unlucky")
    return exact_match(example, prediction)


def test_faults_among_the_unsolved_are_not_taken_for_a_faulty_program() -> None:
    # Of train one in three faults; of what the second attempt runs, all.
    made = run(FakeLM(doubling), Loop(1), doubles(1, 13, 2), attempts=2, sampling=WARM, metric=unlucky)
    assert sources(made) == ["1", "2"]
    assert "bootstrap: 1 metric errors" in made.notes
    with pytest.raises(FaultyProgramError, match="unlucky"):
        run(FakeLM(doubling), Loop(1), doubles(13), metric=unlucky)


def test_an_example_does_not_see_its_own_demo_while_bootstrapping() -> None:
    lm = FakeLM(doubling)
    demos = tuple(Demo({"number": n}, {"answer": str(2 * int(n))}, source=n) for n in "12")
    made = task(lm, Loop(1), doubles(1, 2, 3), incumbent={"double": Prompt("Double.", demos)})
    bootstrap(made, made.incumbent)
    assert [shown(request) for request in lm.requests] == [1, 1, 2]


def test_equal_rows_of_train_run_once() -> None:
    lm = FakeLM(doubling)
    assert sources(run(lm, Loop(1), doubles(1, 2, 1))) == ["1", "2"]
    assert lm.calls == 2


def test_no_train_no_demos_no_error() -> None:
    assert run(FakeLM(doubling), Loop(1), []).solved == ()


def test_fewer_attempts_than_one_are_refused() -> None:
    with pytest.raises(ValueError, match="attempts 0 is below 1"):
        run(FakeLM(doubling), Loop(1), doubles(1), attempts=0)


# -- stages that reason

REASONING = Predict("number -> answer", reasoning=True)


def thinks_when_told(request: Request) -> str:
    """Solves 1 by itself, the others only when it is shown the answer; about 3 it speaks of the hint."""
    number = asked(request, "number")
    told = "the final result should be" in request.messages[0]["content"]
    if number != "1" and not told:
        return "reasoning: no idea\nanswer: 0"
    return f"reasoning: {'as the hint says' if number == '3' else 'twice'} {number}\nanswer: {2 * int(number)}"


def test_reasoning_that_is_missing_is_made_with_the_gold_answer_as_a_hint() -> None:
    made = bootstrap(task(FakeLM(thinks_when_told), REASONING, doubles(1, 2, 3)), REASONING.initial_prompts(), enough=3)
    assert [(one.source, one.hinted) for one in made.solved] == [("1", False), ("2", True)]
    (demo,) = made.solved[1].demos["predict"]
    assert demo.outputs == {"reasoning": "twice 2", "answer": "4"}
    assert "bootstrap: 1 of 2 unsolved examples gave reasoning once shown the gold answer" in made.notes


def test_hints_are_not_given_where_enough_is_solved_or_nothing_reasons() -> None:
    lm = FakeLM(thinks_when_told)
    bootstrap(task(lm, REASONING, doubles(1, 2)), REASONING.initial_prompts(), enough=1)
    assert lm.calls == 2
    lm = FakeLM(lambda request: "no")
    bootstrap(task(lm, Loop(1), doubles(1, 2)), Loop(1).initial_prompts(), enough=3)
    assert lm.calls == 2


def test_a_stage_that_reasons_is_shown_no_labels_without_reasoning() -> None:
    found = RandomDemoSearch(num_candidates=2).search(task(FakeLM(thinks_when_told), REASONING, doubles(1, 2, 3)))
    demos = [demo for candidate in found.candidates for demo in candidate.prompts["predict"].demos]
    assert demos
    assert all(demo.outputs["reasoning"] for demo in demos)
    assert '"labels-only" skipped: there are no demos for it' in found.notes


def test_demos_that_the_form_cannot_write_are_never_offered_and_are_counted() -> None:
    broken = "4\nnumber: 5"
    lm = FakeLM(lambda request: doubling(request) if asked(request, "number") != "1" else "Answer: Answer: 2")
    train = [*doubles(1, 3), Example.of({"number": 2}, {"answer": broken}, id="2")]
    made = task(lm, Loop(1), train, metric=lambda example, prediction: 1.0)
    found = RandomDemoSearch(num_candidates=2).search(made)
    demos = [demo.outputs["answer"] for candidate in found.candidates for demo in candidate.prompts["double"].demos]
    assert demos
    assert broken not in demos
    assert "Answer: 2" not in demos
    assert any(note.startswith("1 of 3 demos of runs left out") for note in found.notes)
    assert any(note.startswith("1 of 3 labelled demos left out") for note in found.notes)
