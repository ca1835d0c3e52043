"""Racing: the best candidate is nearly always kept, about half the rollouts are saved, the incumbent never worsened."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from cotune.programs import Example, Predict, Prompt, Prompts
from cotune.prompting import Found, Proposal, RandomDemoSearch, SearchTask, choose
from cotune.prompting.racing import contenders
from fakes import FakeLM, asked, instruction, search_task

Table = Mapping[str, Sequence[float]]
"""Instruction -> the score of each dev example; the first one's is the incumbent's."""

SIZE, CANDIDATES = 96, 9


def simulated(seed: int) -> Table:
    """Scores of candidates of different skill on examples of different difficulty, 0 or 1."""
    rng = random.Random(seed)
    hard = [rng.gauss(0, 1.5) for _ in range(SIZE)]
    skills = [rng.gauss(0, 0.6) for _ in range(CANDIDATES)]
    return {
        f"c{at}": [float(rng.random() < 1 / (1 + math.exp(difficulty - skill))) for difficulty in hard]
        for at, skill in enumerate(skills)
    }


def says(name: str) -> Prompts:
    return {"predict": Prompt(name)}


def stated(example: Example, prediction: Mapping[str, Any]) -> float:
    return float(prediction["answer"])


def made(table: Table) -> tuple[SearchTask, FakeLM]:
    lm = FakeLM(lambda request: str(table[instruction(request)][int(asked(request, "row"))]))
    incumbent = says(next(iter(table)))
    dev = [Example.of({"row": row}, {}, id=str(row)) for row in range(len(next(iter(table.values()))))]
    prompts = {"initial": incumbent, "incumbent": incumbent}
    task = search_task(lm, Predict("row -> answer"), train=[], dev=dev, metric=stated, **prompts)
    return task, lm


def raced(table: Table, racing: float | None) -> tuple[Found, int]:
    """What was found, and the rollouts it took; one by one with exact pruning where racing is None."""
    task, lm = made(table)
    found = choose(task, [Proposal(says(name), name) for name in list(table)[1:]], chunk=16, racing=racing)
    return found, lm.calls


def best_of(table: Table) -> float:
    """By brute force."""
    return max(math.fsum(float(score) for score in scores) / SIZE for scores in table.values())


def test_the_best_is_nearly_always_kept_for_half_the_rollouts() -> None:
    runs = [(table, *raced(table, racing=0.98)) for table in map(simulated, range(12))]
    losses = [best_of(table) - found.score for table, found, _ in runs]
    assert sum(loss == 0 for loss in losses) >= 0.85 * len(runs)
    assert sum(losses) / len(losses) < 0.005
    assert sum(calls for _, _, calls in runs) < 0.6 * len(runs) * SIZE * CANDIDATES
    pruning = sum(raced(table, None)[1] for table, _, _ in runs)
    assert sum(calls for _, _, calls in runs) < 0.75 * pruning


def test_more_confidence_runs_more_and_misses_less() -> None:
    tables = [simulated(seed) for seed in range(6)]
    loose, strict = ([raced(table, racing=confidence) for table in tables] for confidence in (0.75, 0.999))
    assert sum(calls for _, calls in loose) < sum(calls for _, calls in strict)
    assert sum(found.score for found, _ in loose) <= sum(found.score for found, _ in strict)


def test_every_score_is_the_one_that_running_alone_gives() -> None:
    table = simulated(0)
    found, _ = raced(table, racing=0.9)
    for candidate in found.candidates:
        name = candidate.prompts["predict"].instruction
        assert list(candidate.scores) == table[name][: len(candidate.scores)]


def test_the_incumbent_runs_to_the_end_and_is_never_made_worse() -> None:
    for seed in range(6):
        found, _ = raced(simulated(seed), racing=0.6)
        assert len(found.candidates[0].scores) == SIZE
        assert found.score >= found.candidates[0].score
        assert len(next(c for c in found.candidates if c.prompts == found.prompts).scores) == SIZE


def test_equal_candidates_leave_the_incumbent_in_place() -> None:
    table = {f"c{at}": [1.0, 0.0] * 24 for at in range(4)}
    found, _ = raced(table, racing=0.98)
    assert found.prompts == says("c0")


def test_the_notes_say_who_was_dropped_and_when() -> None:
    table = {"c0": [1.0] * SIZE, "c1": [0.0] * SIZE}
    found, calls = raced(table, racing=0.98)
    assert calls == SIZE + 16
    assert [note for note in found.notes if "racing" in note] == ['"c1" dropped by racing after 16 of 96 dev examples']


def test_a_few_equal_gaps_are_no_proof() -> None:
    assert contenders({0: [1.0, 1.0], 1: [1.0, 0.0]}, 100, confidence=0.98) == [0, 1]


def test_who_cannot_catch_up_drops_out_at_any_confidence() -> None:
    assert contenders({0: [1.0] * 9, 1: [0.0] * 9}, 10, confidence=0.999999) == [0]


@pytest.mark.parametrize("racing", [0.5, 1.0, 98])
def test_a_confidence_outside_its_range_is_explained(racing: float) -> None:
    with pytest.raises(ValueError, match=r"outside \(0.5, 1\)"):
        RandomDemoSearch(racing=racing)
    with pytest.raises(ValueError, match=r"outside \(0.5, 1\)"):
        raced({"c0": [1.0] * SIZE}, racing=racing)
