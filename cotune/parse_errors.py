"""Parse errors: what the argument parser says at length, as the one line that names the value and the fix."""

from __future__ import annotations

import difflib
import inspect
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin

OWN_COMMANDS = ("ask", "compare", "doctor", "export", "predict", "preview", "report", "table")
"""The commands that have a module and a parser of their own; fit, validate and test are Lightning's."""

Options = Mapping[str, Any]
"""Option name, with dots and without dashes -> its type; None where it has none."""


def explain(message: str, options: Options) -> str:
    """A parser's message in one line, with the nearest right name for one that is unknown.

    >>> explain("unrecognized arguments: --alternate.shedule p", {"alternate.schedule": str})
    'unknown option --alternate.shedule. Did you mean --alternate.schedule?'
    """
    for rule in (_no_config, _unknown_argument, _unknown_key, _no_class, _wrong_value, _missing, _unknown_command):
        if said := rule(message.strip(), options):
            return said
    return " ".join(message.split())


def _no_config(message: str, options: Options) -> str:
    found = re.search(r'Parser key "config":\s+File does not exist: \'?(.+?)\'?$', message)
    if not found:
        return ""
    # The parser says the whole path; the user wrote it from the folder they are in.
    path = Path(found[1])
    if path.is_relative_to(Path.cwd()):
        return f'--config "{path.relative_to(Path.cwd())}": there is no such file in {Path.cwd()}.'
    return f'--config "{path}": there is no such file.'


def _unknown_argument(message: str, options: Options) -> str:
    found = re.match(r"unrecognized arguments: (\S+)", message)
    if not found:
        return ""
    word = found[1].split("=")[0]
    if not word.startswith("--"):
        return f'"{found[1]}" is no option; options begin with --, and a value with spaces stands in quotes.'
    return f"unknown option {word}." + _hint(word[2:], option_names(options), "--")


def _unknown_key(message: str, options: Options) -> str:
    found = re.search(r"does not accept option '([^']+)'|Option '([^']+)' is not accepted", message)
    if not found:
        return ""
    name = found[1] or found[2]
    return f'unknown option "{name}".' + _hint(name, option_names(options), "")


def _no_class(message: str, options: Options) -> str:
    key = _key(message)
    given = re.search(
        r"Expected a dot import path string: (\S+)|given class_path '([^']+)'|(is abstract|Not a valid subclass)",
        message,
    )
    if not key or not given:
        return ""
    if given[3]:
        return f"{key}: name the class in class_path, one of {_known(key, options)}, or a class of your own."
    value = given[1] or given[2]
    names = [cls.__name__ for cls in subclasses_of(options.get(key))]
    last = value.rpartition(".")[2]
    detail = re.search(r"(No module named '[^']+')", message)
    because = f" ({detail[1]})" if detail else ""
    return (
        f'{key}: there is no class "{value}"{because}; known are {_known(key, options)}, and a class of your own is '
        f"written module.Class.{_hint(last, names, '')}"
    )


def _wrong_value(message: str, options: Options) -> str:
    key = _key(message)
    if not key:
        return ""
    if function := re.search(r"expects a function or a callable class: (.*)\. Got value: (.*)", message):
        return f'{key} "{function[2]}": {function[1]}. A function is written module.function; its file stands here.'
    if protocol := re.search(r"does not implement protocol (\w+)", message):
        given = message.rpartition("Given value: ")[2]
        return (
            f'{key}: "{given}" is no {protocol[1]}: its methods must have the names, arguments and type hints that '
            f"{protocol[1]} has."
        )
    kinds = re.findall(r"Expected an? (?!path but)(.+?)(?:\. Got value|$)", message, re.M)
    expected = list(dict.fromkeys(map(_plain, kinds)))
    value = re.search(r"(?:Given value|Got value): (.*)", message)
    if not expected or not value:
        return f"{key}: " + " ".join(message.split("\n", 1)[-1].split())
    return f"{key}: {value[1]!r} is not allowed; allowed is {' or '.join(expected)}."


def _missing(message: str, options: Options) -> str:
    found = re.match(r"the following arguments are required: (.*)", message)
    if not found:
        return ""
    names = re.sub(r"\b(fit|validate|test)\.", "", found[1])
    return f"missing: {names}. Give them in a file, --config FILE, or as options."


def _unknown_command(message: str, options: Options) -> str:
    found = re.search(r"argument subcommand: invalid choice: '([^']+)' \(choose from (.*)\)", message)
    if not found:
        return ""
    known = [*re.findall(r"'(\w+)'", found[2]), *OWN_COMMANDS]
    return f'unknown command "{found[1]}"; commands are {", ".join(known)}.' + _hint(found[1], known, "")


def option_names(options: Options) -> list[str]:
    """All options, those of the classes that can be chosen included."""
    nested = [
        f"{name}.{inner}" for name, kind in options.items() for cls in subclasses_of(kind) for inner in _parameters(cls)
    ]
    return list(dict.fromkeys([*options, *nested]))


def subclasses_of(kind: Any) -> list[type]:
    """The concrete classes that a type allows and that are imported."""
    return list(dict.fromkeys(_concrete(kind)))


def _concrete(kind: Any) -> Iterator[type]:
    if get_origin(kind) in (Union, types.UnionType):
        for part in get_args(kind):
            yield from _concrete(part)
    elif isinstance(kind, type) and kind.__module__.split(".")[0] not in ("builtins", "typing", "types"):
        if not inspect.isabstract(kind) and not kind.__name__.startswith("_"):
            yield kind
        children: list[type] = type.__subclasses__(kind)
        for child in children:
            yield from _concrete(child)


def _parameters(cls: type) -> Iterator[str]:
    """Names of a class's arguments, base classes' included; those of a settings argument with its fields."""
    for base in cls.__mro__:
        if base.__module__.split(".")[0] != cls.__module__.split(".")[0] or "__init__" not in vars(base):
            continue
        for name, parameter in inspect.signature(base.__init__).parameters.items():  # type: ignore[misc]
            if name == "self" or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            yield name
            if is_dataclass(parameter.default):
                yield from (f"{name}.{field.name}" for field in fields(parameter.default))


def _known(key: str, options: Options) -> str:
    names = sorted(cls.__name__ for cls in subclasses_of(options.get(key)))
    return ", ".join(names) or "those of cotune"


def _key(message: str) -> str:
    found = re.search(r'Parser key "([^"]+)"', message)
    return found[1] if found else ""


def _plain(kind: str) -> str:
    """How an error names a type: `<class 'int'>` is "a whole number"."""
    words = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "NoneType": "null"}
    if found := re.match(r"<class '([\w.]+)'>", kind):
        return words.get(found[1], found[1].rpartition(".")[2])
    if found := re.match(r"typing\.Literal\[(.*)\]", kind):
        return found[1].replace("'", "").replace(", ", " or ")
    return kind.replace("typing.", "")


def _hint(wrong: str, names: Sequence[str], dashes: str) -> str:
    """ " Did you mean …?", by the whole name or else by its last part; "" when nothing is near."""
    last = {name.rpartition(".")[2]: name for name in reversed(names)}
    near = difflib.get_close_matches(wrong, names, 1, 0.8) or [
        last[match] for match in difflib.get_close_matches(wrong.rpartition(".")[2], list(last), 1, 0.7)
    ]
    return f" Did you mean {dashes}{near[0]}?" if near else ""
