"""The objective that docs/extending.md shows, as a module of one's own."""

from pages import DOCS, shown

exec(shown(DOCS / "extending.md", "class LeaveOneOut(Objective):").text)
