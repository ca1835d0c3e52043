"""Parse errors: what the argument parser says at length, as the one line that names the value and the fix.

jsonargparse tells what is wrong in its text alone, with no error classes and no fields. All that reads such texts is
here, and `tests/test_internals.py` has it say each of them. What none of the rules knows is shown as it is.
"""

from __future__ import annotations

import difflib
import inspect
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from cotune.shipped import shipped

LIGHTNINGS = ("fit", "validate", "test")
"""The commands whose parser is Lightning's."""

OWN_COMMANDS = (
    *("ask", "compare", "configs", "doctor", "export", "new", "predict", "preview", "report", "serve", "table"),
)
"""The commands that have a module and a parser of their own."""

SEEDS = "a whole number from 0 to 4294967295"
"""What the option seed_everything may be: what numpy takes for a seed."""

Options = Mapping[str, Any]
"""Option name, with dots and without dashes -> its type; None where it has none."""


def explain(message: str, options: Options) -> str:
    """A parser's message in one line, with the nearest right name for one that is unknown.

    >>> explain("unrecognized arguments: --alternate.shedule p", {"alternate.schedule": str})
    'unknown option --alternate.shedule. Did you mean --alternate.schedule?'
    """
    for rule in _RULES:
        if text := rule(message.strip(), options):
            return text
    return " ".join(message.split())


def no_group(key: str, value: object, options: Iterable[str]) -> str:
    """What to say where a single value stands for a group of options.

    Args:
        options: full names of the group's options.

    >>> no_group("model.learning_rate", 5e-4, ["model.learning_rate.warmup"])
    'model.learning_rate 0.0005: it is a group of options (warmup). The rate itself is --model.optimizer.lr.'
    """
    names = [n for n in dict.fromkeys(name.rpartition(".")[2] for name in options) if n != "help"]
    rate = " The rate itself is --model.optimizer.lr." if key.endswith("learning_rate") else ""
    first = f"; give them one by one, as --{key}.{names[0]} VALUE" if names and not rate else ""
    return f"{key} {value}: it is a group of options ({', '.join(names)}){first}.{rate}"


def no_file(path: Path) -> str:
    """What to say of a config file that is not there."""
    if path.is_absolute():
        return f'--config "{path}": there is no such file.'
    near = did_you_mean(str(path), [file.name for file in Path().glob("*.y*ml")], "")
    near = near or did_you_mean(str(path).removeprefix("configs/").removesuffix(".yaml"), list(shipped()), "")
    return f'--config "{path}": there is no such file in {Path.cwd()}, and none that cotune configs lists.{near}'


def unknown_command(word: str) -> str:
    """What to say of a command that there is none of."""
    known = (*LIGHTNINGS, *OWN_COMMANDS)
    return f'unknown command "{word}"; commands are {", ".join(known)}.' + did_you_mean(word, known, "")


def reasons(message: str) -> list[str]:
    """What was said of the types that were tried, less that a value is of another kind."""
    return [reason for reason in re.findall(r"(?m)^\s*- (.*)$", message) if not reason.startswith("Expected a")]


def _one_for_a_group(message: str, options: Options) -> str:
    found = re.search(r"Unable to load config [\"'](.*?)[\"']", message)
    key = _key(message)
    if not found or not key or key == "config":
        return ""
    key = f"{_OWNERS[key]}.{key}" if key in _OWNERS else key
    last = key.rpartition(".")[2]
    inner = [name for name in _option_names(options) if f".{last}." in f".{name}"]
    return no_group(key, found[1], inner)


def _unknown_argument(message: str, options: Options) -> str:
    found = re.match(r"unrecognized arguments: (\S+)", message)
    if not found:
        return ""
    word = found[1].split("=")[0]
    if not word.startswith("--"):
        return f'"{found[1]}" is no option; options begin with --, and a value with spaces needs quotes.'
    return f"unknown option {word}." + did_you_mean(word[2:], _option_names(options), "--")


def _unknown_key(message: str, options: Options) -> str:
    found = re.search(r"does not accept option '([^']+)'|Option '([^']+)' is not accepted", message)
    if not found:
        return ""
    name = found[1] or found[2]
    return f'unknown option "{name}".' + did_you_mean(name, _option_names(options), "")


def _no_class(message: str, options: Options) -> str:
    key = _key(message)
    if other := re.search(r"Import path (\S+) does not correspond to a subclass of (\w+)", message):
        known = _known(key, options)
        return f'{key}: "{other[1]}" is no {other[2]}; known are {known}, and one of your own is a subclass of it.'
    given = re.search(
        r"Expected a dot import path string: (\S+)|given class_path '([^']+)'|(is abstract|Not a valid subclass)",
        message,
    )
    if not key or not given:
        return ""
    if given[3]:
        return f"{key}: name the class in class_path, one of {_known(key, options)}, or a class of your own."
    value = given[1] or given[2]
    if any(kind in (int, float) for kind in get_args(options.get(key))):
        return f'{key} "{value}" is not allowed; allowed is a number.'
    if key.rpartition(".")[2] == "metric":
        return _no_metric(key, value)
    names = [cls.__name__ for cls in _subclasses_of(options.get(key))]
    last = value.rpartition(".")[2]
    detail = re.search(r"Problem with given class_path '[^']+':\s+(?!module '[^']*' has no attribute)(.*)", message)
    detail = detail or re.search(r"(No module named '[^']+')", message)
    because = f" ({detail[1].strip()})" if detail else ""
    return (
        f'{key}: there is no class "{value}"{because}; known are {_known(key, options)}, and a class of your own is '
        f"written module.Class.{did_you_mean(last, names, '')}"
    )


def _no_metric(key: str, value: str) -> str:
    from cotune.programs.metrics import COMPARE_FIELDS

    known = [f"cotune.programs.{getattr(metric, '__name__', '')}" for metric in COMPARE_FIELDS]
    return (
        f'{key}: there is no function "{value}"; there are {", ".join(known)}, and one of your own is written '
        f"module.function.{did_you_mean(value, known, '')}"
    )


def _wrong_value(message: str, options: Options) -> str:
    key = _key(message)
    if not key:
        return ""
    nested = re.search(r"Given value: NestedArg\(key='([^']+)', val='?(.*?)'?\)", message)
    if nested and (raised := reasons(message)):  # by the module, when it was imported
        return f'{key}.{nested[1]} "{nested[2]}": {raised[0]}.'
    if function := re.search(r"expects a function or a callable class: (.*)\. Got value: (.*)", message):
        return f'{key} "{function[2]}": {function[1]}. A function is written module.function; its file stands here.'
    if protocol := re.search(r"does not implement protocol (\w+)", message):
        given = message.rpartition("Given value: ")[2]
        return (
            f'{key}: "{given}" is no {protocol[1]}: its methods must have the names, arguments and type hints that '
            f"{protocol[1]} has."
        )
    kinds = re.findall(r"Expected an? (?!path but)(.+?)(?:\. Got value|$)", message, re.M)
    expected = [SEEDS] if key.endswith("seed_everything") else list(dict.fromkeys(map(_plain, kinds)))
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


_RULES = (_unknown_argument, _unknown_key, _one_for_a_group, _no_class, _wrong_value, _missing)

_OWNERS = {"sizes": "data", "bootstrapping": "data", "lora": "model.lm", "skip_limits": "model"}
"""Groups whose parser does not know what it is part of -> that part."""

_ELSEWHERE = {
    "template": "model.form",
    **dict.fromkeys(("lr", "learning_rate"), "model.optimizer.lr"),
    **dict.fromkeys(("num_epochs", "num_train_epochs", "max_epochs"), "alternate.epochs"),
    **dict.fromkeys(("batch", "bs", "train_batch_size", "per_device_train_batch_size"), "data.batch_size"),
    **dict.fromkeys(("max_tokens", "max_length", "max_new_token"), "model.sampling.max_new_tokens"),
    **dict.fromkeys(("model_name", "model_name_or_path", "model.name", "base_model"), "model.lm.model"),
    **dict.fromkeys(("output_dir", "out", "output"), "runs_dir"),
    **dict.fromkeys(("seed", "random_seed"), "seed_everything"),
    **dict.fromkeys(("threshold", "attempts"), "data.bootstrapping."),
}
"""What options are called elsewhere, or were once -> here; a name that ends in a dot has the word behind it."""


def _option_names(options: Options) -> list[str]:
    """All options, those of the classes that can be chosen included."""
    nested = [
        f"{name}.{inner}"
        for name, kind in options.items()
        for cls in _subclasses_of(kind)
        for inner in _parameters(cls)
    ]
    return list(dict.fromkeys([*options, *nested]))


def _subclasses_of(kind: Any) -> list[type]:
    """The concrete classes that a type allows and that are imported."""
    return list(dict.fromkeys(_concrete(kind)))


def _concrete(kind: Any) -> Iterator[type]:
    if get_origin(kind) in (Union, types.UnionType):
        for part in get_args(kind):
            yield from _concrete(part)
    elif get_origin(kind) is not None:  # list[int], which Python 3.10 takes for a type
        return
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
    names = sorted(cls.__name__ for cls in _subclasses_of(options.get(key)))
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


def did_you_mean(wrong: str, names: Sequence[str], dashes: str) -> str:
    """ " Did you mean …?", by the whole name or else by its last part; "" when nothing is near."""
    elsewhere = _ELSEWHERE.get(wrong) or _ELSEWHERE.get(wrong.rpartition(".")[2]) if dashes or "." in wrong else None
    if elsewhere and wrong not in names:
        return f" Did you mean {dashes}{elsewhere}{wrong.rpartition('.')[2] if elsewhere.endswith('.') else ''}?"
    last = {name.rpartition(".")[2]: name for name in reversed(names)}
    near = (
        difflib.get_close_matches(wrong, names, 1, 0.8)
        or [name for name in names if len(wrong) > 2 and name.startswith(wrong)]
        or [last[match] for match in difflib.get_close_matches(wrong.rpartition(".")[2], list(last), 1, 0.7)]
    )
    return f" Did you mean {dashes}{near[0]}?" if near else ""
