"""The engine that docs/extending.md shows, as a module of one's own."""

from pages import DOCS, shown

exec(shown(DOCS / "extending.md", "class PlainEngine(Engine):").text)
