"""The --help of fit, validate and test: the questions people have first, options of the chosen classes among them.

Of argparse and jsonargparse this file alone uses what they do not promise. tests/test_internals.py says from
which version it was read, and fails if it goes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from cotune.datamodules import TraceDataModule
from cotune.lightning_modules import LanguageModel
from cotune.prompting import RandomDemoSearch

_SAID = {
    "fit": "Tunes a program by a schedule of prompt and weight steps, and scores the result on test. After a stop or a "
    "kill the same command goes on.",
    "validate": "Scores a program on val: as it comes, or a run's with --ckpt_path last.",
    "test": "Scores a program on test: as it comes, or a run's with --ckpt_path last.",
}
_CLASSES = {"alternate.search": RandomDemoSearch, "model.lm": LanguageModel, "data": TraceDataModule}
"""Option that chooses a class -> the class whose options are shown: the default, or the base of all."""

_ORDER = ("", "alternate", "model", "data", "record", "log", "ckpt_path", "trainer")
"""First parts of the options' names, in the order of their groups."""

_TITLES = {"ckpt_path": "Another checkpoint", "trainer": "Lightning's trainer"}
_HELP = {
    "seed_everything": "of all that is drawn: the four sets, the adapter, demos, samples (type: int, default: 0)",
    "ckpt_path": 'a checkpoint to start from, "last" for the newest of the run; a stopped fit goes on without it',
    "weights_only": argparse.SUPPRESS,  # checkpoints are never read otherwise
}


def options_of(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """A parser's options and their types, the subcommands' included."""
    found: dict[str, Any] = {}
    for action in parser._actions:
        if isinstance(action.choices, dict):  # the subcommands
            for inner in action.choices.values():
                found |= options_of(inner)
        else:
            found[action.dest] = getattr(action, "_typehint", None)
    return found


def arrange(parser: LightningArgumentParser) -> None:
    """Puts a subcommand's help into a reader's order.

    By default hundreds of the trainer's options come first, and the LM's, the search's and the data's not at all.
    """
    command = parser.prog.split()[-1]
    parser.usage = f"cotune {command} --config FILE [--config FILE ...] [--OPTION VALUE ...]"
    parser.description = (
        f"{_SAID[command]} Options stand in YAML files, as --print_config writes one, or on the command line behind "
        "them. What another class takes than those below: --data.help Iris, --trainer.logger.help WandbLogger."
    )
    for action in parser._actions:
        action.help = _HELP.get(action.dest, action.help)
    groups = {group.title: group for group in parser._action_groups if group.title != "Linked arguments"}
    for group in _groups_of_classes(set(parser._option_string_actions)):
        shown = groups.setdefault(group.title, group)
        if shown is not group:
            shown._group_actions += group._group_actions
    for group in groups.values():
        group.title = _TITLES.get(_ORDER[_place(group)], group.title)
    parser._action_groups = sorted(groups.values(), key=_place)


def _groups_of_classes(known: set[str]) -> Iterator[Any]:
    for option, cls in _CLASSES.items():
        made = LightningArgumentParser(add_help=False)
        made.add_class_arguments(cls, option, skip={"seed"})  # all seeds are seed_everything
        for group in made._action_groups:
            # The option that chooses the class stands with the command's own.
            group._group_actions = [a for a in group._group_actions if not known & set(a.option_strings)]
            if group._group_actions:
                yield group


def _place(group: Any) -> int:
    firsts = {action.dest.split(".")[0] for action in group._group_actions}
    return next((place for place, first in enumerate(_ORDER) if first in firsts), 0)
