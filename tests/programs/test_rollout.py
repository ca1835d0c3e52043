"""Rollouts: lockstep batches, and every way a run can go wrong."""

from __future__ import annotations

import copy
import json
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from claims import claimed
from cotune.callbacks.record_boundaries import _line
from cotune.programs import (
    Call,
    Completion,
    Demo,
    Example,
    Fault,
    FaultyProgramError,
    Lines,
    Metric,
    Predict,
    Program,
    Prompt,
    Request,
    Retriever,
    Rollout,
    Runner,
    Sampling,
    Score,
    Signature,
    Stage,
    Unreadable,
    exact_match,
    faults_of,
    mean_score,
    retrieve,
)
from cotune.programs.faults import check_errors
from fakes import EOS, Branch, FakeLM, Loop, asked, doubles, doubling, shown
from hypothesis import given
from hypothesis import strategies as st

from cotune.commands.predict import answer_line


def run(program: Program, examples: Sequence[Example], lm: FakeLM, **options: Any) -> list[Rollout]:
    settings: dict[str, Any] = {"form": Lines(), "metric": exact_match, "sampling": Sampling(), "max_error_rate": 0.5}
    settings |= {name: options.pop(name) for name in tuple(options) if name in settings}
    prompts = options.pop("prompts", program.initial_prompts())
    return Runner(program, lm, **settings).run(examples, prompts, **options)


# -- lockstep


def test_each_round_of_pending_calls_is_one_batch() -> None:
    lm = FakeLM(doubling)
    done = run(Loop(times=3), doubles(1, 2, 5), lm)
    assert [len(batch) for batch in lm.batches] == [3, 3, 3]
    assert [r.prediction for r in done] == [{"answer": "8"}, {"answer": "16"}, {"answer": "40"}]


def test_runs_of_different_length_leave_the_batch_one_by_one() -> None:
    class Countdown(Program):
        minus = Stage(Signature.parse("number -> answer"))

        def run(self, number: int) -> Generator[Call, Mapping[str, str], Mapping[str, Any]]:
            while number > 0:
                number = int((yield self.minus(number=number))["answer"])
            return {"answer": number}

    lm = FakeLM(lambda request: str(int(asked(request, "number")) - 1))
    done = run(Countdown(), [Example.of({"number": n}, {"answer": 0}, id=str(n)) for n in (2, 0, 3, 1)], lm)
    assert [len(batch) for batch in lm.batches] == [3, 2, 1]
    assert [len(r.steps) for r in done] == [2, 0, 3, 1]
    assert mean_score(done) == 1.0


def test_a_stage_called_twice_gives_two_steps_of_one_name() -> None:
    (done,) = run(Loop(), doubles(3), FakeLM(doubling))
    assert [(s.stage, s.inputs["number"], s.outputs["answer"]) for s in done.steps] == [
        ("double", "3", "6"),
        ("double", "6", "12"),
    ]


def test_branches_share_a_batch_and_an_early_return_needs_no_call() -> None:
    def answer(request: Request) -> str:
        number = int(asked(request, "number"))
        return str(number * 2 if request.messages[0]["content"].startswith("Double") else number // 2)

    lm = FakeLM(answer)
    done = run(Branch(), [Example.of({"number": n}, {"answer": a}, id=str(n)) for n, a in ((3, 6), (0, 0), (8, 4))], lm)
    assert [len(batch) for batch in lm.batches] == [2]
    assert [[s.stage for s in r.steps] for r in done] == [["double"], [], ["halve"]]
    assert [r.score for r in done] == [1.0, 1.0, 1.0]


def test_rollouts_come_in_the_order_of_the_examples_and_none_is_fine() -> None:
    lm = FakeLM(doubling)
    assert [r.example.id for r in run(Loop(1), doubles(5, 1, 3), lm)] == ["5", "1", "3"]
    assert run(Loop(1), [], FakeLM(doubling)) == []
    assert mean_score([]) == 0.0


def test_a_step_keeps_the_messages_and_the_ids_of_its_completion() -> None:
    lm = FakeLM(doubling)
    (done,) = run(Loop(1), doubles(3), lm)
    (step,) = done.steps
    assert step.messages == lm.requests[0].messages
    assert step.completion.completion_ids == (ord("6"), EOS)
    assert bytes(step.completion.prompt_ids).decode().endswith("number: 3")


def test_each_example_may_have_prompts_of_its_own() -> None:
    lm = FakeLM(doubling)
    demo = Demo({"number": "1"}, {"answer": "2"})
    own = [{"double": Prompt("Double.", (demo,) * n)} for n in (0, 2)]
    run(Loop(1), doubles(3, 4), lm, prompts=own)
    assert [shown(request) for request in lm.requests] == [0, 2]
    with pytest.raises(ValueError, match="2 sets of prompts for 1 examples"):
        run(Loop(1), doubles(3), lm, prompts=own)


def test_progress_adds_up_to_the_examples() -> None:
    told: list[int] = []
    run(
        Loop(2),
        doubles(1, 2, 3),
        FakeLM(lambda r: doubling(r) if "2" not in asked(r, "number") else ""),
        progress=told.append,
    )
    assert sum(told) == 3
    assert 0 not in told


# -- seeds


def seeds(lm: FakeLM) -> list[int]:
    return [request.seed for request in lm.requests]


def test_a_calls_seed_does_not_depend_on_the_batch() -> None:
    alone, beside = FakeLM(doubling), FakeLM(doubling)
    run(Loop(2), doubles(7), alone)
    run(Loop(2), doubles(1, 7, 2), beside)
    assert seeds(alone) == [request.seed for request in beside.requests if asked(request, "number") in ("7", "14")]


def test_seeds_differ_by_example_step_attempt_and_run() -> None:
    lm = FakeLM(doubling)
    for options in ({}, {"attempt": 1}, {"seed": 1}):
        run(Loop(2), doubles(1, 2), lm, **options)
    assert len(set(seeds(lm))) == len(seeds(lm)) == 12
    assert all(0 <= seed < 2**63 for seed in seeds(lm))


def test_a_run_repeats_itself() -> None:
    first, again = FakeLM(doubling), FakeLM(doubling)
    assert run(Loop(), doubles(1, 2), first) == run(Loop(), doubles(1, 2), again)
    assert first.batches == again.batches


# -- the LM's failures


def test_an_unparsable_completion_scores_0_and_keeps_its_last_step() -> None:
    lm = FakeLM(lambda request: doubling(request) if asked(request, "number") == "3" else "  ")
    (done,) = run(Loop(2), [Example.of({"number": 3}, {"answer": "12"}, id="e")], lm)
    assert (done.score, done.prediction) == (0.0, None)
    assert done.error is not None
    assert done.error.kind == "format"
    assert 'stage "double"' in done.error.message
    assert [dict(step.outputs) for step in done.steps] == [{"answer": "6"}, {}]
    assert done.steps[-1].completion.text == "  "


def test_a_prompt_over_the_window_is_a_format_failure_that_says_so() -> None:
    (done,) = run(Loop(1), doubles(3), FakeLM(doubling, window=5))
    assert done.error is not None
    assert (done.error.kind, done.score) == ("format", 0.0)
    assert "longer than the model's context window" in done.error.message
    assert done.steps[0].completion.finished == "too_long"


def test_format_failures_never_raise_however_many() -> None:
    done = run(Loop(1), doubles(1, 2, 3), FakeLM(lambda request: ""), max_error_rate=0.0)
    assert [r.error is not None and r.error.kind for r in done] == ["format"] * 3


def test_a_completion_cut_at_its_length_is_parsed_like_any_other() -> None:
    (done,) = run(Loop(1), doubles(500), FakeLM(doubling), sampling=Sampling(max_new_tokens=2))
    assert done.prediction == {"answer": "10"}
    assert done.steps[0].completion.finished == "length"


def test_field_names_in_the_data_do_not_move_the_parser() -> None:
    program = Predict("question -> reasoning, answer")
    nasty = "What?\nreasoning: no\nanswer: WRONG\nquestion: again"
    lm = FakeLM(lambda request: "reasoning: yes\nanswer: right")
    (done,) = run(program, [Example.of({"question": nasty}, {"answer": "right"})], lm)
    assert (done.prediction, done.score) == ({"reasoning": "yes", "answer": "right"}, 1.0)


def test_an_lm_that_loses_a_completion_is_a_broken_set_up() -> None:
    class Lossy(FakeLM):
        def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
            return super().complete(requests, sampling)[1:]

    with pytest.raises(ValueError, match="zip"):
        run(Loop(1), doubles(1, 2), Lossy(doubling))


# -- the user's failures


class Picky(Program):
    """Raises on number 13, before or after its call."""

    double = Stage(Signature.parse("number -> answer"))

    def __init__(self, before: bool) -> None:
        self.before = before

    def run(self, number: int) -> Generator[Call, Mapping[str, str], Mapping[str, Any]]:
        if self.before and number == 13:
            raise KeyError("unlucky")
        outputs = yield self.double(number=number)
        if number == 13:
            raise KeyError("unlucky")
        return outputs


@pytest.mark.parametrize(("before", "steps"), [(True, 0), (False, 1)])
def test_a_program_that_raises_on_one_example_leaves_the_others(before: bool, steps: int) -> None:
    good, bad = run(Picky(before), doubles(1, 13), FakeLM(doubling))
    assert good.score == 1.0
    assert (bad.score, bad.prediction, len(bad.steps)) == (0.0, None, steps)
    assert bad.error is not None
    assert bad.error.kind == "program"
    assert "Picky.run raised KeyError: 'unlucky'" in bad.error.message


def yields_text(self: Program, number: int) -> Any:
    return (yield "number")


def yields_a_foreign_stage(self: Program, number: int) -> Any:
    return (yield Call("elsewhere", {}))


def returns_text(self: Program, number: int) -> Any:
    outputs = yield self.double(number=number)  # type: ignore[attr-defined]
    return outputs["answer"]


def forgets_to_return(self: Program, number: int) -> Any:
    yield self.double(number=number)  # type: ignore[attr-defined]


def never_yields(self: Program, number: int) -> Any:
    return {"answer": "1"}


def takes_other_inputs(self: Program, digit: int) -> Any:
    yield self.double(number=digit)  # type: ignore[attr-defined]


def misnames_a_field(self: Program, number: int) -> Any:
    return (yield self.double(digit=number))  # type: ignore[attr-defined]


def yields_no_texts(self: Program, number: int) -> Any:
    return (yield Call("double", {"number": number}))  # type: ignore[dict-item]


def yields_half_a_character(self: Program, number: int) -> Any:
    return (yield self.double(number="x\ud83d"))  # type: ignore[attr-defined]


def yields_an_unhashable_stage(self: Program, number: int) -> Any:
    return (yield Call([], {}))  # type: ignore[arg-type]


def never_ends(self: Program, number: int) -> Any:
    try:
        while True:
            yield self.double(number=number)  # type: ignore[attr-defined]
    finally:
        raise RuntimeError("and its clean-up fails")


def returns_what_no_file_holds(self: Program, number: int) -> Any:
    yield self.double(number=number)  # type: ignore[attr-defined]
    return {"answer": "\udc00"}


def returns_what_cannot_be_copied(self: Program, number: int) -> Any:
    outputs = yield self.double(number=number)  # type: ignore[attr-defined]
    return {**outputs, "words": (word for word in outputs["answer"])}


class Lazy(Mapping[str, Any]):
    def __getitem__(self, name: str) -> Any:
        raise RuntimeError("the database is closed")

    def __iter__(self) -> Iterator[str]:
        return iter(["answer"])

    def __len__(self) -> int:
        return 1


def returns_what_raises(self: Program, number: int) -> Any:
    yield self.double(number=number)  # type: ignore[attr-defined]
    return Lazy()


def gives_up(self: Program, number: int) -> Any:
    yield self.double(number=number)  # type: ignore[attr-defined]
    raise SystemExit("no more")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (yields_text, "yielded 'number', which is not a call"),
        (yields_a_foreign_stage, "not a call of one of its stages"),
        (returns_text, "returned '2'; return a mapping"),
        (forgets_to_return, "returned None; return a mapping"),
        (never_yields, "run is not a generator, it returned {'answer': '1'}; yield"),
        (yields_no_texts, "'number' of type int, which is no text"),
        (yields_half_a_character, "half a surrogate pair in 'number', at character 1"),
        (yields_an_unhashable_stage, "not a call of one of its stages"),
        (never_ends, "made 100 calls and wants another, more than Wrong.max_calls allows"),
        (returns_what_no_file_holds, "no file can hold: UnicodeEncodeError"),
        (returns_what_cannot_be_copied, "cannot pickle 'generator' object, at 'words'; return plain values"),
        (returns_what_raises, "RuntimeError: the database is closed"),
        (gives_up, "Wrong.run raised SystemExit: no more"),
        (takes_other_inputs, "raised TypeError"),
        (misnames_a_field, '"double" misses "number"'),
    ],
)
def test_a_wrong_program_says_what_is_wrong(body: Callable[..., Any], said: str) -> None:
    program = type("Wrong", (Program,), {"double": Stage(Signature.parse("number -> answer")), "run": body})()
    (done,) = run(program, doubles(1), FakeLM(doubling), max_error_rate=1.0)
    assert done.error is not None
    assert (done.error.kind, done.score) == ("program", 0.0)
    assert said in done.error.message


def raises(example: Example, prediction: Mapping[str, Any]) -> float:
    raise RuntimeError("no metric today")


def gives(value: Any) -> Metric:
    return lambda example, prediction: value


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (raises, "RuntimeError: no metric today"),
        (gives(math.nan), "nan"),
        (gives(None), "None"),
        (gives("0.5"), "'0.5'"),
        (gives(-0.1), "-0.1"),
        (gives(1.1), "1.1"),
        (gives([1.0]), "the metric returned [1.0], which is not a number in [0, 1]"),
        (gives(10**400), "which is not a number"),
        (gives(1j), "1j"),
    ],
)
def test_a_bad_metric_scores_0_keeps_the_prediction_and_says_why(metric: Metric, said: str) -> None:
    (done,) = run(Loop(1), doubles(1), FakeLM(doubling), metric=metric, max_error_rate=1.0)
    assert (done.score, done.prediction) == (0.0, {"answer": "2"})
    assert done.error is not None
    assert done.error.kind == "metric"
    assert said in done.error.message


@pytest.mark.parametrize(("value", "score"), [(True, 1.0), (0, 0.0), (0.25, 0.25)])
def test_a_metric_may_give_any_number_from_0_to_1(value: Any, score: float) -> None:
    (done,) = run(Loop(1), doubles(1), FakeLM(doubling), metric=gives(value))
    assert (done.score, done.error, type(done.score)) == (score, None, float)


def test_without_a_metric_there_are_predictions_and_no_errors() -> None:
    (done,) = run(Loop(1), doubles(1), FakeLM(doubling), metric=None)
    assert (done.prediction, done.score, done.error) == ({"answer": "2"}, 0.0, None)


def test_numbers_of_numpy_and_torch_are_scores() -> None:
    for value in (np.float32(0.5), np.bool_(True), np.int64(1), torch.tensor(0.25)):
        (done,) = run(Loop(1), doubles(1), FakeLM(doubling), metric=gives(value))
        assert (done.score, done.error) == (float(value), None)


class Long(Loop):
    max_calls = 300


def test_a_program_may_ask_for_more_calls() -> None:
    (done,) = run(Long(300), doubles(0), FakeLM(doubling))
    assert (len(done.steps), done.error) == (300, None)


class Talkative(Exception):  # noqa: N818
    def __str__(self) -> str:
        return "two\nlines and half a pair \ud83d " + "x" * 10_000


def test_a_message_is_one_short_line_that_any_file_holds() -> None:
    def metric(example: Example, prediction: Mapping[str, Any]) -> float:
        raise Talkative

    (done,) = run(Loop(1), doubles(1), FakeLM(doubling), metric=metric, max_error_rate=1.0)
    assert done.error is not None
    assert done.error.message.startswith("the metric raised Talkative: two lines and half a pair \\ud83d xxx")
    assert len(done.error.message) < 400
    assert done.error.message.encode()


def test_a_message_holds_no_address_because_another_process_would_say_another() -> None:
    (done,) = run(Loop(1), doubles(1), FakeLM(doubling), metric=gives(object()), max_error_rate=1.0)
    assert done.error is not None
    assert "<object object>" in done.error.message


def test_a_want_of_memory_is_not_the_examples_doing() -> None:
    def metric(example: Example, prediction: Mapping[str, Any]) -> float:
        raise MemoryError

    with pytest.raises(MemoryError):
        run(Loop(1), doubles(1), FakeLM(doubling), metric=metric)


class Searching(Program):
    """Looks something up before it asks."""

    double = Stage(Signature.parse("number -> answer"))

    def __init__(self, retriever: Retriever) -> None:
        self.retriever = retriever

    def run(self, number: int) -> Generator[Call, Mapping[str, str], Mapping[str, Any]]:
        (passage,) = retrieve(self.retriever, str(number), 1)
        return (yield self.double(number=passage))


def offline(query: str, k: int) -> list[str]:
    raise ConnectionError("no route")


@pytest.mark.parametrize(
    ("retriever", "said"),
    [
        (offline, "the retriever raised ConnectionError: no route"),
        (lambda query, k: None, "the retriever returned None, which is not a sequence of passages"),
        (lambda query, k: "1", "the retriever returned '1', which is not a sequence"),
        (lambda query, k: [1], "a passage that is not text: 1"),
        (lambda query, k: ["1", "2"], "returned 2 passages, but at most 1 were requested"),
    ],
)
def test_a_retrievers_fault_is_not_the_programs(retriever: Any, said: str) -> None:
    (done,) = run(Searching(retriever), doubles(1), FakeLM(doubling), max_error_rate=1.0)
    assert done.error is not None
    assert (done.error.kind, done.score) == ("retriever", 0.0)
    assert said in done.error.message


def test_faults_are_counted_by_kind_with_the_first_example_of_each() -> None:
    def metric(example: Example, prediction: Mapping[str, Any]) -> float:
        return math.nan if example.id in ("2", "3") else 1.0

    done = run(Picky(True), doubles(13, 1, 2, 3), FakeLM(doubling), metric=metric, max_error_rate=1.0)
    assert faults_of(done) == {
        "program": Fault(1, "13", "Picky.run raised KeyError: 'unlucky'"),
        "metric": Fault(2, "2", "the metric returned nan, which is not a number in [0, 1]"),
    }
    with pytest.raises(FaultyProgramError) as stop:
        check_errors(done, max_error_rate=0.5)
    assert str(stop.value) == (
        "the program failed on 1 of 4 examples, the metric failed on 2 of 4 examples, more than max_error_rate 0.5 "
        "allows. The program's first is example 13: Picky.run raised KeyError: 'unlucky'. The metric's first is "
        "example 2: the metric returned nan, which is not a number in [0, 1]. Fix the code, or raise "
        "model.max_error_rate: such examples then score 0 and the run continues."
    )


def test_too_many_faults_raise_with_the_first_one() -> None:
    examples = doubles(13, 1)
    run(Picky(True), examples, FakeLM(doubling), max_error_rate=0.5)
    with pytest.raises(
        FaultyProgramError, match=r"the program failed on 1 of 2 examples.*max_error_rate 0.4.*example 13: .*unlucky"
    ):
        run(Picky(True), examples, FakeLM(doubling), max_error_rate=0.4)


# -- what user code is given is its own


class Remembers(Program):
    """Keeps on itself what it was asked, and changes its input in place."""

    double = Stage("numbers -> answer")

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def run(self, numbers: list[int]) -> Generator[Call, Mapping[str, str], Mapping[str, Any]]:
        self.seen.append(list(numbers))
        self.last = numbers[0]
        numbers.append(0)
        yield self.double(numbers=numbers)
        return {"answer": f"{self.seen} {self.last}"}


def test_state_on_self_is_each_runs_own() -> None:
    examples = [Example.of({"numbers": [n]}, {"answer": "?"}, id=str(n)) for n in (1, 2)]
    program = Remembers()
    done = run(program, examples, FakeLM(lambda request: "x"))
    assert [r.prediction for r in done] == [{"answer": "[[1]] 1"}, {"answer": "[[2]] 2"}]
    assert program.seen == []


def test_a_program_that_changes_its_inputs_finds_them_as_they_were_in_the_next_run() -> None:
    example = Example.of({"numbers": [1]}, {"answer": "?"})
    done = [run(Remembers(), [example], FakeLM(lambda request: "x"))[0] for _ in range(2)]
    assert example.inputs == {"numbers": [1]}
    assert done[0].steps[0].inputs == done[1].steps[0].inputs == {"numbers": "[1] 1\n[2] 0"}


def test_a_metric_that_changes_what_it_is_given_changes_no_record() -> None:
    def greedy(example: Example, prediction: Mapping[str, Any]) -> float:
        prediction.clear()  # type: ignore[attr-defined]
        example.labels["answer"] = "7"  # type: ignore[index]
        return 1.0

    (done,) = run(Loop(1), doubles(3), FakeLM(doubling), metric=greedy)
    assert done.prediction == {"answer": "6"}
    assert done.example.labels == {"answer": "6"}


def test_a_label_that_cannot_be_copied_is_given_to_the_metric_as_it_is() -> None:
    example, seen = Example("e", {"number": 1}, {"answer": threading.Lock()}), []

    def metric(example: Example, prediction: Mapping[str, Any]) -> float:
        seen.append(example.labels["answer"])
        return 1.0

    (done,) = run(Loop(1), [example], FakeLM(doubling), metric=metric)
    assert (done.score, seen) == (1.0, [example.labels["answer"]])


class Tooled(Program):
    """Keeps state beside what all runs share, in one dict."""

    double = Stage("number -> answer")

    def __init__(self) -> None:
        self.tools = {"find": CountingRetriever(), "more": [{"seen": []}], "lock": threading.Lock()}
        self.counts: dict[str, list[int]] = defaultdict(list)

    def run(self, number: int) -> Generator[Call, Mapping[str, str], Mapping[str, Any]]:
        (passage,) = retrieve(self.tools["find"], str(number), 1)
        self.tools["more"][0]["seen"].append(number)
        self.counts["numbers"].append(number)
        yield self.double(number=number)
        return {"answer": f"{passage} {self.tools['more'][0]['seen']} {self.counts['numbers']}"}


class CountingRetriever:
    def __init__(self) -> None:
        self.builds = 0
        self.index: list[str] = []

    def __call__(self, query: str, k: int) -> Sequence[str]:
        if not self.index:
            self.builds += 1
            self.index = ["passage"]
        return self.index


def test_a_retriever_in_a_dict_of_the_program_is_shared_and_the_lists_beside_it_are_not() -> None:
    program = Tooled()
    done = run(program, doubles(1, 2, 3), FakeLM(doubling))
    assert [(r.prediction or {})["answer"] for r in done] == [f"passage [{n}] [{n}]" for n in (1, 2, 3)]
    assert program.tools["find"].builds == 1  # type: ignore[attr-defined]
    assert (program.tools["more"], dict(program.counts)) == ([{"seen": []}], {})


class Sales(Program):
    double = Stage("number -> answer")

    def run(self, number: int) -> Generator[Call, Mapping[str, Any], Mapping[str, Any]]:
        found = yield self.double(number=number)
        return {**found, "sales": {date(2024, 7, 26): 3}}


def test_keys_within_a_prediction_may_be_of_any_kind_and_are_texts_in_files() -> None:
    (done,) = run(Sales(), doubles(1), FakeLM(doubling))
    assert done.prediction == {"answer": "2", "sales": {date(2024, 7, 26): 3}}
    assert json.loads(answer_line(1, done))["sales"] == {"2024-07-26": 3}
    assert json.loads(_line({"prediction": done.prediction}))["prediction"]["sales"] == {"2024-07-26": 3}


class Linked(Program):
    """A program whose state holds one thing twice, and itself."""

    double = Stage("number -> answer")

    def __init__(self) -> None:
        node: dict[str, Any] = {"seen": []}
        node["self"] = node
        self.state: dict[str, Any] = {"now": node, "all": [node], "cell": SimpleNamespace(seen=node["seen"], own=[])}

    def run(self, number: int) -> Generator[Call, Mapping[str, Any], Mapping[str, Any]]:
        yield self.double(number=number)
        self.state["now"]["seen"].append(number)
        self.state["cell"].own.append(number)
        found = [one["self"]["seen"] for one in self.state["all"]]
        return {"answer": str([*found, self.state["cell"].seen, self.state["cell"].own])}


def test_what_stands_twice_or_in_itself_does_so_in_each_runs_own_state() -> None:
    done = run(Linked(), doubles(1, 2), FakeLM(doubling))
    assert [(r.prediction or {})["answer"] for r in done] == ["[[1], [1], [1]]", "[[2], [2], [2]]"]


# -- typed values


class Sums(Program):
    add = Stage("number -> answer: float, sure: bool")

    def run(self, number: int) -> Generator[Call, Mapping[str, Any], Mapping[str, Any]]:
        found = yield self.add(number=number)
        return {"answer": found["answer"] + 1, "sure": found["sure"]}


def test_programs_and_metrics_get_typed_values_and_records_the_texts() -> None:
    (done,) = run(Sums(), doubles(3), FakeLM(lambda request: "answer: 1,200.50\nsure: yes"))
    assert done.prediction == {"answer": 1201.5, "sure": True}
    assert done.steps[0].outputs == {"answer": "1,200.50", "sure": "yes"}


def test_a_value_that_is_not_of_its_type_ends_the_run_with_the_value() -> None:
    (done,) = run(Sums(), doubles(3), FakeLM(lambda request: "answer: lots\nsure: yes"))
    assert done.error is not None
    assert (done.error.kind, done.score) == ("type", 0.0)
    assert done.error.message == 'stage "add": "answer": "lots" is no number.'


# -- scores with reasons


def test_a_metric_may_say_why() -> None:
    said = Score(0.5, "the unit is missing", {"digits": 1.0, "unit": 0.0})
    (done,) = run(Loop(1), doubles(3), FakeLM(doubling), metric=lambda example, prediction: said)
    assert (done.score, done.feedback, done.objectives) == (0.5, "the unit is missing", {"digits": 1.0, "unit": 0.0})


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (Score(2.0), "a Score of 2.0"),
        (Score(1.0, 3), "feedback is 3, which is not text"),  # type: ignore[arg-type]
        (Score(1.0, "half \ud83d"), "'half \\ud83d', which is not text"),
        (Score(1.0, stages={"double": "half \ud83d"}), "it must be text for a stage"),
        (Score(1.0, "", {"unit": float("nan")}), 'objective "unit" is nan'),
    ],
)
def test_a_score_that_is_none_is_the_metrics_fault(score: Score, message: str) -> None:
    (done,) = run(Loop(1), doubles(3), FakeLM(doubling), metric=lambda e, p: score, max_error_rate=1.0)
    assert done.error is not None
    assert done.error.kind == "metric"
    assert message in done.error.message


class Planner(Program):
    plan = Stage("number -> plan")

    def run(self, number: int) -> Generator[Call, Mapping[str, Any], Mapping[str, Any]]:
        found = yield self.plan(number=number)
        if not found["plan"].startswith("{"):
            raise Unreadable("the plan is no JSON")
        return {"answer": str(2 * number)}


def test_a_program_may_say_that_an_answer_is_unusable_without_being_at_fault() -> None:
    done = run(Planner(), doubles(1, 2, 3), FakeLM(lambda request: "{}" if asked(request, "number") == "1" else "no"))
    assert [r.score for r in done] == [1.0, 0.0, 0.0]
    assert done[1].error is not None
    assert (done[1].error.kind, done[1].error.message) == ("format", "Planner.run: the plan is no JSON")
    assert faults_of(done) == {}


# Completions of an LM that only gives text


def test_an_lm_with_ids_is_never_asked_again() -> None:
    lm = FakeLM(lambda request: "")
    (done,) = run(Loop(times=1), doubles(3), lm, max_error_rate=1.0)
    assert (lm.calls, done.error and done.error.kind) == (1, "format")


def test_texts_that_cannot_be_read_are_asked_for_together_and_once() -> None:
    lm = FakeLM(lambda request: Completion("6" if "cannot be read" in request.messages[-1]["content"] else ""))
    done = run(Loop(times=1), doubles(3, 4, 3), lm, max_error_rate=1.0)
    assert [len(batch) for batch in lm.batches] == [3, 3]
    assert [rollout.score for rollout in done] == [1, 0, 1]
    assert all(rollout.steps[0].completion.repaired for rollout in done)


def test_scores_reach_the_prediction_and_an_lm_without_them_is_a_fault_of_the_program() -> None:
    class Scoring(FakeLM):
        def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
            assert all(request.scores for request in requests)
            return [
                replace(one, scores={"answer": {"a": -1.0, "b": -2.0}}) for one in super().complete(requests, sampling)
            ]

    program = Predict("number -> answer", types={"answer": ["a", "b"]}, scores=True)
    (done,) = run(program, doubles(1), Scoring(lambda request: "a"))
    assert done.prediction == {"answer": "a", "scores": {"answer": {"a": -1.0, "b": -2.0}}}
    (done,) = run(program, doubles(1), FakeLM(lambda request: "a"), max_error_rate=1.0)
    assert done.error is not None
    assert "asks for scores, and there are none: they need an LM in this process" in done.error.message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def wreck(value: Any) -> None:
    """Changes all that can be changed in a value, from within."""
    for item in list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ():
        wreck(item)
    if isinstance(value, (list, dict)):
        value.clear()


class Wrecking(Program):
    ask = Stage(Signature.parse("question -> answer", instruction="Answer."))

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def run(self, question: Any) -> Generator[Call, Any, Mapping[str, Any]]:
        found = dict((yield self.ask(question=f"{question} {len(self.kept)}")))
        self.kept.append(question)
        wreck(question)
        prediction = {"answer": found["answer"], "deep": [question, {"more": [1]}]}
        found.clear()
        return prediction


@claimed(100)
@given(st.lists(json_values, min_size=1, max_size=4), json_values)
def test_nothing_that_programs_and_metrics_change_reaches_a_record_or_a_run(values: list[Any], label: Any) -> None:
    def metric(example: Example, prediction: Mapping[str, Any]) -> float:
        wreck(dict(example.inputs))
        wreck(dict(example.labels))
        wreck(dict(prediction))
        return 1.0

    examples = [Example(str(i), {"question": value}, {"answer": label}) for i, value in enumerate(values)]
    before, program = copy.deepcopy(examples), Wrecking()
    first, second = (run(program, examples, FakeLM(lambda _: "a"), metric=metric) for _ in range(2))
    assert examples == before
    assert first == second
    assert all(one.example == example for one, example in zip(first, before, strict=True))
    assert all(one.prediction["deep"][1] == {"more": [1]} for one in first if one.prediction)
    assert program.kept == []


def test_state_on_the_class_that_runs_change_is_warned_of() -> None:
    class Cached(Loop):
        seen: dict[str, str] = {}  # noqa: RUF012

        def run(self, number: int) -> Generator[Call, Mapping[str, str], Mapping[str, Any]]:
            self.seen[str(number)] = "seen"
            return (yield from super().run(number))

    with pytest.warns(UserWarning, match=r"Cached\.seen belongs to the class, and a run changed it"):
        run(Cached(1), doubles(1, 2), FakeLM(doubling))


def test_scores_need_a_field_with_choices() -> None:
    with pytest.raises(ValueError, match=r"no output of .* has choices"):
        Predict("number -> answer", scores=True)
    with pytest.raises(ValueError, match='has a field "scores"'):
        Stage(Signature.parse("number -> scores: bool"), scores=True)
