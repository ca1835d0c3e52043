"""Secrets: keys and passwords are taken out of whatever a run writes, by the names of options and by their values."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
_SECRET = re.compile(r"(api_?key|access_?key|secret|secret_?key|token|password|passwd|credentials?)$", re.IGNORECASE)
_NO_SECRET = re.compile(r"(^|_)(bos|eos|pad|unk|sep|cls|mask|stop|end|start)_token$", re.IGNORECASE)
_OWNERS = {"program", "data"}
_FIELDS = {"inputs", "labels", "outputs", "fields", "columns", "descriptions", "types"}
"""Options of a program and of data whose keys are the user's names of fields, which may be any word."""
_SHORTEST = 8
"""A shorter value of the environment is no key, and might be any word."""


def is_secret(name: str) -> bool:
    """Whether an option's name says that its value is nobody's business. A field of the program is no option.

    >>> [is_secret(name) for name in ("model.lm.init_args.api_key", "HF_TOKEN", "max_new_tokens", "pad_token")]
    [True, True, False, False]
    >>> [is_secret(f"data.init_args.{name}") for name in ("token", "inputs.token", "labels.contains_secret")]
    [True, False, False]
    """
    *above, last = name.lstrip("-").split(".")
    names_a_field = bool(above) and above[-1] in _FIELDS and not _OWNERS.isdisjoint(above)
    return bool(_SECRET.search(last)) and not _NO_SECRET.search(last) and not names_a_field


def redacted(options: Any) -> Any:
    """Plain data with the values of secret options, and those of the environment's secrets, replaced.

    >>> redacted({"lm": {"api_key": "sk-1", "model": "m"}})
    {'lm': {'api_key': '***', 'model': 'm'}}
    """
    return _replaced(options, _secret_values(options))


def redacted_text(text: str, options: Any = None) -> str:
    """A text with the environment's secrets, those of the options, and `--...key VALUE` on a command line replaced.

    >>> redacted_text("cotune fit --model.lm.api_key sk-1 --name a --token=t")
    'cotune fit --model.lm.api_key *** --name a --token=***'
    """
    for value in _secret_values(options):
        text = text.replace(value, HIDDEN)
    return re.sub(r"(--([\w.-]+)(?:=|\s+))(\S+)", lambda m: m[1] + HIDDEN if is_secret(m[2]) else m[0], text)


def _replaced(options: Any, secrets: list[str], path: str = "") -> Any:
    if isinstance(options, Mapping):
        return {
            name: HIDDEN if is_secret(own) and isinstance(value, str) else _replaced(value, secrets, own)
            for name, own, value in _named(options, path)
        }
    if isinstance(options, (list, tuple)):
        return [_replaced(value, secrets, path) for value in options]
    if isinstance(options, str):
        for value in secrets:
            options = options.replace(value, HIDDEN)
    return options


def _secret_values(options: Any) -> list[str]:
    """Longest first, so that none is cut by a shorter one."""
    environment = (value for name, value in os.environ.items() if is_secret(name) and len(value) >= _SHORTEST)
    found = {*environment, *(value for value in _values(options) if len(value) >= _SHORTEST)}
    return sorted(found, key=len, reverse=True)


def _values(options: Any, path: str = "") -> Iterator[str]:
    if isinstance(options, Mapping):
        for _, own, value in _named(options, path):
            if is_secret(own) and isinstance(value, str):
                yield value
            else:
                yield from _values(value, own)
    elif isinstance(options, (list, tuple)):
        for value in options:
            yield from _values(value, path)


def _named(options: Mapping[Any, Any], path: str) -> Iterator[tuple[Any, str, Any]]:
    """Key, dotted name and value of each option."""
    for key, value in options.items():
        yield key, f"{path}.{key}" if path else str(key), value
