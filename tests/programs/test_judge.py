"""Claims about judges: what they are shown, how they are read, how often they contradict themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from cotune.programs import (
    BatchMetric,
    Example,
    Failure,
    FaultyProgramError,
    LMJudge,
    LMUnavailableError,
    Noise,
    Request,
    Rollout,
    Sampling,
    Score,
)
from fakes import FakeLM, Loop, doubles, doubling, runner


def judged(request: Request) -> str:
    """A right judge: the reference and the answer stand in lines of their own."""
    lines = request.messages[-1]["content"].splitlines()
    reference, answer = (next(x for x in lines if x.startswith(f"{name}: ")) for name in ("reference", "answer"))
    right = reference.split(": ")[1] == answer.split(": ")[1]
    return f"reasoning: It is {'right' if right else 'not'}.\nverdict: {'yes' if right else 'no'}"


PAIRS = [
    (Example.of({"number": n}, {"answer": str(2 * n)}, id=str(n)), {"answer": str(2 * n if n % 2 else 0)})
    for n in range(1, 5)
]


def test_verdicts_become_scores_and_what_was_said_becomes_feedback() -> None:
    found = LMJudge(FakeLM(judged)).scores(PAIRS)
    assert found == [Score(1, "It is right."), Score(0, "It is not."), Score(1, "It is right."), Score(0, "It is not.")]


def test_all_answers_are_judged_in_one_batch() -> None:
    fake = FakeLM(judged)
    LMJudge(fake, noise=1).scores(PAIRS)
    assert [len(batch) for batch in fake.batches] == [4, 4]
    assert fake.batches[0][0].seed != fake.batches[1][0].seed


def test_a_scale_is_divided_equally() -> None:
    fake = FakeLM(lambda request: "reasoning: hm\nverdict: 3")
    assert LMJudge(fake, scale=["1", "2", "3", "4", "5"])(*PAIRS[0]).value == 0.5


def test_it_is_shown_the_rubric_and_only_then_the_labels() -> None:
    fake = FakeLM(lambda request: "reasoning: hm\nverdict: yes")
    example = Example.of({"question": "Why?", "tone": "dry"}, {"answer": "secret"})
    LMJudge(fake, rubric="It is short.", reference=False)(example, {"answer": "Because."})
    system, user = (message["content"] for message in fake.requests[0].messages)
    assert "What makes an answer good: It is short." in system
    assert user == "task: question: Why?\ntone: dry\nanswer: Because."
    LMJudge(fake)(example, {"answer": "Because."})
    assert "reference: secret" in fake.requests[1].messages[-1]["content"]


def test_equal_answers_are_asked_alike_so_that_a_store_knows_them() -> None:
    fake = FakeLM(judged)
    judge = LMJudge(fake)
    judge.scores(PAIRS[:2])
    judge.scores(list(reversed(PAIRS[:2])))
    assert fake.batches[0] == list(reversed(fake.batches[1]))


# In a run


def scored(judge: Any, *numbers: int, **changes: Any) -> list[Rollout]:
    program = Loop(times=1)
    return runner(FakeLM(doubling), program, metric=judge, **changes).run(doubles(*numbers), program.initial_prompts())


def test_a_run_is_judged_once_together() -> None:
    fake = FakeLM(judged)
    done = scored(LMJudge(fake), 1, 2, 3)
    assert [(rollout.score, rollout.feedback) for rollout in done] == [(1, "It is right.")] * 3
    assert len(fake.batches) == 1


def test_a_verdict_that_cannot_be_read_is_a_failure_of_the_metric() -> None:
    def answer(request: Request) -> str:
        return "I cannot say" if "task: 2\n" in request.messages[-1]["content"] else judged(request)

    done = scored(LMJudge(FakeLM(answer)), 1, 2, 3)
    assert [rollout.score for rollout in done] == [1, 0, 1]
    assert done[1].error is not None
    assert done[1].error.kind == "metric"
    assert 'the judge\'s verdict cannot be read: stage "judge"' in done[1].error.message
    with pytest.raises(FaultyProgramError):
        scored(LMJudge(FakeLM(answer)), 2, max_error_rate=0.0)


class Gone(FakeLM):
    def complete(self, requests: Sequence[Request], sampling: Sampling) -> Any:
        raise LMUnavailableError("the judge is gone")


def test_a_judge_that_is_gone_ends_the_run() -> None:
    with pytest.raises(LMUnavailableError, match="the judge is gone"):
        scored(LMJudge(Gone(judged)), 1)


class Picky(BatchMetric):
    """Scores all together; raises on an answer of 4, alone and in company."""

    def __init__(self, short: bool = False) -> None:
        self.short, self.batches = short, list[int]()

    def scores(self, pairs: Sequence[tuple[Example, Mapping[str, Any]]]) -> list[Score | Failure]:
        self.batches.append(len(pairs))
        if any(prediction["answer"] == "4" for _, prediction in pairs):
            raise ZeroDivisionError("four")
        return [Score(1.0)] * (len(pairs) - self.short)


def test_a_fault_of_a_batch_is_laid_on_the_example_that_caused_it() -> None:
    metric = Picky()
    done = scored(metric, 1, 2, 3)
    assert [rollout.score for rollout in done] == [1, 0, 1]
    assert done[1].error is not None
    assert "ZeroDivisionError: four" in done[1].error.message
    assert metric.batches == [3, 1, 1, 1]


def test_a_batch_with_a_score_missing_scores_nothing() -> None:
    done = scored(Picky(short=True), 1, 3, max_error_rate=1.0)
    assert {rollout.error and rollout.error.message for rollout in done} == {
        "the metric returned 1 scores for 2 predictions"
    }


class Lost(BatchMetric):
    def scores(self, pairs: Sequence[tuple[Example, Mapping[str, Any]]]) -> list[Score | Failure]:
        return [Failure("lost", 7) for _ in pairs]  # type: ignore[arg-type]


def test_a_failure_that_a_batch_metric_returns_is_the_metrics_whatever_it_names() -> None:
    (done,) = scored(Lost(), 1, max_error_rate=1.0)
    assert done.error == Failure("metric", "7")


# Noise


def fickle(request: Request) -> str:
    """Contradicts itself on the tasks that end with 7: the verdict there follows the seed, which differs."""
    task = request.messages[-1]["content"].splitlines()[0]
    seeds = FIRST.setdefault(task, request.seed)
    changed = task.endswith("7") and request.seed != seeds
    return f"reasoning: hm\nverdict: {'no' if changed else 'yes'}"


FIRST: dict[str, int] = {}


def test_contradictions_are_counted_on_the_share_that_is_asked_twice() -> None:
    FIRST.clear()
    pairs = [(Example.of({"number": n}, {"answer": "1"}), {"answer": "1"}) for n in range(200)]
    fake = FakeLM(fickle)
    judge = LMJudge(fake, noise=0.5)
    first = judge.scores(pairs)
    assert all(isinstance(one, Score) and one.value == 1 for one in first)  # the first verdict counts
    noise = judge.noise
    assert 70 < noise.asked_twice < 130
    assert noise.asked_twice == fake.calls - 200
    assert 0.04 < noise.rate < 0.17  # a tenth of the tasks
    assert noise.variance == pytest.approx(noise.rate / 2)
    assert f"contradicted itself on {noise.contradicted} of {noise.asked_twice}" in str(noise)
    assert noise.standard_error(50, error=0.05) > 0.05
    judge.scores(pairs)
    assert judge.noise.asked_twice == noise.asked_twice  # the same answers count once
    continued = LMJudge(FakeLM(fickle), noise=0.5)
    continued.load_state_dict(json.loads(json.dumps(judge.state_dict())))
    continued.scores(pairs[:20])
    assert continued.noise == noise  # of the whole run


def test_a_judge_that_was_asked_once_says_that_its_noise_is_not_known() -> None:
    judge = LMJudge(FakeLM(judged))
    judge.scores(PAIRS)
    assert judge.noise == Noise(0, 0, 0.0)
    assert "its noise is not known" in str(judge.noise)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scale": ["yes"]}, "two verdicts"),
        ({"noise": 1.5}, "noise 1.5"),
        ({"reference": False}, "neither a rubric nor a reference"),
    ],
)
def test_a_judge_that_cannot_judge_is_refused(options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LMJudge(FakeLM(judged), **options)
