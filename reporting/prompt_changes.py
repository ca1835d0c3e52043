"""Prompt changes: what a step made of each stage's prompt, word by word in the instruction and demo by demo."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cotune.programs.calibration import shown
from cotune.reporting.run_record import Json

Mark = Literal["same", "add", "remove"]
Piece = tuple[Mark, str]
"""A piece of text and what became of it."""

_EMPTY: Json = {"instruction": "", "demos": ()}


@dataclass(frozen=True)
class PromptChange:
    """One stage's prompt before and after.

    Attributes:
        instruction: the pieces of both, in reading order.
        demos: all demos of both with their marks: first those of after, in their order, then those that went.
        moved: the demos are the same ones, in another order.
    """

    stage: str
    instruction: Sequence[Piece]
    demos: Sequence[tuple[Mark, Json]]
    before_demos: int
    after_demos: int
    moved: bool

    @property
    def changed(self) -> bool:
        return self.moved or any(mark != "same" for mark, _ in [*self.instruction, *self.demos])


def prompt_changes(before: Json | None, after: Json) -> list[PromptChange]:
    """A change a stage, in the order of the stages; everything is new where there is no `before`."""
    old = before or {}
    stages = [*after, *(stage for stage in old if stage not in after)]
    return [_change(stage, old.get(stage, _EMPTY), after.get(stage, _EMPTY)) for stage in stages]


def descent(candidates: Sequence[Json]) -> list[tuple[int, Json, Json | None]]:
    """The tree of candidates, each right behind what it was made from: (depth, candidate, what it was made from).

    One whose parent is none of those before it, as the incumbent, is a root; siblings keep their order.

    >>> [(depth, c["id"]) for depth, c, _ in descent([{"id": "a"}, {"id": "b", "parent": "a"}, {"id": "c"}])]
    [(0, 'a'), (1, 'b'), (0, 'c')]
    """
    found: list[tuple[int, Json, Json | None]] = []
    for one in candidates:
        place = next((at for at, (_, c, _) in enumerate(found) if c["id"] == one.get("parent")), None)
        if place is None:
            found.append((0, one, None))
            continue
        depth, parent, _ = found[place]
        end = next((at for at in range(place + 1, len(found)) if found[at][0] <= depth), len(found))
        found.insert(end, (depth + 1, one, parent))
    return found


def word_difference(before: str, after: str) -> list[Piece]:
    """Both texts as one; where they have little in common, the old one and then the new one.

    >>> word_difference("Classify the iris.", "Classify the flower.")
    [('same', 'Classify the '), ('remove', 'iris'), ('add', 'flower'), ('same', '.')]
    """
    old, new = _words(before), _words(after)
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    kinds = {kind for kind, *_ in matcher.get_opcodes()} - {"equal"}
    if before and after and len(kinds) > 1 and matcher.ratio() < 0.5:
        return [("remove", before), ("add", after)]
    pieces: list[Piece] = []
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            pieces.append(("same", "".join(new[c:d])))
            continue
        pieces += [("remove", "".join(old[a:b]))] if b > a else []
        pieces += [("add", "".join(new[c:d]))] if d > c else []
    return pieces


def _change(stage: str, before: Json, after: Json) -> PromptChange:
    old, new = list(before["demos"]), list(after["demos"])
    demos: list[tuple[Mark, Json]] = [("same" if demo in old else "add", demo) for demo in new]
    demos += [("remove", demo) for demo in old if demo not in new]
    return PromptChange(
        stage=stage,
        instruction=word_difference(_prompt_text(before), _prompt_text(after)),
        demos=demos,
        before_demos=len(old),
        after_demos=len(new),
        moved=old != new and all(mark == "same" for mark, _ in demos),
    )


def _prompt_text(prompt: Json) -> str:
    """The instruction, behind the form and the calibration where the prompt has its own."""
    own = [f"(form: {prompt['form']})"] if prompt.get("form") else []
    own += [f"({shown(prompt['calibration'])})"] if prompt.get("calibration") else []
    return " ".join([*own, prompt["instruction"]])


def demo_fields(demo: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of a demo, inputs first."""
    return [(str(name), str(value)) for name, value in [*demo["inputs"].items(), *demo["outputs"].items()]]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|\s+|[^\w\s]", text)
