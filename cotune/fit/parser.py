"""The parser of fit, validate and test: Lightning's, with values as signatures are written, and errors of one line."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from cotune.fit.help_page import arrange, options_of
from cotune.fit.parse_errors import LIGHTNINGS, explain

_read_yaml = get_loader("yaml")


def _value(text: str) -> Any:
    """The value of an option: YAML, but `question -> answer: float` is a signature and no mapping, and None is null.

    jsonargparse reads the value of a nested option twice, and makes "None" of a null in between.
    """
    if text == "None":
        return None
    return text if "->" in text and text.strip()[0].isidentifier() and "\n" not in text.strip() else _read_yaml(text)


set_loader("yaml", _value, exceptions=(yaml.YAMLError,))


class Parser(LightningArgumentParser):
    """Lightning's parser, whose errors are one line and name the nearest right option."""

    help_group = "all"
    """The group of options that --help shows."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # The base class would print a page of usage first, and the message would be lost behind it.
        print(f"cotune: error: {explain(message, options_of(self))}", file=sys.stderr)
        sys.exit(2)

    def dump(self, *args: Any, **kwargs: Any) -> str:
        # A run writes its options four times. They were checked when they were parsed, which takes most of each.
        kwargs.setdefault("skip_validation", True)
        if "skip_none" in kwargs:  # Lightning's old name for it; jsonargparse would warn of it as ours
            kwargs["skip_unset"] = kwargs.pop("skip_none")
        return str(super().dump(*args, **kwargs))

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        if "alternate.schedule" in options_of(self) and self.prog.split()[-1] in LIGHTNINGS:
            arrange(self, self.help_group)
        return super().format_help(*args, **kwargs)
