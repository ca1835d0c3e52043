"""Options that parse and still cannot be: what a constructor says of them, as one line."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from inspect import signature
from pathlib import Path
from pydoc import locate
from typing import Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException

from cotune.errors import CotuneError
from cotune.fit.parse_errors import no_group, reasons
from cotune.lightning_modules import ProgramModule


class OptionError(CotuneError, ValueError):
    """An option has a value that its owner refuses."""


@contextmanager
def refused_options() -> Iterator[None]:
    """What the trainer, the seed, jsonargparse or a class of the user's raise about options, as an OptionError.

    Their classes and arguments come from the command line, so what they raise while they are made is about that. Where
    the class is the user's own, COTUNE_DEBUG=1 shows the line.
    """
    try:
        yield
    except (MisconfigurationException, ValueError, TypeError) as error:
        if isinstance(error, CotuneError):
            raise
        raise OptionError(_message_of(error)) from error


def check_option_groups(config: Any) -> None:
    """Refuses single values where the module, its LM or the data take groups of options."""
    check_groups(ProgramModule, config.model, "model")
    for name, part in (("model.lm", config.model.get("lm")), ("data", config.get("data"))):
        if part is not None and part.get("init_args") is not None:
            check_groups(cast(type, locate(part.class_path)), part.init_args, name)


def check_groups(cls: type, given: Mapping[str, Any], prefix: str) -> None:
    """Refuses a single value where a class takes a group of options; the parser lets one in a file pass.

    Args:
        given: the options of `cls`, as parsed.

    Raises:
        OptionError: names the option, its value and the group's options.
    """
    parameters = [p for base in reversed(cls.__mro__) for p in signature(base.__init__).parameters.values()]  # type: ignore[misc]
    groups: dict[str, Any] = {p.name: type(p.default) for p in parameters if is_dataclass(p.default)}
    for name, kind in groups.items():
        value = given.get(name)
        if isinstance(value, (bool, int, float, str, list)):
            names = [f"{prefix}.{name}.{field.name}" for field in fields(kind)]
            raise OptionError(no_group(f"{prefix}.{name}", value, names))


@contextmanager
def own_modules() -> Iterator[None]:
    """What a module of the user's raises while it is imported, a syntax error or any other, as an OptionError with its
    file and line."""
    try:
        yield
    except Exception as error:
        if place := _in_own_module(error):
            raise OptionError(f"{place}: {_first_line(error)}. COTUNE_DEBUG=1 shows where.") from error
        raise


def _in_own_module(error: BaseException | None) -> str:
    """File and line in the user's module that an import failed at; "" where it did not fail in one."""
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        started = str(getattr(sys.modules.get("__main__"), "__file__", ""))
        if isinstance(error, SyntaxError) and error.filename and _is_users(error.filename):
            return f"{_near(error.filename)}, line {error.lineno}"
        own = [frame for frame in frames if _is_users(frame.filename) and frame.filename != started]
        if any(frame.name == "<module>" for frame in own) and not isinstance(error, SyntaxError):
            return f"{_near(own[-1].filename)}, line {own[-1].lineno}"
        error = error.__cause__ or error.__context__
    return ""


def _is_users(file: str) -> bool:
    """Whether a file is neither cotune's, nor a library's or Python's own."""
    path = Path(file)
    ours = Path(__file__).resolve().parents[2]
    libraries = (Path(sys.base_prefix), Path(sys.prefix), ours / "src", *(ours / room for room in _ROOMS))
    return path.is_file() and "site-packages" not in path.parts and not any(path.is_relative_to(p) for p in libraries)


_ROOMS = (
    *("cotune", "programs", "prompting", "datamodules", "inference", "lightning_modules", "callbacks"),
    *("storage", "reporting", "experiments"),
)


def _near(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file


def _first_line(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{'' if isinstance(error, SyntaxError) else type(error).__name__ + ': '}{' '.join(text.split())}"


def _message_of(error: Exception) -> str:
    """The heart of such an error.

    >>> _message_of(ValueError("Does not validate against any of the Union subtypes\\nErrors:\\n  - epochs 0 is low"))
    'epochs 0 is low'
    """
    text = str(error)
    if missing := _missing_package(error):
        return missing
    text = next(iter(reasons(text)), text)
    if isinstance(error, TypeError):
        text = f"TypeError: {text} (COTUNE_DEBUG=1 shows where)"
    return " ".join(text.split())


def _missing_package(error: BaseException | None) -> str:
    """The first line of what a class said of a package that it needs; "" if it is not about that."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError):
            return str(error).splitlines()[0]
        error = error.__cause__
    return ""
