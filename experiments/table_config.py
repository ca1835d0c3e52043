"""Table configs: which tasks, LMs, presets, strategies and seeds a table has, read from YAML and checked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from cotune.errors import CotuneError
from cotune.experiments.paper import TASKS as PAPER_TASKS
from cotune.experiments.strategies import PAPERS, Steps, parse_strategy

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")
_KEYS = {"name", "tasks", "lms", "presets", "strategies", "seeds", "equal_calls", "options"}
_OVERLAY = {"configs", "options"}
_LM_CALLS = "alternate.lm_calls"
_OWN = {
    **dict.fromkeys(
        ("seed_everything", "model.seed", "data.seed", "data.init_args.seed", "alternate.seed"),
        'give --seed, or "seeds" in the table\'s config',
    ),
    "alternate.schedule": 'give --strategy, or "strategies" in the table\'s config',
    "alternate.test_prefixes": "leave it out: a table needs each prefix's score on test",
    _LM_CALLS: "the control has as many as p -> w -> p; a table with equal_calls: false takes the option",
    **dict.fromkeys(("name", "runs_dir"), "give --folder, in which each run has a name of its own"),
    "trainer.enable_progress_bar": "leave it out: each run writes to a log of its own",
}
"""Options of `cotune fit` that a table gives each run itself, and what to do instead of setting them."""


class TableError(CotuneError, ValueError):
    """A table's config is not what it should be, or its folder holds another table's runs."""


@dataclass(frozen=True)
class Overlay:
    """Configs of `cotune fit` that are laid over one another, and single options on top of them."""

    configs: tuple[Path, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task(Overlay):
    """A task: its own overlay, what it lays over a preset, and its name in the paper's table ("" for none there)."""

    presets: Mapping[str, Overlay] = field(default_factory=dict)
    paper: str = ""


@dataclass(frozen=True)
class TableConfig:
    """What a table compares: each strategy, for each task, LM, preset and seed.

    Attributes:
        equal_calls: also run "p -> p" with as many candidates as it takes to spend the LM calls of "p -> w -> p".
        options: of `cotune fit`, for all runs.
        assigned: (task, option, value) in the order given, over all else; the task is "" for all of them.
    """

    name: str
    tasks: Mapping[str, Task]
    lms: Mapping[str, Overlay]
    presets: Mapping[str, Overlay]
    strategies: tuple[Steps, ...]
    seeds: tuple[int, ...]
    equal_calls: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    assigned: tuple[tuple[str, str, str], ...] = ()

    def words(self, task: str, lm: str, preset: str) -> list[str]:
        """Configs and options of a cell, as words of a command line; later ones override earlier ones."""
        own = self.tasks[task]
        parts = [own, self.lms[lm], self.presets[preset], own.presets.get(preset, Overlay())]
        options = {**self.options}
        for part in parts:
            options |= part.options
        assigned = [(option, value) for of in ("", task) for where, option, value in self.assigned if where == of]
        # A class must also be named before the options that only it has.
        classes = [(option, value) for option, value in assigned if any(n.startswith(f"{option}.") for n in options)]
        words = [word for part in parts for config in part.configs for word in ("--config", str(config))]
        named = [*classes, *options.items(), *assigned]
        return words + [word for name, value in named for word in (f"--{name}", _as_word(value))]

    def only(
        self,
        *,
        tasks: Sequence[str] = (),
        lms: Sequence[str] = (),
        presets: Sequence[str] = (),
        strategies: Sequence[str] = (),
        seeds: Sequence[int] = (),
    ) -> TableConfig:
        """The part of the table that is named; an empty list takes all.

        Raises:
            TableError: a name is not in the table.
        """
        return replace(
            self,
            tasks=_picked(self.tasks, tasks, "task"),
            lms=_picked(self.lms, lms, "LM"),
            presets=_picked(self.presets, presets, "preset"),
            strategies=_strategies(strategies) if strategies else self.strategies,
            seeds=_seeds(list(seeds)) if seeds else self.seeds,
        )

    def with_options(self, assignments: Sequence[str]) -> TableConfig:
        """The table with options set over all that its config says: "option=value" for all tasks, and over these
        "task:option=value" for one.

        Raises:
            TableError: an assignment is not of that form, names a task that the table does not have, or an option that
                the table sets itself.
        """
        made = []
        for text in assignments:
            left, sign, value = text.partition("=")
            task, colon, option = left.rpartition(":")
            option = option.strip().removeprefix("--")
            if not sign or not option:
                raise TableError(f'"{text}" sets no option; write option=value, or task:option=value.')
            if colon:
                _picked(self.tasks, [task], "task")
            _refuse_own({option: value}, f'--set "{text}"', equal_calls=self.equal_calls)
            made.append((task, option, value))
        return replace(self, assigned=(*self.assigned, *made))


def read_table(path: Path) -> TableConfig:
    """Reads a table's YAML. Paths in it are relative to its folder.

    Raises:
        TableError: the file is not there, not YAML, or says something that is not allowed; the message names it.
    """
    try:
        made = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TableError(f'table config "{path}" cannot be read: {error.strerror}.') from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TableError(f'table config "{path}" is not YAML: {" ".join(str(error).split())}.') from error
    if not isinstance(made, Mapping):
        raise TableError(f'table config "{path}" holds no mapping; see configs/table/iris.yaml.')
    try:
        return _table(made, path)
    except (TableError, ValueError) as error:
        raise TableError(f"{path}: {error}") from error


def _table(made: Mapping[str, Any], path: Path) -> TableConfig:
    _only_keys(made, _KEYS, "a table")
    folder = path.resolve().parent
    tasks = {name: _task(own, folder, name) for name, own in _named(made, "tasks").items()}
    presets = {name: _overlay(own, folder, name) for name, own in _named(made, "presets").items()}
    for name, task in tasks.items():
        if unknown := sorted(set(task.presets) - set(presets)):
            raise TableError(
                f'task "{name}" changes an unknown preset, "{unknown[0]}"; there are {", ".join(presets)}.'
            )
    equal = made.get("equal_calls", True)
    if not isinstance(equal, bool):
        raise TableError(f"equal_calls is {equal!r}; it is true or false.")
    lms = {name: _overlay(own, folder, name) for name, own in _named(made, "lms").items()}
    options = _options(made, "the table")
    for where, own in {
        "the table": options,
        **{f'preset "{name}"': preset.options for name, preset in presets.items()},
        **{f'LM "{name}"': lm.options for name, lm in lms.items()},
        **{f'task "{name}"': task.options for name, task in tasks.items()},
        **{f'task "{n}", {preset}': own.options for n, task in tasks.items() for preset, own in task.presets.items()},
    }.items():
        _refuse_own(own, where, equal_calls=equal)
    title = made.get("name", path.stem)
    if not isinstance(title, str) or not title.strip(". ") or Path(title).name != title:
        raise TableError(f'name is {title!r}, and names the folder of the runs in "tables"; give one word, e.g. iris.')
    return TableConfig(
        name=title,
        tasks=tasks,
        lms=lms,
        presets=presets,
        strategies=_strategies(made.get("strategies", "all")),
        seeds=_seeds(made.get("seeds", [0, 1, 2])),
        equal_calls=equal,
        options=options,
    )


def _named(made: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = made.get(key)
    if not isinstance(found, Mapping) or not found:
        raise TableError(f"{key} is {found!r}; it maps at least one name to its configs.")
    for name in found:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise TableError(f'{key}: the name {name!r} also names folders, so use only letters, digits, "." and "-".')
    return found


def _overlay(made: Any, folder: Path, where: str) -> Overlay:
    """A list of configs, or a mapping with configs and options."""
    if made is None or isinstance(made, (list, str)):
        made = {"configs": made or []}
    _only_keys(made, _OVERLAY, where)
    paths = made.get("configs") or []
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list):
        raise TableError(f"{where}: configs is {paths!r}; give a file, or a list of files.")
    found = tuple((folder / str(path)).resolve() for path in paths)
    for path in found:
        if not path.is_file():
            raise TableError(f'{where}: there is no config "{path}"; paths are relative to the table\'s own folder.')
    return Overlay(found, _options(made, where))


def _task(made: Any, folder: Path, name: str) -> Task:
    if not isinstance(made, Mapping):
        made = {"configs": made}
    _only_keys(made, _OVERLAY | {"presets", "paper"}, f'task "{name}"')
    plain = _overlay({key: made[key] for key in _OVERLAY & set(made)}, folder, f'task "{name}"')
    presets = made.get("presets") or {}
    if not isinstance(presets, Mapping):
        raise TableError(
            f'task "{name}": presets is {presets!r}; it maps a preset\'s name to what this task lays over it, e.g. '
            "default: {options: {alternate.epochs: 2}}. A task that changes no preset has none: all presets are its."
        )
    over = {preset: _overlay(own, folder, f'task "{name}", {preset}') for preset, own in presets.items()}
    paper = str(made.get("paper") or "")
    if paper and paper not in PAPER_TASKS:
        raise TableError(f'task "{name}" is the paper\'s "{paper}"; the paper has {", ".join(PAPER_TASKS)}.')
    return Task(plain.configs, plain.options, over, paper)


def _options(made: Mapping[str, Any], where: str) -> dict[str, Any]:
    found = made.get("options") or {}
    if not isinstance(found, Mapping):
        raise TableError(f"{where}: options is {found!r}; it must map option names, with dots, to values.")
    return {str(name).removeprefix("--"): value for name, value in found.items()}


def _refuse_own(options: Mapping[str, Any], where: str, *, equal_calls: bool) -> None:
    for name in (name for option, value in options.items() for name in _names(option, value)):
        if name in _OWN and (equal_calls or name != _LM_CALLS):
            raise TableError(f"{where} sets {name}, which a table sets for each of its runs; {_OWN[name]}.")


def _names(option: str, value: Any) -> Iterator[str]:
    """The option, and those in a mapping that it is set to."""
    yield option
    if isinstance(value, str) and value.lstrip().startswith("{"):
        with suppress(yaml.YAMLError):  # which is said where the option is parsed
            value = yaml.safe_load(value)
    if isinstance(value, Mapping):
        yield from (name for key, part in value.items() for name in _names(f"{option}.{key}", part))


def _strategies(made: Any) -> tuple[Steps, ...]:
    names = list(PAPERS) if made == "all" else [made] if isinstance(made, str) else made
    if not isinstance(names, (list, tuple)) or not names:
        raise TableError(f'strategies is {made!r}; give a list such as [vanilla, "p -> w"], or all.')
    return tuple(dict.fromkeys(parse_strategy(str(name)) for name in names))


def _seeds(made: Any) -> tuple[int, ...]:
    whole = isinstance(made, list) and all(isinstance(s, int) and not isinstance(s, bool) for s in made)
    if not whole or not made or not all(0 <= s < 2**32 for s in made):
        raise TableError(f"seeds is {made!r}; give a list of whole numbers from 0 to 4294967295.")
    return tuple(dict.fromkeys(made))


def _only_keys(made: Any, allowed: set[str], where: str) -> None:
    if not isinstance(made, Mapping):
        raise TableError(f"{where} is {made!r}; it is a mapping with {', '.join(sorted(allowed))}.")
    if unknown := sorted(str(key) for key in made if key not in allowed):
        raise TableError(f'{where} has no "{unknown[0]}"; it has {", ".join(sorted(allowed))}.')


def _picked(there: Mapping[str, Any], names: Sequence[str], what: str) -> Mapping[str, Any]:
    for name in names:
        if name not in there:
            raise TableError(f'the table has no {what} "{name}"; it has {", ".join(there)}.')
    return {name: there[name] for name in names} if names else there


def _as_word(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)
