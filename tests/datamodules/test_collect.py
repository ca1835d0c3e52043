"""Collecting traces: which runs are made, which succeed, what is kept of them, and what is counted."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cotune.datamodules import (
    Bootstrapping,
    Collected,
    Report,
    Runs,
    Trace,
    Vocabulary,
    collect,
    collect_runs,
    load_traces,
    save_traces,
)
from cotune.lightning_modules.objectives import DPO, GRPO, KTO, Distil, Objective, Rejection
from cotune.programs import (
    BudgetedLM,
    Completion,
    Demo,
    Example,
    FaultyProgramError,
    Ledger,
    Predict,
    Program,
    Prompt,
    Request,
    Sampling,
    Signature,
    Stage,
    exact_match,
    prompts_id,
)
from cotune.programs.calibration import is_calibrated
from cotune.programs.lm import Filled
from cotune.storage.durable import DamagedFileError
from datasets import load_from_disk
from fakes import EOS, Branch, FakeLM, Loop, asked, doubles, doubling, runner, shown

_OPTIONS = (
    "threshold",
    "fresh_demos",
    "temperature",
    "traces_per_example",
    "hints",
    "gold_answers",
    "cut_traces",
    "teacher",
)


def run(
    lm: FakeLM, examples: list[Example], program: Program | None = None, *, attempts: int = 1, **changes: Any
) -> tuple[list[Trace], Report]:
    options = {name: changes.pop(name) for name in _OPTIONS if name in changes}
    program = program or Loop(1)
    prompts, given = changes.pop("prompts", program.initial_prompts()), {"seed": 0}
    given |= {name: changes.pop(name) for name in ("seed", "progress", "vocabulary") if name in changes}
    made = runner(lm, program, **changes)
    collected = collect(examples, made, prompts, options=Bootstrapping(attempts=attempts, **options), **given)
    traces = Rejection().rows(collected)
    return traces, collected.report(traces)


def numbers(lm: FakeLM) -> list[list[str]]:
    """The numbers asked, batch by batch."""
    return [[asked(request, "number") for request in batch] for batch in lm.batches]


def demo_inputs(request: Request) -> list[str]:
    """The numbers that the request's demos show."""
    users = [message["content"] for message in request.messages if message["role"] == "user"]
    return [content.removeprefix("number: ") for content in users[:-1]]


def with_demos(*sources: str) -> dict[str, Prompt]:
    demos = tuple(Demo({"number": n}, {"answer": str(2 * int(n))}, source=n) for n in sources)
    return {"double": Prompt("Double.", demos)}


def succeeds_at(attempts: Mapping[str, int]) -> FakeLM:
    """Right from an example's attempt of that number on."""
    tries: Counter[str] = Counter()

    def answer(request: Request) -> str:
        number = asked(request, "number")
        tries[number] += 1
        return doubling(request) if tries[number] > attempts[number] else "no"

    return FakeLM(answer)


# Which runs are made


def test_the_first_attempt_uses_the_current_prompts_and_sampling() -> None:
    lm = FakeLM(doubling)
    cool = Sampling(temperature=0.2, top_p=0.5, max_new_tokens=7)
    run(lm, doubles(1, 2), prompts=with_demos("8", "9"), sampling=cool, attempts=3)
    assert [demo_inputs(request) for request in lm.requests] == [["8", "9"]] * 2
    assert lm.samplings == [cool]


def test_later_attempts_draw_fresh_demos_and_warmer() -> None:
    lm = FakeLM(lambda request: "no")
    run(
        lm,
        doubles(*range(30)),
        prompts=with_demos("88", "99"),
        attempts=3,
        fresh_demos=3,
        temperature=0.7,
        sampling=Sampling(max_new_tokens=9),
    )
    later = [request for batch in lm.batches[1:] for request in batch]
    assert all(shown(request) == 3 for request in later)
    assert not {"88", "99"} & {n for request in later for n in demo_inputs(request)}
    draws = [{tuple(demo_inputs(request)) for request in batch} for batch in lm.batches[1:]]
    assert draws[0] != draws[1]
    assert lm.samplings[1:] == [Sampling(temperature=0.7, top_p=1.0, max_new_tokens=9)] * 2


def test_without_fresh_demos_later_attempts_keep_the_prompts_and_draw_anew() -> None:
    lm = FakeLM(lambda request: "no")
    run(lm, doubles(1), prompts=with_demos("8"), attempts=3, fresh_demos=0)
    assert [demo_inputs(request) for request in lm.requests] == [["8"]] * 3
    assert len({request.seed for request in lm.requests}) == 3


@pytest.mark.parametrize("attempts", [1, 4])
@pytest.mark.parametrize("fresh_demos", [0, 1, 3])
def test_no_run_sees_a_demo_of_its_own_example(attempts: int, fresh_demos: int) -> None:
    lm = FakeLM(lambda request: "no" if int(asked(request, "number")) % 3 else doubling(request))
    rows = doubles(*range(20))
    run(lm, rows, prompts=with_demos(*map(str, range(20))), attempts=attempts, fresh_demos=fresh_demos)
    assert sum(map(shown, lm.requests)) > 0
    assert not any(asked(request, "number") in demo_inputs(request) for request in lm.requests)


def test_a_stage_with_nothing_to_draw_keeps_its_demos_but_not_the_examples_own() -> None:
    rows = [Example.of({"number": n}, {"other": "x"}, id=str(n)) for n in (1, 2)]  # no label that fits the stage
    lm = FakeLM(lambda request: "no")
    run(lm, rows, prompts=with_demos("1", "2", "3"), attempts=2, metric=lambda e, p: 0.0)
    assert [demo_inputs(request) for request in lm.requests] == [["2", "3"], ["1", "3"]] * 2


def test_only_the_unsolved_run_again_and_only_until_all_are_solved() -> None:
    lm = succeeds_at({"3": 2, "1": 0, "2": 1})
    traces, report = run(lm, doubles(3, 1, 2), attempts=9)
    assert numbers(lm) == [["3", "1", "2"], ["3", "2"], ["3"]]
    assert [(trace.example, trace.attempt) for trace in traces] == [("1", 0), ("2", 1), ("3", 2)]
    assert report == Report(examples=3, solved_at_attempt=[1, 1, 1], runs=6, wrong=3)


def test_attempts_end() -> None:
    lm = FakeLM(lambda request: "no")
    traces, report = run(lm, doubles(1, 2), attempts=3)
    assert (traces, lm.calls, report.solved) == ([], 6, 0)


def test_the_seed_decides_everything() -> None:
    def requests(seed: int) -> list[tuple[Any, int]]:
        lm = FakeLM(lambda request: "no")
        run(lm, doubles(*range(9)), attempts=3, seed=seed)
        return [(request.messages, request.seed) for request in lm.requests]

    assert requests(1) == requests(1)
    assert requests(1) != requests(2)


def test_successes_serve_as_demos_of_later_attempts() -> None:
    class Guess(Predict):
        """Its output has no label, so that demos can come from successes alone."""

    lm = FakeLM(lambda request: "7" if asked(request, "number") == "7" or shown(request) else "no")
    rows = [Example.of({"number": n}, {"sum": "7"}, id=str(n)) for n in (7, 8)]
    said = Guess("number -> guess")
    _, report = run(lm, rows, said, attempts=2, metric=lambda e, p: float(p["guess"] == "7"))
    assert report.solved_at_attempt == [1, 1]
    assert demo_inputs(lm.requests[-1]) == ["7"]


# What is a success


def test_a_parse_failure_is_never_a_success() -> None:
    traces, report = run(FakeLM(lambda request: ""), doubles(1, 2), metric=lambda e, p: 1.0, threshold=1e-9)
    assert (traces, report.format, report.solved) == ([], 2, 0)


@pytest.mark.parametrize(
    ("score", "threshold", "solved"), [(0.05, 1.0, 0), (0.99, 1.0, 0), (0.5, 0.5, 1), (1.0, 1.0, 1)]
)
def test_a_soft_score_succeeds_from_the_threshold_on(score: float, threshold: float, solved: int) -> None:
    traces, report = run(FakeLM(doubling), doubles(1), metric=lambda e, p: score, threshold=threshold)
    assert len(traces) == report.solved == solved
    assert report.wrong == 1 - solved


def test_a_success_with_any_call_cut_at_max_new_tokens_is_not_learnt_from() -> None:
    def answer(request: Request) -> str | Completion:
        text = doubling(request)
        return Completion(text, (1,), tuple(text.encode()), "length") if asked(request, "number") == "3" else text

    rows = [Example.of({"number": n}, {"answer": str(4 * n)}, id=str(n)) for n in (3, 5)]
    traces, report = run(FakeLM(answer), rows, Loop(2))
    assert {trace.example for trace in traces} == {"5"}
    assert (report.cut, report.solved, report.runs) == (1, 1, 2)


def faulty(example: Example, prediction: Mapping[str, Any]) -> float:
    if example.id == "13":
        raise RuntimeError("unlucky")
    return exact_match(example, prediction)


def test_faults_among_the_unsolved_are_not_taken_for_a_faulty_program() -> None:
    # Of train one in three faults; of what the second attempt runs, all.
    traces, report = run(FakeLM(doubling), doubles(1, 13, 2), attempts=3, metric=faulty)
    assert [trace.example for trace in traces] == ["1", "2"]
    assert (report.metric, report.runs) == (3, 5)


def test_a_faulty_program_stops_the_run() -> None:
    with pytest.raises(FaultyProgramError, match="unlucky"):
        run(FakeLM(doubling), doubles(13), metric=faulty)


def test_the_counts_add_up() -> None:
    answers = {"1": "2", "2": "", "3": "no", "13": "26", "20": "40"}

    def answer(request: Request) -> str | Completion:
        text = answers[asked(request, "number")]
        cut = asked(request, "number") == "20"
        return Completion(text, (1,), (2,), "length") if cut else text

    _, report = run(FakeLM(answer), doubles(1, 2, 3, 13, 20), attempts=3, metric=faulty)
    first = {"metric": {"count": 3, "example": "13", "message": "the metric raised RuntimeError: unlucky"}}
    assert report == Report(5, [1, 0, 0], runs=5 + 4 + 4, wrong=3, format=3, metric=3, cut=3, cut_off=3, faults=first)
    assert report.solved + report.wrong + report.format + report.program + report.metric + report.cut == report.runs
    assert str(report) == (
        "1 of 5 examples solved in 13 runs "
        "(failed: 3 wrong answer, 3 right but cut at the limit, 3 no answer, 3 metric faults; "
        "3 of these were cut at model.sampling.max_new_tokens)"
    )


def test_progress_is_told_of_every_example_once() -> None:
    told: list[int] = []
    run(succeeds_at({"1": 0, "2": 1, "3": 9}), doubles(1, 2, 3), attempts=3, progress=told.append)
    assert told == [1, 1, 1]


# What is kept


def test_every_stage_call_of_a_passing_run_is_kept_in_order() -> None:
    rows = [Example.of({"number": 3}, {"answer": "12"}, id="e")]
    traces, _ = run(FakeLM(doubling), rows, Loop(2))
    assert [(t.stage, t.call, t.inputs, t.outputs) for t in traces] == [
        ("double", 0, {"number": "3"}, {"answer": "6"}),
        ("double", 1, {"number": "6"}, {"answer": "12"}),
    ]
    assert [(t.completion, t.completion_ids, t.complete) for t in traces] == [
        ("6", (*b"6", EOS), True),
        ("12", (*b"12", EOS), True),
    ]


def test_stages_that_were_not_called_leave_no_trace() -> None:
    rows = [Example.of({"number": 3}, {"answer": "6"}, id="odd"), Example.of({"number": 4}, {"answer": "2"}, id="even")]
    halved = FakeLM(lambda request: "2" if asked(request, "number") == "4" else "6")
    traces, _ = run(halved, rows, Branch())
    assert [(t.example, t.stage) for t in traces] == [("odd", "double"), ("even", "halve")]


class Planned(Program):
    """A plan, then an answer by it."""

    first = Stage(Signature.parse("number -> plan", instruction="plan"))
    second = Stage(Signature.parse("plan -> answer", instruction="answer"))

    def run(self, number: str) -> Any:
        made = yield self.first(number=number)
        return (yield self.second(plan=made.plan))


def runs_of(lm: FakeLM, program: Program, examples: list[Example], each: int, **changes: Any) -> Collected:
    made = runner(lm, program, **changes)
    given: dict[str, Any] = {"runs": Runs(each), "options": Bootstrapping(), "seed": 0}
    return collect_runs(examples, made, program.initial_prompts(), **given)


@pytest.mark.parametrize("objective", [KTO(), DPO(), GRPO()], ids=lambda o: type(o).__name__)
def test_runs_that_the_users_own_code_broke_off_are_no_bad_examples(objective: Objective) -> None:
    calls = itertools.count()

    def breaks_down(example: Example, prediction: Any) -> float:
        if next(calls) % 5 == 0:
            raise OSError("no connection")
        return float(prediction.answer != "no")

    texts = iter(["no", "right"] * 6)
    found = runs_of(FakeLM(lambda request: next(texts)), Loop(1), doubles(1, 2, 3), 4, metric=breaks_down)
    broken = [a for a in found.attempts if a.rollout.error is not None]
    assert len(broken) == 3
    rows = objective.rows(found)
    assert rows
    assert not {(a.example, a.number) for a in broken} & {(row.example, row.attempt) for row in rows}
    if not isinstance(objective, DPO):
        assert len(rows) == 9


def test_of_equal_completions_a_preference_counts_the_mean_of_the_scores() -> None:
    script = [("A", "2"), ("A", "2"), ("A", "2"), ("A", "no"), ("B", "no"), ("B", "no"), ("B", "no"), ("B", "2")]
    texts = iter([text for pair in script for text in pair])
    found = runs_of(FakeLM(lambda request: next(texts)), Planned(), doubles(1), 8)
    better, worse = [row for row in DPO().rows(found) if row.stage == "first"]
    assert (better.completion, better.score, worse.completion, worse.score) == ("A", 0.75, "B", 0.25)


@pytest.mark.parametrize(
    "objective", [KTO(runs=2), DPO(runs=2), GRPO(runs=2), Distil(runs=2)], ids=lambda o: type(o).__name__
)
def test_objectives_learn_of_stages_that_were_called_and_of_calls_with_a_choice(objective: Objective) -> None:
    rows = [Example.of({"number": 3}, {"answer": "6"}, id="odd"), Example.of({"number": 4}, {"answer": "2"}, id="even")]
    assert objective.runs is not None

    def learnt(answer: Callable[[Request], str | Completion]) -> list[Trace]:
        made, prompts = runner(FakeLM(answer), Branch()), Branch().initial_prompts()
        return objective.rows(
            collect_runs(rows, made, prompts, runs=objective.runs, options=Bootstrapping(), seed=0)  # type: ignore[arg-type]
        )

    tries: Counter[str] = Counter()

    def right_at_first(request: Request) -> str:
        tries[number := asked(request, "number")] += 1
        return "0" if tries[number] > 1 else {"3": "6", "4": "2"}[number]

    assert Counter((t.example, t.stage) for t in learnt(right_at_first)) == {("odd", "double"): 2, ("even", "halve"): 2}
    assert learnt(lambda request: replace(filled("1", "eos"), forced=(True,) * 3)) == []


def test_a_completion_that_ended_by_a_stop_string_is_not_complete() -> None:
    (trace,), _ = run(FakeLM(lambda request: doubling(request) + "\nnumber: 9"), doubles(4))
    assert (trace.completion, trace.completion_ids, trace.complete) == ("8", tuple(b"8"), False)


def test_a_trace_names_the_prompts_and_holds_the_messages_it_was_generated_from() -> None:
    lm, prompts = FakeLM(doubling), with_demos("8")
    (trace,), _ = run(lm, doubles(1), prompts=prompts)
    assert trace.prompts == prompts_id(prompts)
    assert trace.messages == lm.requests[0].messages
    assert trace.demo == Demo({"number": "1"}, {"answer": "2"}, "1")


# On disk


def some_traces() -> list[Trace]:
    lm = FakeLM(lambda request: doubling(request) + ("\nnumber:" if asked(request, "number") == "2" else " "))
    rows = [Example.of({"number": n}, {"answer": str(4 * n)}, id=str(n)) for n in (1, 2, 30)]
    return run(lm, rows, Loop(2))[0]


def test_traces_come_back_from_disk_as_they_went(tmp_path: Path) -> None:
    traces = some_traces()
    assert len(traces) == 6
    save_traces(traces, tmp_path / "traces")
    assert load_traces(tmp_path / "traces", Loop(2)) == traces


def test_traces_of_a_program_without_their_stage_are_refused(tmp_path: Path) -> None:
    save_traces(some_traces(), tmp_path / "traces")
    said = r'another program: stage "double" \(number -> answer\); this program has "predict" \(question -> answer\)'
    with pytest.raises(ValueError, match=said):
        load_traces(tmp_path / "traces", Predict("question -> answer"))


def test_traces_fit_another_program_with_the_same_stage(tmp_path: Path) -> None:
    save_traces(some_traces(), tmp_path / "traces")
    assert load_traces(tmp_path / "traces", Branch()) == some_traces()


@pytest.mark.parametrize("signature", ["number, hint -> answer", "number -> reasoning, answer", "number -> result"])
def test_traces_of_a_stage_with_other_fields_are_refused(tmp_path: Path, signature: str) -> None:
    class Other(Program):
        double = Stage(Signature.parse(signature))

        def run(self, **inputs: Any) -> Any:
            return (yield self.double(**inputs))

    save_traces(some_traces(), tmp_path / "traces")
    with pytest.raises(ValueError, match="are of another program"):
        load_traces(tmp_path / "traces", Other())


def test_damaged_traces_are_refused_and_those_saved_anew_are_not(tmp_path: Path) -> None:
    traces, _ = run(FakeLM(doubling), doubles(1, 2))
    save_traces(traces, tmp_path / "step-1")
    load_from_disk(str(tmp_path / "step-1")).save_to_disk(str(tmp_path / "mine"))
    assert load_traces(tmp_path / "mine", Loop(1)) == traces
    (arrow,) = (tmp_path / "step-1").glob("*.arrow")
    data = bytearray(arrow.read_bytes())
    data[len(data) // 2] ^= 1
    arrow.write_bytes(data)
    with pytest.raises(DamagedFileError, match=r"step-1/.*arrow is not what was written .* Start over with --fresh"):
        load_traces(tmp_path / "step-1", Loop(1))


def test_a_folder_without_traces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no traces; give a folder that a run wrote"):
        load_traces(tmp_path / "none", Loop(1))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"attempts": 0}, "attempts 0"),
        ({"fresh_demos": -1}, "fresh_demos -1"),
        ({"threshold": 0.0}, "failed run would count"),
        ({"threshold": 1.5}, "threshold 1.5"),
        ({"demo_share": 1.5}, "demo_share 1.5"),
        ({"demo_share": 0.5, "fresh_demos": 0}, "needs fresh_demos"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Bootstrapping(**settings)


# Several traces an example, and hints


def test_an_example_gives_as_many_traces_as_asked_for_and_a_repetition_does_not_count() -> None:
    said = {"1": ["2", "2", "2.", "2"], "2": ["no", "4", "4", "4"]}
    lm = FakeLM(lambda request: said[asked(request, "number")][len(lm.batches) - 1])
    traces, report = run(lm, doubles(1, 2), attempts=4, traces_per_example=2)
    assert [(trace.example, trace.attempt, trace.completion) for trace in traces] == [
        ("1", 0, "2"),
        ("2", 1, "4"),
        ("1", 2, "2."),
    ]
    assert numbers(lm) == [["1", "2"], ["1", "2"], ["1", "2"], ["2"]]
    assert report == Report(2, [1, 1, 0, 0], runs=7, wrong=1, more=1, repeated=3)
    assert report.solved == 2


def test_only_examples_without_any_success_get_a_hint_and_no_pair_holds_it() -> None:
    def told(request: Request) -> str:
        system = request.messages[0]["content"]
        return "4" if "answer: 4" in system else "2" if asked(request, "number") == "1" else "no"

    lm = FakeLM(told)
    traces, report = run(lm, doubles(1, 2, 3), attempts=2, traces_per_example=2, hints=3)
    assert numbers(lm) == [["1", "2", "3"], ["1", "2", "3"], ["2", "3"], ["3"], ["3"]]
    assert [(trace.example, trace.hinted) for trace in traces] == [("1", False), ("2", True)]
    assert (report.solved, report.hinted, report.solved_at_attempt) == (2, 1, [1, 0, 1, 0, 0])
    assert "2 of 3 examples solved, 1 of them with a hint" in str(report)
    assert all(("Hint" in request.messages[0]["content"]) == (n >= 6) for n, request in enumerate(lm.requests))
    assert traces[1].inputs == {"number": "2"}  # what a pair is rendered from
    assert "Hint" not in str(traces[1].outputs)


def test_a_hint_has_the_whole_of_a_list_and_the_first_of_several_right_answers() -> None:
    for kind, said in (("list[str]", 'answer: ["4","four"].'), ("str", "answer: 4.")):
        lm = FakeLM(lambda request: "no")
        example = Example.of({"number": "2"}, {"answer": ["4", "four"]}, id="2")
        run(lm, [example], attempts=1, hints=1, program=Predict("number -> answer", types={"answer": kind}))
        assert said in lm.requests[-1].messages[0]["content"]


def test_a_run_that_speaks_of_the_hint_is_counted_and_not_trained_on() -> None:
    def told(request: Request) -> str:
        number = int(asked(request, "number"))
        if "Hint" not in request.messages[0]["content"]:
            return "reasoning: no idea\nanswer: 0"
        return f"reasoning: {'as the Hint says' if number == 2 else 'twice'}\nanswer: {2 * number}"

    reasoning = Predict("number -> answer", reasoning=True)
    traces, report = run(FakeLM(told), doubles(1, 2), attempts=1, hints=1, program=reasoning)
    assert [(trace.example, trace.hinted) for trace in traces] == [("1", True)]
    assert (report.solved, report.wrong, report.retold, report.runs) == (1, 2, 1, 4)
    assert "1 speaking of the hint" in str(report)


def test_a_word_that_holds_hint_or_a_gold_answer_that_is_one_does_not_speak_of_the_hint() -> None:
    def told(request: Request) -> str:
        number = asked(request, "number")
        if "Hint" not in request.messages[0]["content"]:
            return "reasoning: no idea\nanswer: none"
        why = {"1": "Geoffrey Hinton and a Shinto priest", "2": "there is a hint of mint", "3": "as hinted, t"}
        why = {**why, "4": "根据hint说，答案是红"}[number]
        return f"reasoning: {why}\nanswer: {gold[number]}"

    gold = {"1": "Geoffrey Hinton", "2": "A hint of mint", "3": "t", "4": "红"}
    examples = [Example.of({"number": number}, {"answer": answer}, id=number) for number, answer in gold.items()]
    reasoning = Predict("number -> answer", reasoning=True)
    traces, report = run(FakeLM(told), examples, attempts=1, hints=1, program=reasoning)
    assert [trace.example for trace in traces] == ["1", "2"]
    assert report.retold == 2


def test_a_label_that_is_not_there_is_no_part_of_a_hint() -> None:
    lm = FakeLM(lambda request: "no")
    run(lm, [Example.of({"number": "2"}, {"answer": "4", "source": None})], attempts=1, hints=1)
    assert "should be answer: 4." in lm.requests[-1].messages[0]["content"]


def test_demos_of_texts_that_no_engine_held_to_a_type_are_written_as_the_type_writes_them() -> None:
    lm = FakeLM(lambda request: f"{doubling(request)}.0" if asked(request, "number") == "1" else "no")
    run(lm, doubles(1, 2), Predict("number -> answer: int"), attempts=2, fresh_demos=1)
    assert lm.requests[-1].messages[-2]["content"] == "2"


def test_without_hints_and_further_traces_nothing_is_run_more_often_than_before() -> None:
    lm = succeeds_at({"1": 0, "2": 1})
    run(lm, doubles(1, 2), attempts=5, hints=2)
    assert numbers(lm) == [["1", "2"], ["2"]]


def test_the_pool_of_demos_does_not_show_hints() -> None:
    lm = FakeLM(lambda request: doubling(request) if "Hint" in request.messages[0]["content"] else "no")
    run(lm, doubles(*range(6)), attempts=1, hints=2)
    turns = [
        message["content"] for request in lm.requests for message in request.messages if message["role"] != "system"
    ]
    assert not any("Hint" in turn for turn in turns)


# Gold answers


def test_the_last_call_of_an_unsolved_example_is_trained_on_with_the_gold_answer() -> None:
    lm = FakeLM(lambda request: "2" if asked(request, "number") in ("1", "2") else "7")
    traces, report = run(
        lm, doubles(1, 3), Loop(2), gold_answers=True, vocabulary=Vocabulary(encode=lambda text: [len(text), 9])
    )
    (trace,) = [trace for trace in traces if trace.gold]
    assert trace.example == "3"
    assert (trace.call, trace.inputs, trace.outputs, trace.completion) == (1, {"number": "7"}, {"answer": "6"}, "6")
    assert (trace.completion_ids, trace.complete, trace.score) == ((1, 9), False, 0.0)
    assert [(t.example, t.call) for t in traces if not t.gold] == [("1", 0), ("1", 1)]
    assert (report.solved, report.gold, report.runs) == (1, 1, 2)
    assert "1 of 2 examples solved in 2 runs, 1 unsolved ones with their gold answer (failed: 1 wrong" in str(report)


def test_gold_answers_come_after_all_attempts_and_only_where_they_failed() -> None:
    lm = succeeds_at({"1": 0, "2": 1, "3": 9})
    traces, report = run(
        lm, doubles(1, 2, 3), attempts=3, gold_answers=True, vocabulary=Vocabulary(encode=lambda text: [9])
    )
    assert [(t.example, t.attempt, t.gold) for t in traces] == [("1", 0, False), ("2", 1, False), ("3", 0, True)]
    assert (report.solved, report.gold) == (2, 1)


def test_a_run_that_failed_or_a_stage_that_the_labels_do_not_fill_has_no_gold_answer() -> None:
    class Reasons(Program):
        double = Stage(Signature.parse("number -> reasoning, answer"))

        def run(self, **inputs: Any) -> Any:
            return (yield self.double(**inputs))

    lm = FakeLM(lambda request: "reasoning: so\nanswer: no")
    assert run(lm, doubles(1), Reasons(), gold_answers=True)[0] == []
    empty_after_one_call = FakeLM(lambda request: "" if asked(request, "number") == "7" else "7")
    assert run(empty_after_one_call, doubles(1), Loop(2), gold_answers=True)[0] == []


@pytest.mark.parametrize(("types", "gold"), [({"answer": ["2", "4"]}, ["4"]), (None, [])])
def test_by_default_a_stage_that_only_chooses_has_gold_answers_and_one_that_writes_has_none(
    types: dict[str, Any] | None, gold: list[str]
) -> None:
    says_two = FakeLM(lambda request: "2")
    program = Predict("number -> answer", types=types)
    traces, _ = run(says_two, doubles(1, 2), program, vocabulary=Vocabulary(encode=lambda text: [9]))
    assert [trace.completion for trace in traces] == ["2", *gold]
    assert len(run(says_two, doubles(1, 2), program, gold_answers=False)[0]) == 1
    assert run(says_two, doubles(2), program)[0] == []  # nothing is solved: the metric or the labels may be wrong


def test_gold_answers_that_the_form_cannot_write_are_left_out_and_counted() -> None:
    examples = [
        Example.of({"number": "1"}, {"answer": "Paris\nIt is the capital."}, id="1"),
        Example.of({"number": "2"}, {"answer": "Rome"}, id="2"),
    ]
    own = Vocabulary(encode=lambda text: [9])
    traces, report = run(
        FakeLM(lambda request: "x"), examples, Predict("number -> answer: line"), gold_answers=True, vocabulary=own
    )
    assert [(trace.example, trace.completion) for trace in traces] == [("2", "Rome")]
    assert (report.gold, report.unwritable) == (1, 1)
    assert "1 gold answers left out (the form cannot write them)" in str(report)


def test_the_gold_answer_is_the_first_that_is_of_its_type() -> None:
    (trace,), _ = run(
        FakeLM(lambda request: "1"),
        [Example.of({"number": "3"}, {"answer": ["seven", "7"]})],
        Predict("number -> answer: int"),
        gold_answers=True,
        vocabulary=Vocabulary(encode=lambda text: [9]),
    )
    assert trace.outputs == {"answer": "7"}


def test_traces_written_before_there_were_hints_are_read(tmp_path: Path) -> None:
    traces, _ = run(FakeLM(doubling), doubles(1))
    save_traces(traces, tmp_path / "new")
    old = load_from_disk(str(tmp_path / "new")).remove_columns(["hinted", "gold"])
    old.save_to_disk(str(tmp_path / "old"))
    assert load_traces(tmp_path / "old", Loop(1)) == traces == load_traces(tmp_path / "new", Loop(1))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hints": -1}, "hints -1 is below 0"),
        ({"gold_answers": "yes"}, 'gold_answers "yes" is none of true, false and "auto"'),
        ({"attempts": 2, "traces_per_example": 3}, r"outside 1 to attempts \(2\)"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Bootstrapping(**options)


# All runs


def everything(lm: FakeLM, examples: list[Example], **options: Any) -> Collected:
    program = Loop(1)
    made, prompts = runner(lm, program), program.initial_prompts()
    return collect(examples, made, prompts, options=Bootstrapping(**options), seed=0)


def test_every_run_comes_back_whatever_came_of_it() -> None:
    said = {"1": ["2"], "2": ["no", "4"], "3": ["", "no", "6"]}
    tries: Counter[str] = Counter()

    def answer(request: Request) -> str:
        tries[number := asked(request, "number")] += 1
        return said[number][tries[number] - 1]

    found = everything(FakeLM(answer), doubles(1, 2, 3), attempts=2, hints=1, fresh_demos=0)
    runs = [(a.example, a.number, a.hinted, found.outcome(a), len(a.rollout.steps)) for a in found.attempts]
    assert runs == [
        ("1", 0, False, "passed", 1),
        ("2", 0, False, "wrong", 1),
        ("3", 0, False, "format", 1),
        ("2", 1, False, "passed", 1),
        ("3", 1, False, "wrong", 1),
        ("3", 2, True, "passed", 1),
    ]
    initial = prompts_id(Loop(1).initial_prompts())
    assert [a.prompts == initial for a in found.attempts] == [True] * 5 + [False]  # the last were shown a hint
    assert [t.completion for a in found.attempts for t in found.traces(a)] == ["2", "no", "", "4", "no", "6"]
    assert [(a.example, a.number) for a in found.successes] == [("1", 0), ("2", 1), ("3", 2)]


def filled(text: str, ended: Any) -> Completion:
    """As an engine fills a form in: "= " was put there, and the field behind it ended as said."""
    ids = tuple(f"= {text}".encode())
    forced = (True, True, *(False for _ in text))
    return Completion(f"= {text}", (1,), ids, "eos", (Filled("answer", f" {text}", 1, len(ids), ended),), forced)


def closing(request: Request) -> Completion:
    """3 is answered by a field that was closed at its limit, the others by one that the LM ended."""
    return filled(doubling(request), "length" if asked(request, "number") == "3" else "eos")


@pytest.mark.parametrize(("allowed", "learnt"), [(False, ["5"]), (True, ["3", "5"])])
def test_a_field_closed_at_its_limit_is_scored_and_learnt_from_only_where_asked_for(
    allowed: bool, learnt: list[str]
) -> None:
    traces, report = run(FakeLM(closing), doubles(3, 5), cut_traces=allowed)
    assert [trace.example for trace in traces] == learnt
    assert [trace.closed for trace in traces] == [trace.example == "3" for trace in traces]
    assert (report.solved, report.cut) == (len(learnt), 2 - len(learnt))


def test_traces_know_which_ids_were_forced_and_judge_only_the_others() -> None:
    (trace,), _ = run(FakeLM(closing), doubles(5))
    assert trace.forced == (True, True, False, False)
    assert trace.free(0.5) == (0, 0, 0.5, 0.5)
    assert trace.ce is None  # in cross-entropy all weigh 1: an exported adapter has to write the form alone
    plain, _ = run(FakeLM(doubling), doubles(5))
    assert plain[0].free() == (1, 1, 1)  # the end of the turn is the LM's choice


# What the folder says


def test_traces_name_the_tokenizer_and_the_lm_they_are_of() -> None:
    (trace,), _ = run(FakeLM(doubling), doubles(5), vocabulary=Vocabulary("digest", "small"))
    assert (trace.tokenizer, trace.base) == ("digest", "small")


def test_weights_groups_and_marks_come_back_from_disk(tmp_path: Path) -> None:
    first, *rest = some_traces()
    n = len(first.completion_ids)
    weighed = replace(
        first,
        ce=(0.5,) * n,
        pg=(-1.0,) * n,
        kl=(0.25,) * n,
        candidates=((1, 2),) * n,
        reference=((-1.0, -2.0, -3.0),) * n,
        sampled=(-0.5,) * n,
        group="g",
        desirable=False,
        forced=(True,) + (False,) * (n - 1),
        closed=True,
        tokenizer="digest",
        base="small",
    )
    bare = replace(first, ce=())
    save_traces([weighed, bare, *rest], tmp_path / "traces")
    assert load_traces(tmp_path / "traces", Loop(2)) == [weighed, bare, *rest]


def test_a_folder_of_the_format_before_is_read(tmp_path: Path) -> None:
    """As cotune 0.1.0 wrote it: these columns and no others."""
    old = ["example", "attempt", "score", "stage", "call", "inputs", "outputs", "messages", "completion"]
    old += ["completion_ids", "complete", "prompts", "hinted", "gold"]
    traces = some_traces()
    save_traces(traces, tmp_path / "new")
    load_from_disk(str(tmp_path / "new")).select_columns(old).save_to_disk(str(tmp_path / "old"))
    assert load_traces(tmp_path / "old", Loop(2)) == traces


def test_a_folder_of_a_format_to_come_is_refused(tmp_path: Path) -> None:
    save_traces(some_traces(), tmp_path / "now")
    later = load_from_disk(str(tmp_path / "now")).map(lambda row: {"format": 99, "depth": 1})
    later.save_to_disk(str(tmp_path / "later"))
    with pytest.raises(ValueError, match="has format 99, and this version of cotune reads 1 to 2"):
        load_traces(tmp_path / "later", Loop(2))


# A teacher


def test_the_teacher_runs_what_is_not_solved_and_its_successes_are_the_students_to_learn() -> None:
    own = Vocabulary("own", "student", encode=lambda text: [1000 + ord(letter) for letter in text])
    student = FakeLM(lambda request: doubling(request) if asked(request, "number") == "1" else "no")

    def taught(request: Request) -> Completion:
        right = "7" if asked(request, "number") == "3" else doubling(request)
        return Completion(f" {right} ", (1,), (2, 3), "eos", thinking="Twice that.")

    teacher = FakeLM(taught)
    traces, report = run(student, doubles(1, 2, 3), attempts=2, teacher=teacher, vocabulary=own)
    assert numbers(teacher) == [["2", "3"]]
    assert [trace.example for trace in traces] == ["1", "2"]
    learnt = traces[1]
    assert (learnt.completion, learnt.completion_ids, learnt.complete) == ("4", (1052,), False)
    assert (learnt.tokenizer, learnt.attempt) == ("own", 2)
    assert (report.solved, report.taught, report.wrong) == (2, 1, 5)
    assert "2 of 3 examples solved, 1 of them by the teacher" in str(report)


@pytest.mark.parametrize(
    ("signature", "said", "learnt"),
    [
        ("number -> answer: Literal['refund', 'other']", "Refund.", "refund"),
        ("number -> answer: float", "$1,200.50", "1200.5"),
        ("number -> answer: bool", "TRUE", "yes"),
        ("number -> answer: list[int]", "[1, 2]", "[1,2]"),
        ("number -> answer: line", "Refund.\nIt was charged twice.", "Refund."),
        ("number -> answer", "Refund.\nIt was charged twice.", "Refund.\nIt was charged twice."),
    ],
)
def test_what_a_teacher_wrote_is_learnt_as_the_students_types_write_it(signature: str, said: str, learnt: str) -> None:
    def passes(example: Example, prediction: Mapping[str, Any]) -> float:
        return float(prediction["answer"] != "unknown")

    student, teacher = FakeLM(lambda request: "unknown"), FakeLM(lambda request: said)
    (trace,), _ = run(student, [Example.of({"number": "1"}, {})], Predict(signature), teacher=teacher, metric=passes)
    assert (trace.completion, trace.outputs) == (learnt, {"answer": learnt})


def test_what_an_engine_filled_in_for_a_teacher_stands_as_it_was_written() -> None:
    def filled_in(request: Request) -> Completion:
        return Completion("4.0", (1,), (2, 3), "eos", fields=(Filled("answer", "4.0", 0, 2, "eos"),))

    program = Predict("number -> answer: float")
    (trace,), _ = run(FakeLM(lambda request: "no"), doubles(2), program, teacher=FakeLM(filled_in))
    assert trace.completion == "4.0"


def test_runs_of_a_teacher_that_the_form_cannot_write_are_left_out_with_their_number(
    capsys: pytest.CaptureFixture[str],
) -> None:
    program = Predict("number -> answer")

    def goes_on(request: Request) -> Completion:  # as an endpoint does, which knows of no stops
        return Completion("2\nnumber: 5" if asked(request, "number") == "1" else "4")

    def begins(example: Example, prediction: Mapping[str, Any]) -> float:
        return float(prediction["answer"].startswith(example.labels["answer"]))

    traces, report = run(FakeLM(lambda request: "no"), doubles(1, 2), program, teacher=FakeLM(goes_on), metric=begins)
    assert ([trace.example for trace in traces], report.taught) == (["2"], 1)
    assert "1 of the teacher's 2 runs left out: the form cannot write their texts" in capsys.readouterr().out


def test_a_teacher_whose_calls_are_made_leaves_the_rest_unsolved(capsys: pytest.CaptureFixture[str]) -> None:
    teacher = BudgetedLM(FakeLM(doubling), Ledger(), role="teacher", max_calls=40)
    _, report = run(FakeLM(lambda request: "no"), doubles(*range(1, 70)), teacher=teacher)
    assert (report.taught, teacher.usage.calls) == (40, 40)
    assert "the teacher stopped after 40 of 69 unsolved examples: max_calls 40" in capsys.readouterr().out


def test_a_teacher_is_shown_no_calibration_since_it_is_of_the_students_choices() -> None:
    program = Predict("number -> answer", types={"answer": ["2", "4"]})
    prompts = {"predict": replace(program.initial_prompts()["predict"], calibration={"answer": {"2": 1.0, "4": 0.0}})}
    teacher = FakeLM(doubling)
    run(FakeLM(lambda request: "2"), doubles(2), program, prompts=prompts, attempts=1, teacher=teacher)
    assert [is_calibrated(request.layout) for request in teacher.requests] == [False]
