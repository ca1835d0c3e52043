"""Schedules: what is read, and what is refused with which words."""

from __future__ import annotations

import pytest
from cotune.callbacks.schedule import parse_schedule
from cotune.storage.schedule_text import name_of


@pytest.mark.parametrize("text", ["p -> w -> p", "p->w->p", " p  ->w ->   p ", "P -> W -> P", "p → w → p"])
def test_spacing_case_and_arrows_do_not_matter(text: str) -> None:
    assert parse_schedule(text) == ("p", "w", "p")


@pytest.mark.parametrize(("text", "wrong"), [("p->x", "x"), ("p,w", "p,w"), ("p ->", ""), ("prompts -> w", "prompts")])
def test_an_unknown_step_is_named_and_a_right_schedule_shown(text: str, wrong: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_schedule(text)
    assert str(error.value) == (
        f'schedule "{text}": unknown step "{wrong}". '
        'Steps are "p" (prompts) and "w", "d", "k", "g" (weights), e.g. "p -> w -> p".'
    )


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_schedule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="the schedule is empty"):
        parse_schedule(text)


def test_prefixes_are_named_by_their_steps() -> None:
    steps = parse_schedule("p -> w -> p")
    assert [name_of(steps[:n]) for n in range(4)] == ["vanilla", "p", "p -> w", "p -> w -> p"]
