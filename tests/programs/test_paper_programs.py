"""The paper's programs: multi-hop question answering, and describing before deciding."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from cotune.programs import (
    DescribeThenDecide,
    Example,
    MultiHopQA,
    Predict,
    Program,
    Request,
    Rollout,
)
from fakes import FakeLM, instruction, runner


def run_one(program: Program, example: Example, lm: FakeLM) -> Rollout:
    (done,) = runner(lm, program).run([example], program.initial_prompts())
    assert done.error is None, done.error
    return done


class Shelf:
    """A retriever with a fixed answer for each query; records what it was asked."""

    def __init__(self, **passages: list[str]) -> None:
        self.passages, self.asked = passages, list[tuple[str, int]]()

    def __call__(self, query: str, k: int) -> Sequence[str]:
        self.asked.append((query, k))
        return self.passages[query][:k]


def hopping(request: Request) -> str:
    if instruction(request).startswith("Answer"):
        return "reasoning: both\nanswer: Rome"
    return "reasoning: look\nsearch_query: " + ("second" if "[1]" in request.messages[-1]["content"] else "first")


EXAMPLE = Example.of({"question": "Where?"}, {"answer": "rome"}, id="q")


def test_each_hop_sees_what_the_hops_before_it_found() -> None:
    shelf = Shelf(first=["A", "B"], second=["C", "D"])
    done = run_one(MultiHopQA(shelf, k=2), EXAMPLE, FakeLM(hopping))
    assert [step.inputs["context"] for step in done.steps] == ["(none)", "[1] A\n[2] B", "[1] A\n[2] B\n[3] C\n[4] D"]
    assert shelf.asked == [("first", 2), ("second", 2)]
    assert done.score == 1.0


def test_multi_hop_deduplicates_contexts_over_hops() -> None:
    shelf = Shelf(first=["A", "B"], second=["B", "C", "A"])
    done = run_one(MultiHopQA(shelf, k=3), EXAMPLE, FakeLM(hopping))
    assert done.steps[-1].inputs["context"] == "[1] A\n[2] B\n[3] C"


def test_the_hops_are_stages_of_their_own_and_a_run_has_three_steps() -> None:
    program = MultiHopQA(Shelf(first=[], second=[]))
    assert list(program.stages) == ["first_hop", "second_hop", "answer"]
    assert {stage.signature.outputs[0] for stage in program.stages.values()} == {"reasoning"}
    # Nothing is found, so both hops see no context and ask the same.
    done = run_one(program, EXAMPLE, FakeLM(hopping))
    assert [step.stage for step in done.steps] == ["first_hop", "second_hop", "answer"]


def test_reasoning_is_optional() -> None:
    stages = MultiHopQA(Shelf(), reasoning=False).stages
    assert [stage.signature.outputs for stage in stages.values()] == [("search_query",), ("search_query",), ("answer",)]
    assert Predict("a -> b", reasoning=True).stages["predict"].signature.outputs == ("reasoning", "b")


def test_decide_sees_the_inputs_and_the_description() -> None:
    program = DescribeThenDecide("length, width -> answer", "Describe it.", "Decide.", {"answer": "big or small"})
    lm = FakeLM(lambda request: "a long thing" if instruction(request) == "Describe it." else "big")
    done = run_one(program, Example.of({"length": 9, "width": 1.5}, {"answer": "big"}), lm)
    assert [step.stage for step in done.steps] == ["describe", "decide"]
    assert dict(done.steps[1].inputs) == {"length": "9", "width": "1.5", "description": "a long thing"}
    assert done.score == 1.0


def test_descriptions_go_to_the_stages_that_have_the_field() -> None:
    about = {"length": "in cm", "description": "one sentence", "answer": "big or small"}
    stages = DescribeThenDecide("length -> answer", "d", "e", about).stages
    assert dict(stages["describe"].signature.descriptions) == {"length": "in cm", "description": "one sentence"}
    assert dict(stages["decide"].signature.descriptions) == about
    with pytest.raises(ValueError, match='"colour" is described'):
        DescribeThenDecide("length -> answer", "d", "e", {"colour": "red"})


def test_a_passage_that_a_retriever_gives_twice_stands_in_the_context_once() -> None:
    shelf = Shelf(first=["A", "A"], second=["B", "B"])
    done = run_one(MultiHopQA(shelf, k=2), EXAMPLE, FakeLM(hopping))
    assert done.steps[-1].inputs["context"] == "[1] A\n[2] B"
