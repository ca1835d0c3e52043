"""Proposals: the instruction is found in what an LM wrote, and what cannot be one is turned down with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cotune.inference import Codec, StoredLM
from cotune.programs import BudgetedLM, Completion, DescribeThenDecide, Ledger, Request
from cotune.programs.ranks import Ranks
from cotune.prompting import Proposer, Review
from cotune.prompting.evaluate import CountingLM
from cotune.prompting.propose import Spent, Written, fenced
from fakes import FakeLM, doubles, search_task
from side_by_side import side_by_side

NOW = "Double the number."


def flaw(text: str, proposer: Proposer | None = None, *, finished: str = "eos", tried: tuple[str, ...] = ()) -> str:
    completion = Completion(text, finished=finished)  # type: ignore[arg-type]
    return (proposer or Proposer()).read(completion, NOW, tried).flaw


@pytest.mark.parametrize(
    "written",
    [
        "Triple it.",
        "```\nTriple it.\n```",
        "Sure! Here is a better instruction:\n\n```text\nTriple it.\n```\nLet me know what you think?",
        "Here's the new instruction:\nTriple it.",
        "Instruction:\nTriple it.",
        "**New instruction:**\nTriple it.",
        "The revised prompt:\n\nTriple it.",
        '"Triple it."',
        "<think>\nCould you double it? No.\n```\nno\n```\n</think>\nTriple it.",
        "```\nTriple it.",
        "````\nTriple it.\n````",
        "`Triple it.`",
        "```\nIt.\n```\nor longer:\n```\nTriple it.\n```",
        "```text\nIt.\n```\nor longer:\n```text\nTriple it.\n```",
        "Triple it.\n```",
    ],
)
def test_the_instruction_is_found_in_what_was_written(written: str) -> None:
    found = Proposer().read(Completion(written), NOW, ())
    assert (found.text, found.flaw) == ("Triple it.", "")


@pytest.mark.parametrize(
    "text",
    [
        'Name the team.\nThe output:\n```json\n{"team": "billing"}\n```\nNever name two.',
        "Name the team. For example:\n\n```\nbilling\n```\nNever name two.",
        "Name the team.\n````\nbilling\n```\n````\nNever name two.",
    ],
)
def test_an_instruction_in_a_fence_keeps_the_fences_that_it_holds(text: str) -> None:
    for written in (f"```\n{text}\n```", f"Sure:\n```text\n{text}\n```\nI hope it helps!"):
        assert Proposer().read(Completion(written), NOW, ()).text == text
    # Of two blocks it is the longer one, each taken whole.
    for written in (f"{fenced(text)}\nOr shorter:\n```\nName it.\n```", f"```\nName it.\n```\nOr:\n```\n{text}\n```"):
        assert Proposer().read(Completion(written), NOW, ()).text == text


@pytest.mark.parametrize("text", ["Name the team of:", "Reply behind a line\n```json\nand name one team."])
def test_fences_that_do_not_come_out_even_are_taken_to_the_last_one(text: str) -> None:
    assert Proposer().read(Completion(f"```\n{text}\n```\nI hope it helps!"), NOW, ()).text == text


@pytest.mark.parametrize("text", ["Rules for the numbers:\n- double them", "The answer is one of:\n- yes\n- no"])
def test_an_instruction_that_begins_with_a_heading_keeps_it(text: str) -> None:
    assert Proposer().read(Completion(text), NOW, ()).text == text


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("", "empty"),
        ("   \n", "empty"),
        ("```\n\n```", "empty"),
        ('{"instruction": "Triple it."}', "JSON"),
        ('```json\n["Triple it."]\n```', "JSON"),
        ("Could you share some examples of the inputs?", "a question or an excuse"),
        ("I'm sorry, but I can't help with that.", "a question or an excuse"),
        ("Please provide the instruction.", "a question or an excuse"),
        ("x" * 4001, "longer than max_chars (4000)"),
        ("double  the NUMBER.", "tried before"),
        ("Halve it.", "tried before"),
    ],
)
def test_what_cannot_be_an_instruction_is_turned_down(written: str, why: str) -> None:
    assert flaw(written, tried=("halve it.",)) == why


@pytest.mark.parametrize(
    "written", ["Which of the three species is it?", "{number} is to be doubled.", "You can do it: double the number!"]
)
def test_an_instruction_may_ask_the_program_a_question(written: str) -> None:
    assert flaw(written) == ""


@pytest.mark.parametrize(
    "text",
    [
        "Please provide the species of the flower, and nothing else.",
        "Do you see a question about money? Then the team is billing.",
        "I'm sorry to say many get this wrong: answer with the capital.",
    ],
)
def test_what_stands_in_the_fence_that_was_asked_for_is_an_instruction_whatever_it_begins_with(text: str) -> None:
    assert flaw(f"```\n{text}\n```") == flaw(f"<think>Hm.</think>Sure:\n```text\n{text}\n```") == ""
    assert flaw(text) == flaw(f"<think>\n```\nno\n```\n</think>{text}") == "a question or an excuse"


class Answering:
    """A person who answers with whatever it was made with."""

    def __init__(self, answers: Any) -> None:
        self.answers = answers

    def review(self, asked: Sequence[Review]) -> Any:
        return self.answers


def test_an_edit_by_a_person_may_begin_as_it_likes_and_keeps_the_other_rules() -> None:
    def edited(text: str) -> Written:
        proposer = Proposer(reviewer=Answering([text]), max_chars=40)
        return proposer.read_all([Completion("Triple it.")], [("double", NOW)], {"double": set()})[0]

    assert edited("Please give me the number twice.") == Written("Please give me the number twice.")
    assert edited("x" * 41).flaw == "longer than max_chars (40)"


@pytest.mark.parametrize("answers", [None, True, [], ["a", "b"], [True], "y"])
def test_answers_of_a_reviewer_that_are_not_a_text_for_each_are_refused(answers: Any) -> None:
    with pytest.raises(TypeError, match=r"^Answering\.review returned .* for 1 texts; return for each the"):
        Proposer(reviewer=Answering(answers)).read_all([Completion("It.")], [("double", NOW)], {"double": set()})


def test_a_text_that_was_cut_is_never_an_instruction() -> None:
    assert flaw("```\nTriple it, unless", finished="length") == "cut at max_tokens (512)"
    assert flaw("", finished="too_long") == "the request does not fit the proposer's context window"


def test_a_part_to_keep_stands_in_every_proposal() -> None:
    proposer = Proposer(keep=("<law>", "</law>"))
    now = "Answer. <law>Never name a\nperson.</law> Be brief."
    assert "Keep this part word for word, markers included: <law>Never name a\nperson.</law>" in proposer.rules(now)
    kept = Completion("Be kind. <law>Never name a\nperson.</law>")
    assert proposer.read(kept, now, ()).flaw == ""
    for changed in ("Be kind.", "<law>Never name a person.</law>", "Never name a\nperson."):
        assert proposer.read(Completion(changed), now, ()).flaw == "a part to keep is missing or changed"
    assert "word for word" not in Proposer().rules(now)


def test_an_instruction_is_held_to_a_number_of_tokens_of_the_programs_lm() -> None:
    lm, task_of = FakeLM(lambda request: ""), DescribeThenDecide("number -> answer", "Describe.", "Decide.")
    given = search_task(lm, task_of, train=[], dev=doubles(1))
    with pytest.raises(ValueError, match="needs an LM with a tokenizer"):
        Spent.of(given, Proposer(max_instruction_tokens=3))
    lm.codec = Codec(None, end_ids=[0], encode=lambda text: [*range(len(text.split()))])  # type: ignore[attr-defined]
    _, _, proposer = Spent.of(given, Proposer(max_instruction_tokens=3))
    assert "characters and 3 tokens" in proposer.rules(NOW)
    assert flaw("Now triple it.", proposer) == ""
    assert flaw("Now triple it twice.", proposer) == "longer than max_instruction_tokens (3)"
    for wrapped in (CountingLM(lm), BudgetedLM(lm, Ledger()), CountingLM(BudgetedLM(lm, Ledger()))):
        given = search_task(wrapped, task_of, train=[], dev=doubles(1))
        assert Spent.of(given, Proposer(max_instruction_tokens=3))[2].count("Now triple it.") == 3


def test_a_proposer_within_a_budget_is_loaded_like_any_other() -> None:
    lm, program = Loaded(lambda request: "Triple it."), DescribeThenDecide("number -> answer", "Describe.", "Decide.")
    given = search_task(FakeLM(lambda request: ""), program, train=[], dev=doubles(1))
    Spent.of(given, Proposer(BudgetedLM(lm, Ledger(), role="proposer")))
    assert lm.loads == 1


class Loaded(FakeLM):
    """Counts how often it was loaded."""

    loads = 0

    def load(self) -> None:
        self.loads += 1


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("counted", [False, True])
def test_what_was_proposed_before_max_calls_are_met_is_kept(stored: bool, counted: bool, tmp_path: Path) -> None:
    lm = FakeLM(lambda request: request.messages[0]["content"])
    ledger = Ledger()
    budgeted = BudgetedLM(lm, ledger, role="proposer", max_calls=3)
    proposer = Proposer(StoredLM(budgeted, str(tmp_path / "c.sqlite"), {"lm": "fake"}) if stored else budgeted)
    if counted:  # as in a search
        program = DescribeThenDecide("number -> answer", "Describe.", "Decide.")
        spent, _, proposer = Spent.of(search_task(lm, program, train=[], dev=doubles(1)), proposer)
    done = proposer.write(list("abcde"), range(5))
    assert [(one.text, one.finished == "refused") for one in done[:3]] == [(text, False) for text in "abc"]
    assert [one.finished for one in done[3:]] == ["refused", "refused"]
    assert lm.calls == ledger.roles["proposer"].calls == 3
    assert not counted or spent.proposer.calls == 5
    again = proposer.write(list("fbcg"), [5, 1, 2, 6])
    assert [one.text for one in again] == (["", "b", "c", ""] if stored else [""] * 4)
    assert lm.calls == 3


def test_proposals_are_one_batch_of_plain_text_by_the_base() -> None:
    lm = FakeLM(lambda request: "Triple it.")
    Proposer(lm, temperature=0.7, max_tokens=99).write(["a", "b"], [3, 4])
    (batch,) = lm.batches
    assert batch == [
        Request([{"role": "user", "content": text}], seed=seed, adapter="") for text, seed in (("a", 3), ("b", 4))
    ]
    assert (lm.samplings[0].temperature, lm.samplings[0].max_new_tokens) == (0.7, 99)


def test_proposals_that_one_process_asks_for_are_counted_in_all_by_the_search_around() -> None:
    def run(ranks: Ranks) -> int:
        around = CountingLM(FakeLM(lambda request: "Triple it."))
        given = search_task(around, DescribeThenDecide("number -> answer", "A.", "B."), train=[], dev=doubles(1))
        _, _, proposer = Spent.of(replace(given, runner=replace(given.runner, ranks=ranks)), Proposer())
        proposer.write(["a", "b"], [1, 2])
        return around.calls

    assert side_by_side(2, run) == [run(Ranks())] * 2 == [2, 2]


def test_stages_that_are_frozen_are_named_right() -> None:
    program = DescribeThenDecide("number -> answer", "Describe.", "Decide.")
    assert Proposer(frozen=("describe",)).stages(program) == ["decide"]
    with pytest.raises(
        ValueError, match='frozen stage "plan" is not in DescribeThenDecide, which has describe, decide'
    ):
        Proposer(frozen=("plan",)).stages(program)
    with pytest.raises(ValueError, match="all stages are frozen"):
        Proposer(frozen=("describe", "decide")).stages(program)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ({"max_tokens": 0}, "max_tokens 0 is below 1"),
        ({"max_chars": 0}, "max_chars 0 is below 1"),
        ({"max_instruction_tokens": 0}, "max_instruction_tokens 0 is below 1"),
        ({"keep": ("<", "")}, "is not two markers"),
    ],
)
def test_arguments_out_of_range_are_named(argument: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Proposer(**argument)  # type: ignore[arg-type]
