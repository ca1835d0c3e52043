"""Each seam has a proof in under forty lines of a user's code, on a page that docs/extending.md leads to.

The pages' code runs in test_pages; the engine and the objective are put to work in test_engine and test_own_objective.
"""

from __future__ import annotations

import pytest
from pages import DOCS, shown

PROOFS = {
    "class PlainEngine(Engine):": "extending",
    "class LeaveOneOut(Objective):": "extending",
    "class Wordings(PromptSearch):": "prompt-search",
    "class Arrows(Form):": "forms",
    "class Parrot:": "concepts",
    "def explained(example, prediction):": "metric",
}


@pytest.mark.parametrize("line", PROOFS)
def test_a_part_of_ones_own_takes_forty_lines(line: str) -> None:
    page = PROOFS[line]
    assert len(shown(DOCS / f"{page}.md", line).text.splitlines()) <= 40
    assert page == "extending" or f"({page}.md)" in (DOCS / "extending.md").read_text(encoding="utf-8")
