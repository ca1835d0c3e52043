"""Thinking: it stands beside the answer, and in no field's text, whichever field a model thinks in."""

from __future__ import annotations

from typing import Any

import pytest
from cotune.datamodules.thinking import Thinking, told_apart
from cotune.programs import Completion
from cotune.programs.layout import Choices, Field, Fixed, Layout
from cotune.programs.lm import Filled

LAYOUT: Layout = (Field("why"), Fixed("\nanswer:"), Field("answer", " "))
OPENED = Thinking(opened=("<think>", "</think>"))


def completion(why: str, answer: str, *, ended: Any = "stop") -> Completion:
    fields = (Filled("why", why, 0, 3, ended), Filled("answer", answer, 4, 6, "eos"))
    return Completion(f"{why}\nanswer:{answer}", (1,), tuple(range(7)), fields=fields)


@pytest.mark.parametrize(
    ("thinking", "done", "text", "thought"),
    [
        (Thinking(), completion("<think>hm</think>\n\nso", " 4"), "so\nanswer: 4", "hm"),
        (OPENED, completion("hm\n</think>\n\nso", " 4"), "so\nanswer: 4", "hm"),
        (OPENED, completion("so", " 4"), "so\nanswer: 4", ""),
        (OPENED, completion("\n</think>\n\nso", " 4"), "so\nanswer: 4", ""),
        (OPENED, completion("hm, hm", " 4", ended="length"), "\nanswer: 4", "hm, hm"),
        (Thinking(), completion("so", "<think>2 and 2</think>4"), "so\nanswer:4", "2 and 2"),
        (Thinking(), completion("<think>a</think>b", "<think>c</think>b"), "b\nanswer:b", "a\n\nc"),
    ],
)
def test_thinking_is_told_apart_field_by_field(thinking: Thinking, done: Completion, text: str, thought: str) -> None:
    found = told_apart(done, LAYOUT, thinking)
    assert (found.text, found.thinking) == (text, thought)
    assert "\nanswer:".join(field.text for field in found.fields) == text
    assert found.completion_ids == done.completion_ids
    assert [(f.start, f.end) for f in found.fields] == [(f.start, f.end) for f in done.fields]


def test_nothing_is_thought_in_a_field_that_is_held_to_a_syntax() -> None:
    layout = (Field("answer", syntax=Choices(("yes", "</think>"))),)
    done = Completion("</think>", fields=(Filled("answer", "</think>", 0, 1, "length"),))
    assert told_apart(done, layout, OPENED) == done
