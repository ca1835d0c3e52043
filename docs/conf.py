"""How Sphinx builds the site: Markdown pages by MyST, the API reference from docstrings, nothing from the network."""

import re
from importlib.metadata import version as installed
from typing import Any

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

project = "cotune"
author = "the cotune contributors"
copyright = "the cotune contributors, Apache-2.0"
version = release = installed("cotune")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3

napoleon_numpy_docstring = False
napoleon_use_ivar = True  # dataclass fields are listed once, with their meaning
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # Lightning's would come with references into Lightning's own docs
autodoc_default_options = {"members": True, "imported-members": True}
python_use_unqualified_type_names = True
python_display_short_literal_types = True
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"cotune {version}"
html_show_sourcelink = False
html_copy_source = False


def as_markdown(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are Markdown where it differs: code in single backticks, and bars that mean nothing."""
    text = "\n".join(lines).replace("|", r"\|")
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)(\w?)", _literal, text)
    lines[:] = text.split("\n")


def _literal(found: re.Match[str]) -> str:
    code = found[1].replace(r"\|", "|")
    return f"``{code}``" + (rf"\ {found[2]}" if found[2] else "")


def setup(app: Sphinx) -> None:
    app.add_lexer("csv", TextLexer)
    app.connect("autodoc-process-docstring", as_markdown)
