"""Proposals: the instruction is found in what an LM wrote, and what cannot be one is turned down with the reason."""

from __future__ import annotations

import pytest
from cotune.inference import Codec
from cotune.programs import Completion, DescribeThenDecide, Request
from cotune.prompting import Proposer
from cotune.prompting.propose import Spent
from fakes import FakeLM, doubles, search_task

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
    ],
)
def test_the_instruction_is_found_in_what_was_written(written: str) -> None:
    found = Proposer().read(Completion(written), NOW, ())
    assert (found.text, found.flaw) == ("Triple it.", "")


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


def test_proposals_are_one_batch_of_plain_text_by_the_base() -> None:
    lm = FakeLM(lambda request: "Triple it.")
    Proposer(lm, temperature=0.7, max_tokens=99).write(["a", "b"], [3, 4])
    (batch,) = lm.batches
    assert batch == [
        Request([{"role": "user", "content": text}], seed=seed, adapter="") for text, seed in (("a", 3), ("b", 4))
    ]
    assert (lm.samplings[0].temperature, lm.samplings[0].max_new_tokens) == (0.7, 99)


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
