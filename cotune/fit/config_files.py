"""Config files: what is wrong with the YAML itself, by file, line and value, before a parser makes a guess of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from cotune.errors import CotuneError
from cotune.fit.parse_errors import no_file


class ConfigFileError(CotuneError, ValueError):
    """A config file cannot be read, or does not mean what it seems to."""


def check_config_files(words: Sequence[str]) -> None:
    """Looks at every YAML file that a command line names.

    Raises:
        ConfigFileError: the first that is wrong, or is not there; or an option stands before a file that sets it too.
    """
    for path in _named(words):
        check_config_file(path)
    _check_order(words)


def check_config_file(path: Path) -> None:
    """Looks at one file.

    Raises:
        ConfigFileError: it is not UTF-8, not YAML, no mapping, has a key twice, or an unquoted text that YAML cuts up.
    """
    text = _text(path)
    try:
        # Composed, not loaded: keys that stand twice are still there, with their places.
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise ConfigFileError(_not_yaml(path, text, error)) from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ConfigFileError(f'config "{path}": {" ".join(str(error).split())}') from error
    if root is None:
        raise ConfigFileError(f'config "{path}" is empty; it should hold options, e.g. "name: my-run".')
    if not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else f"the text {root.value[:40]!r}"
        raise ConfigFileError(f'config "{path}" holds {kind}; it should hold options, e.g. "name: my-run".')
    _check_mappings(path, root)


def _check_order(words: Sequence[str]) -> None:
    """The later one wins, so an option before a file that sets it would not count."""
    before: dict[str, str] = {}
    for at, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in ("--config", "-c"):
            path = Path(value if equals else words[at + 1] if at + 1 < len(words) else "").expanduser()
            known = set(_keys(yaml.safe_load(_text(path)), "")) if before and path.is_file() else set()
            for option in sorted(known & before.keys()):
                raise ConfigFileError(
                    f'{before[option]} stands before --config {path}, which sets "{option}" too, and the later one '
                    "wins. Put the option behind the file."
                )
        elif name.startswith("--"):
            before[name[2:].replace(".init_args.", ".")] = name


def _keys(node: object, name: str) -> Iterator[str]:
    """The dotted names of what a file sets, as they are on the command line."""
    if not isinstance(node, Mapping):
        yield name
        return
    for key, value in node.items():
        if key == "class_path":
            yield name
        yield from _keys(value, name if key == "init_args" else f"{name}.{key}".lstrip("."))


def _named(words: Sequence[str]) -> Iterator[Path]:
    for at, word in enumerate(words):
        name, _, value = word.partition("=")
        is_config = name in ("--config", "-c")
        given = value or (words[at + 1] if at + 1 < len(words) else "")
        if name.startswith("-") and given and (is_config or given.endswith((".yaml", ".yml"))):
            path = Path(given).expanduser()
            if path.is_file():
                yield path
            elif path.is_dir():
                raise ConfigFileError(f'config "{path}" is a folder; name a file of it.')
            elif is_config and ":" not in given:  # else it is options, and no name
                raise ConfigFileError(no_file(path))


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigFileError(
            f'config "{path}" is not UTF-8: byte {error.start}, on line {line}, is {data[error.start]:#04x}. Save it '
            "again with that encoding."
        ) from error
    except OSError as error:
        raise ConfigFileError(f'config "{path}" cannot be read: {error.strerror}.') from error


def _not_yaml(path: Path, text: str, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f", line {mark.line + 1}" if mark else ""
    lines = text.splitlines()
    line = lines[mark.line].strip() if mark and mark.line < len(lines) else ""
    if "\t" in (lines[mark.line] if line and mark else "") and "token" in str(error.problem):
        why = "YAML takes no tabs; indent with spaces"
    elif "mapping values are not allowed" in str(error.problem):
        why = "a text with a colon and a space in it needs quotes"
    elif re.search(r":\s*[@`%*&!]", line):
        why = "a text that begins with one of @ ` % * & ! needs quotes"
    elif "did not find expected" in str(error.problem) or "expected" in str(error.problem):
        why = "a bracket, brace, quote or indentation does not fit"
    else:
        why = str(error.problem)
    return f'config "{path}"{place} is not YAML: {line[:120]!r}: {why} ({error.problem}).'


def _check_mappings(path: Path, node: yaml.Node) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_mappings(path, item)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    before: tuple[str, str] = ("", "")
    for key, value in node.value:
        name, line = str(key.value) if isinstance(key, yaml.ScalarNode) else "", key.start_mark.line + 1
        # In braces a comma ends a value, and what follows it is read as a key without one.
        if node.flow_style and isinstance(value, yaml.ScalarNode) and value.tag.endswith(":null") and not value.value:
            whole = f'{before[0]}: "{before[1]}, {name}"' if before[0] else f'"{name}"'
            raise ConfigFileError(
                f'config "{path}", line {line}: {name!r} reads as a key of its own, because a comma in braces ends a '
                f"value. Put the text in quotes: {whole}."
            )
        if name in seen and key.tag != "tag:yaml.org,2002:merge":
            raise ConfigFileError(
                f'config "{path}": {name!r} is on line {seen[name]} and again on line {line}, and only the last '
                "would count; remove one."
            )
        seen[name] = line
        before = name, value.value if isinstance(value, yaml.ScalarNode) else ""
        _check_mappings(path, value)
