"""Scoring: incumbent first, ties to the more readable, then the earlier; pruning that never changes the winner."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import pytest
from cotune.programs import (
    Example,
    FaultyProgramError,
    Predict,
    Prompt,
    Prompts,
    Request,
    prompts_id,
)
from cotune.prompting import Candidate, Proposal, SearchTask, choose, score_candidate
from cotune.prompting.evaluate import go_on
from fakes import FakeLM, asked, instruction, search_task
from hypothesis import given, settings
from hypothesis import strategies as st

Table = Mapping[str, Sequence[float | str]]
"""Instruction -> what the LM writes for each dev example: its score, or text that the metric chokes on."""


def says(name: str) -> Prompts:
    return {"predict": Prompt(name)}


def stated(example: Example, prediction: Mapping[str, Any]) -> float:
    return float(prediction["answer"])


def table_task(table: Table, incumbent: str, **changes: Any) -> tuple[SearchTask, FakeLM]:
    """A task in which the instruction and the dev example alone decide the score."""

    def answer(request: Request) -> str:
        return str(table[instruction(request)][int(asked(request, "row"))])

    lm, size = FakeLM(answer), len(table[incumbent])
    dev = [Example.of({"row": row}, {}, id=str(row)) for row in range(size)]
    prompts = {"initial": says("initial"), "incumbent": says(incumbent)}
    task = search_task(lm, Predict("row -> answer"), train=[], dev=dev, **{"metric": stated, **prompts, **changes})
    return task, lm


def search(table: Table, *names: str, chunk: int = 64, **changes: Any) -> tuple[Any, FakeLM]:
    task, lm = table_task(table, names[0], **changes)
    return choose(task, [Proposal(says(name), name) for name in names[1:]], chunk=chunk), lm


@st.composite
def tables(draw: st.DrawFn) -> tuple[dict[str, list[float | str]], list[str], int]:
    size = draw(st.integers(1, 12))
    # Few distinct values make ties and near ties; 0.1 and 0.7 make sums that round. "" cannot be read.
    score = st.sampled_from([0.0, "", 0.1, 0.3, 0.7, 1.0]) | st.floats(0, 1)
    table = draw(st.lists(st.lists(score, min_size=size, max_size=size), min_size=1, max_size=5))
    rows = {f"candidate {number}": scores for number, scores in enumerate(table)}
    order = draw(st.lists(st.sampled_from(sorted(rows)), min_size=1, max_size=8))
    return rows, order, draw(st.integers(1, 5))


@settings(max_examples=60, deadline=None, database=None)
@given(tables())
def test_pruning_never_changes_the_winner(case: tuple[dict[str, list[float | str]], list[str], int]) -> None:
    table, order, chunk = case
    scores = {name: [float(said or 0) for said in row] for name, row in table.items()}
    means = [math.fsum(scores[name]) / len(scores[name]) for name in order]
    ranks = [(mean, -table[name].count("")) for mean, name in zip(means, order, strict=True)]
    winner = ranks.index(max(ranks))  # the first of the best

    found, lm = search(table, *order, chunk=chunk)

    assert found.prompts == says(order[winner])
    assert found.score == means[winner]
    assert lm.calls <= len(set(order)) * len(table[order[0]])
    for candidate in found.candidates:  # what is known of a pruned one is true, and does not look better than it is
        full = scores[candidate.why if candidate.why != "incumbent" else order[0]]
        assert candidate.scores == tuple(full[: len(candidate.scores)])
        assert candidate.pruned == (len(candidate.scores) < len(full))
        assert candidate.score <= found.score + 1e-12


def test_a_candidate_that_cannot_win_is_left_early_and_marked() -> None:
    found, lm = search({"good": [1, 1, 1, 0], "bad": [0, 0, 1, 1]}, "good", "bad", chunk=1)
    assert found.candidates[1].scores == (0.0,)  # 0 + 3 left cannot exceed 3
    assert found.candidates[1].pruned
    assert lm.calls == 5


def test_a_candidate_that_can_only_tie_is_left_before_its_first_example() -> None:
    found, lm = search({"full": [1, 1], "also": [1, 1]}, "full", "also")
    assert found.candidates[1] == Candidate(says("also"), (), "", "also", pruned=True)
    assert (lm.calls, found.prompts) == (2, says("full"))


def test_a_candidate_that_can_still_win_is_scored_to_the_end() -> None:
    found, lm = search({"half": [1, 1, 0, 0], "late": [0, 1, 1, 1]}, "half", "late", chunk=1)
    assert (found.prompts, found.score, lm.calls) == (says("late"), 0.75, 8)


def test_ties_keep_the_incumbent_whatever_stands_behind_it() -> None:
    found, _ = search({"first": [0, 1], "second": [1, 0], "third": [0.5, 0.5]}, "first", "second", "third")
    assert found.prompts == says("first")
    assert [candidate.why for candidate in found.candidates] == ["incumbent", "second", "third"]


@pytest.mark.parametrize("racing", [None, 0.9])
def test_of_equal_scores_the_more_readable_wins(racing: float | None) -> None:
    task, _ = table_task({"mute": ["", "", ""], "wrong": [0, "", 0], "wordy": ["", 0, 0]}, "mute")
    found = choose(task, [Proposal(says(name), name) for name in ("wrong", "wordy")], racing=racing)
    assert found.prompts == says("wrong")
    assert (found.score, found.candidates[0].rank, found.candidates[1].rank) == (0.0, (0.0, -3), (0.0, -1))


def test_a_search_that_goes_on_takes_the_more_readable_too() -> None:
    task, _ = table_task({"mute": [1, ""], "clear": [1, 0], "late": [0, 1]}, "mute")
    proposals = [Proposal(says(name), name) for name in ("clear", "late")]
    found = go_on(task, choose(task, []), proposals, until=lambda: False, chunk=1)
    assert found.prompts == says("clear")
    assert [candidate.pruned for candidate in found.candidates] == [False, False, True]


def test_a_search_that_goes_on_ends_at_a_full_score_which_nothing_beats() -> None:
    task, lm = table_task({"all": [1, 1]}, "all")
    endless = (Proposal(says(f"no. {n}"), "random") for n in count())
    found = go_on(task, choose(task, []), endless, until=lambda: False)
    assert (len(found.candidates), lm.calls) == (1, 2)
    assert found.notes[-1] == "ended with a full score on dev"


def test_the_incumbent_is_scored_on_all_of_dev_even_at_0() -> None:
    found, _ = search({"bad": [0, 0, 0]}, "bad", chunk=1)
    assert found.candidates[0].scores == (0.0, 0.0, 0.0)
    assert not found.candidates[0].pruned


def test_equal_prompts_are_scored_once_and_noted() -> None:
    found, lm = search({"a": [0, 1], "b": [1, 1]}, "a", "b", "a", "b")
    assert [candidate.id for candidate in found.candidates] == [prompts_id(says("a")), prompts_id(says("b"))]
    assert lm.calls == 4
    assert found.notes == ('"a" equals "incumbent": not scored again', '"b" equals "b": not scored again')


@pytest.mark.parametrize(("chunk", "batches"), [(64, [5]), (2, [2, 2, 1]), (1, [1, 1, 1, 1, 1])])
def test_dev_runs_in_chunks_of_one_batch(chunk: int, batches: list[int]) -> None:
    _, lm = search({"a": [0, 1, 0, 1, 0]}, "a", chunk=chunk)
    assert [len(batch) for batch in lm.batches] == batches


def test_the_chunk_has_no_influence_on_the_draws() -> None:
    seeds = []
    for chunk in (1, 64):
        _, lm = search({"a": [0, 1, 0], "b": [1, 1, 1]}, "a", "b", chunk=chunk, seed=5)
        seeds.append([request.seed for request in lm.requests])
        # The same draws for both candidates, so they differ by their prompts alone.
        assert seeds[-1][:3] == seeds[-1][3:]
    assert seeds[0] == seeds[1]


def test_bad_rollouts_score_0_and_are_counted_and_noted() -> None:
    found, _ = search({"a": [1, "", "many", 1, 1]}, "a", chunk=1)
    (candidate,) = found.candidates
    assert candidate.scores == (1.0, 0.0, 0.0, 1.0, 1.0)
    assert candidate.errors == {"format": 1, "metric": 1}
    assert found.notes == (
        '"incumbent": 1 format errors in 5 of 5 dev examples, each scored 0',
        '"incumbent": 1 metric errors in 5 of 5 dev examples, each scored 0',
    )
    assert [(kind, fault.count) for kind, fault in found.faults.items()] == [("metric", 1)]


def test_a_chunk_full_of_faults_does_not_raise_while_dev_may_still_be_fine() -> None:
    found, _ = search({"a": ["one", "two", 1, 1]}, "a", chunk=1)
    assert found.score == 0.5


def test_too_many_faults_on_dev_raise_as_soon_as_they_are_too_many() -> None:
    task, lm = table_task({"a": ["one", "two", "three", 1, 1]}, "a", max_error_rate=0.5)
    with pytest.raises(FaultyProgramError, match="metric failed on 3 of 3 examples"):
        score_candidate(task, Proposal(says("a"), "a"), chunk=1)
    assert lm.calls == 3


def test_a_chunk_of_nothing_is_refused() -> None:
    task, _ = table_task({"a": [1]}, "a")
    with pytest.raises(ValueError, match="chunk 0 is below 1"):
        score_candidate(task, Proposal(says("a"), "a"), chunk=0)


class Log:
    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def start(self, total: int, what: str) -> None:
        self.told.append(("start", total, what))

    def advance(self, n: int) -> None:
        self.told.append(("advance", n))

    def candidate(self, index: int, total: int, candidate: Candidate, best: float) -> None:
        self.told.append(("candidate", index, total, candidate.why, best))


def test_progress_hears_of_every_pass_and_candidate() -> None:
    log = Log()
    search({"a": [0, 1], "b": [1, 1]}, "a", "b", chunk=1, progress=log)
    assert log.told == [
        ("start", 2, "incumbent"),
        ("advance", 1),
        ("advance", 1),
        ("candidate", 0, 2, "incumbent", 0.5),
        ("start", 2, "b"),
        ("advance", 1),
        ("advance", 1),
        ("candidate", 1, 2, "b", 1.0),
    ]
