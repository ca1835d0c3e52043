"""The --help of fit, validate and test: a screen with what people ask first; all the rest by group.

Of argparse and jsonargparse this file alone uses what they do not promise. tests/test_internals.py says from
which version it was read, and fails if it goes.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pydoc import locate
from textwrap import fill
from typing import TYPE_CHECKING, Any, cast

from cotune.errors import CotuneError

if TYPE_CHECKING:  # the first screen comes without the heavy libraries
    from lightning.pytorch.cli import LightningArgumentParser

_SAID = {
    "fit": "Tunes a program by a schedule of prompt and weight steps, and scores the result on test. After a stop or a "
    "kill, the same command resumes.",
    "validate": "Scores a program on val: untuned, or a run's program with --ckpt_path last.",
    "test": "Scores a program on test: untuned, or a run's program with --ckpt_path last.",
}
_CLASSES = {
    "alternate.search": "cotune.prompting.CalibratedSearch",
    "alternate.search.then": "cotune.prompting.RandomDemoSearch",
    "model.lm": "cotune.lightning_modules.LanguageModel",
    "data": "cotune.datamodules.TraceDataModule",
}
"""Option that chooses a class -> the class whose options are shown: the default, or the base of all."""

_ORDER = ("", "alternate", "model", "data", "budget", "record", "log", "ckpt_path", "trainer")
"""First parts of the options' names, in the order of their groups."""

_TITLES = {"ckpt_path": "Another checkpoint", "trainer": "Lightning's trainer"}
_HELP = {
    "seed_everything": "seed of all random draws: the four sets, the adapter, demos, samples (type: int, default: 0)",
    "ckpt_path": 'a checkpoint to start from, "last" for the newest of the run; a stopped fit resumes without it',
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


GROUPS = {
    "alternate": "alternate",
    "search": "alternate.search",
    "model": "model",
    "lm": "model.lm",
    "data": "data",
    "record": "record",
    "log": "log",
    "trainer": "trainer",
}
"""Name of a group, in --help=NAME -> what its options begin with."""

_FIRST = """\
usage: cotune {command} --config FILE [--config FILE ...] [--OPTION VALUE ...]

{said}

  -c, --config FILE             YAML with any of these options, or a shipped config's name (cotune configs)
  --name NAME                   of the run; its files are in <runs_dir>/<name> (default: run)
  --fresh                       start over; an earlier run of that name is archived
  --seed_everything N           seed of all random draws: sets, adapter, demos, samples (default: 0)
  --print_config                print the whole configuration as YAML to start from, and stop

  --model.program CLASS         the program, module.Class
  --model.lm.model MODEL        embedded, a Hub id, a folder or a .gguf file (default: embedded)
  --model.lm.dtype TYPE         float32, bfloat16 or float16 (default: float32)
  --model.lm.quantization KIND  nf4, fp4 or int8 (default: null)
  --model.sampling.max_new_tokens N  longest completion (default: 256)
  --model.optimizer.lr RATE     (default: by the LM's size, 5e-4 at 135M to 5e-5 from 0.5B on)

  --data CLASS                  Table for rows of your own; Iris, Banking77, GSM8K, HotPotQA
  --data.path FILE              of Table: jsonl, json, csv, tsv, parquet, or a Hub data set
  --data.metric FUNCTION        module.function, (example, prediction) -> 0 to 1 (default: exact_match)
  --data.sizes.train N          and dev, val, test: rows of each set
  --data.batch_size N           pairs in an optimiser step (default: 8)

  --alternate.schedule STEPS    p searches prompts, w trains weights (default: "p -> w -> p")
  --alternate.epochs N          of each weight step (default: 5)
  --alternate.search CLASS      CalibratedSearch (default), RandomDemoSearch, ReflectiveSearch, JointSearch,
                                FormSearch

  --trainer.accelerator NAME    cpu, gpu, mps or auto (default: auto)
  --trainer.logger CLASS        besides metrics.csv, e.g. WandbLogger
  --trainer.fast_dev_run true   run the whole schedule on one batch of each set, and keep nothing

More: --help=all, or --help=GROUP with one of {groups}.
A class's own options: --data.help Iris, --trainer.logger.help WandbLogger.
"""


class HelpError(CotuneError):
    """There is no group of options of that name."""


def wanted(words: Sequence[str]) -> str | None:
    """The group whose help a command line asks for, "all" for everything, None for no help.

    >>> wanted(["fit", "--help=lm"]), wanted(["fit", "--model.help"]), wanted(["fit"])
    ('lm', 'model', None)

    Raises:
        HelpError: there is no such group.
    """
    for word in words:
        found = re.fullmatch(r"--help=(.*)|--(?!data)(\w+)\.help", word)  # --data.help is that of its class
        if found is None:
            continue
        group = found[1] or found[2]
        if group not in ("all", *GROUPS):
            raise HelpError(f'there is no group "{group}" of options; write all or one of {", ".join(GROUPS)}.')
        return group
    return None


def first_screen(command: str) -> str:
    """What `cotune fit --help` says."""
    return _FIRST.format(command=command, said=fill(_SAID[command], 112), groups=", ".join(GROUPS))


def arrange(parser: LightningArgumentParser, group: str) -> None:
    """Puts a subcommand's help into a reader's order, and leaves one group of it, or "all".

    By default hundreds of the trainer's options come first, and the LM's, the search's and the data's not at all.
    """
    start = f"{GROUPS[group]}." if group in GROUPS else ""
    command = parser.prog.split()[-1]
    parser.usage = f"cotune {command} --config FILE [--config FILE ...] [--OPTION VALUE ...]"
    parser.description = (
        f"{_SAID[command]} Options go into YAML files, as --print_config writes them, or on the command line after "
        "these. Other classes than those below show theirs with --data.help Iris, --trainer.logger.help WandbLogger."
    )
    for action in parser._actions:
        action.help = _HELP.get(action.dest, action.help)
    groups = {group.title: group for group in parser._action_groups if group.title != "Linked arguments"}
    for more in _groups_of_classes(set(parser._option_string_actions)):
        shown = groups.setdefault(more.title, more)
        if shown is not more:
            shown._group_actions += more._group_actions
    for shown in groups.values():
        shown.title = _TITLES.get(_ORDER[_place(shown)], shown.title)
        shown._group_actions = [a for a in shown._group_actions if f"{a.dest}.".startswith(start)]
    parser._action_groups = sorted((g for g in groups.values() if g._group_actions), key=_place)


def _groups_of_classes(known: set[str]) -> Iterator[Any]:
    from lightning.pytorch.cli import LightningArgumentParser

    for option, path in _CLASSES.items():
        made = LightningArgumentParser(add_help=False)
        made.add_class_arguments(cast(type, locate(path)), option, skip={"seed"})  # all seeds are seed_everything
        for group in made._action_groups:
            # The option that chooses the class stands with the command's own.
            group._group_actions = [a for a in group._group_actions if not known & set(a.option_strings)]
            if group._group_actions:
                yield group


def _place(group: Any) -> int:
    firsts = {action.dest.split(".")[0] for action in group._group_actions}
    return next((place for place, first in enumerate(_ORDER) if first in firsts), 0)
