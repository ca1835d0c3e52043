"""What a run was made with: its options, the content of its data and of its base model; and how two differ."""

from __future__ import annotations

import hashlib
import importlib
import json
import platform
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cotune.errors import BadValueError
from cotune.storage.durable import DamagedFileError, file_sum, read_durably, write_durably
from cotune.storage.formats import check_format
from cotune.storage.redact import is_secret
from cotune.storage.run_folder import FORMAT

_FILE = "run.json"
_FREE = (
    # Where things are. What is there counts: of model and data it is the content that is compared.
    *("name", "runs_dir", "fresh", "config", "budget", "ckpt_path", "weights_only", "record", "log"),
    *("model.lm.init_args.model", "model.lm.init_args.gguf_file", "model.lm.init_args.completions"),
    *("data.init_args.path", "data.init_args.test_path", "trainer.default_root_dir", "alternate.folder"),
    # What is shown and saved, and how much memory generating may take. No result follows from them.
    *("trainer.logger", "trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.log_every_n_steps"),
    *("trainer.profiler", "alternate.save_every", "model.lm.init_args.cache_tokens"),
    *("trainer.enable_checkpointing", "trainer.max_time"),
    # How many processes share the work.
    *("trainer.devices", "trainer.num_nodes", "trainer.strategy"),
    # How an endpoint is asked, and what it may cost.
    *(
        f"model.lm.init_args.{name}"
        for name in ("concurrency", "timeout", "tries", "key_variable", "prices", "max_calls")
    ),
    *(f"model.engine.init_args.{name}" for name in ("urls", "adapters", "concurrency", "timeout", "patience")),
    *(f"model.engine.init_args.{name}" for name in ("tolerance", "key_variable", "python", "options", "sleep")),
)
"""Options that may be others when a run is continued."""

_MOVABLE = ("data.init_args.traces", "model.lm.init_args.adapter")
"""Options that may be others where they were and are given: places, of which what is there counts."""

TRACES = "traces"
ADAPTER = "adapter"
"""The names, among the sets of a run's data, of the reused traces and of the adapter that it begins from."""

_LIBRARIES = ("cotune", "torch", "transformers", "peft", "lightning")


@dataclass(frozen=True)
class RunIdentity:
    """What a run follows from.

    Attributes:
        options: that count, by dotted name; secrets left out.
        data: set -> SHA-256 of its examples, in order; and those of reused traces, by the name "traces", and of the
            adapter that the run begins from, by the name "adapter".
        base: of the base model's content, or its name and commit on the Hub.
        versions: of the libraries. Other ones may give other last bits.
        finished: the run has come to its end, its test included.
    """

    options: Mapping[str, Any]
    data: Mapping[str, str]
    base: str
    versions: Mapping[str, str]
    finished: bool = False

    def write(self, folder: Path) -> None:
        record = {"format": FORMAT, **asdict(self)}
        write_durably(folder / _FILE, json.dumps(record, ensure_ascii=False, indent=1) + "\n")

    def ended(self) -> RunIdentity:
        return replace(self, finished=True)


def read_identity(folder: Path) -> RunIdentity | None:
    """What the run in a folder was made with; None if none has begun there.

    Raises:
        DamagedFileError: run.json is not what was written.
        FormatError: a newer version of cotune wrote it.
    """
    try:
        record = json.loads(read_durably(folder / _FILE))
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        raise DamagedFileError(
            f"{error} So cotune cannot tell whether this is the same run. Start over with --fresh, which archives it, "
            "or give this one another --name."
        ) from error
    fix = "Continue with the version that made the run, or start over with --fresh, which archives it."
    check_format(folder / _FILE, record.pop("format", 1), FORMAT, fix=fix)
    return RunIdentity(**record)


def counted_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a run's result follows from, by dotted name.

    >>> counted_options({"name": "a", "alternate": {"epochs": 2, "save_every": 1}, "lm": {"api_key": "k"}})
    {'alternate.epochs': 2}
    """
    flat = _flat(config, "")
    return {name: value for name, value in flat.items() if not _is_free(name) and not is_secret(name)}


def data_sums(sets: Mapping[str, Iterable[Any]]) -> dict[str, str]:
    """Set -> SHA-256 of its examples: ids, inputs and labels, in order."""
    return {
        name: hashlib.sha256(
            json.dumps([[e.id, e.inputs, e.labels] for e in examples], sort_keys=True, default=str).encode()
        ).hexdigest()
        for name, examples in sets.items()
    }


def traces_sum(folder: Path) -> str:
    """SHA-256 of the rows in a folder of traces. What else there is does not count: `datasets` keeps caches there.

    Raises:
        BadValueError: there are none.
    """
    files = [path for path in sorted(folder.glob("*.arrow")) if not path.name.startswith("cache-")]
    if not files:
        raise BadValueError(
            f'data.traces "{folder}" holds no traces; give a folder that a run wrote, e.g. runs/<name>/traces/step-1.'
        )
    return hashlib.sha256("".join(map(file_sum, files)).encode()).hexdigest()


def adapter_sum(folder: Path) -> str:
    """SHA-256 of an adapter's settings and weights; "" where there are none."""
    files = sorted(folder.glob("adapter_*"))
    return hashlib.sha256("".join(map(file_sum, files)).encode()).hexdigest() if files else ""


def library_versions() -> dict[str, str]:
    """The versions of Python and of the libraries that a run's numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A phrase for each name whose value is another.

    >>> differences({"epochs": 2, "seed": 0}, {"epochs": 3, "seed": 0})
    ['epochs: 2 -> 3']
    """
    return [
        f"{name}: {_option_text(then, name)} -> {_option_text(now, name)}"
        for name in sorted({*then, *now})
        if name not in then or name not in now or then[name] != now[name]
    ]


def changed_options(then: RunIdentity, now: Mapping[str, Any], *, but: Collection[str] = ()) -> list[str]:
    """A phrase for each option that is another, `but` left out.

    One that this version of cotune has added or dropped is none, nor one that no longer counts; null is "not set".

    >>> then = RunIdentity({"a": 1, "trainer.devices": 2}, {}, "", {"cotune": version("cotune")})
    >>> changed_options(then, {"a": 2, "b": None})
    ['a: 1 -> 2']
    """
    kept = (then.options.keys() | now.keys()) - set(but)
    if then.versions.get("cotune") != version("cotune"):
        kept &= then.options.keys() & now.keys()
    kept -= {name for name in _MOVABLE if then.options.get(name) and now.get(name)}
    known, asked = (
        {name: value for name, value in options.items() if name in kept and value is not None and not _is_free(name)}
        for options in (then.options, now)
    )
    return differences(_by_definition(known), _by_definition(asked))


def changed_content(then: RunIdentity, *, data: Mapping[str, str], base: str) -> list[str]:
    """A phrase for each set whose examples are others, and one for another base model.

    Args:
        data, base: as of a `RunIdentity`; a base of "" is not known, and not compared, nor are traces and adapters that
            only one of the two names: older runs did not, and that there are some is among the options.

    >>> changed_content(RunIdentity({}, {"val": "aa"}, "one", {}), data={"val": "bb"}, base="two")
    ['data, val set: "aa" -> "bb"', 'base model: one -> two']
    """
    left_out = {TRACES, ADAPTER} - (then.data.keys() & data.keys())
    shown = (
        {
            "the adapter that it begins from" if name == ADAPTER else f"data, {name} set": digest[:12]
            for name, digest in sums.items()
            if name not in left_out
        }
        for sums in (then.data, data)
    )
    other = [f"base model: {then.base[:12]} -> {base[:12]}"] if base not in ("", then.base) else []
    return [*differences(*shown), *other]


def _by_definition(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with each class and function of cotune by the module that defines it: most have shorter names too."""
    return {name: _defined(value) if isinstance(value, str) else value for name, value in options.items()}


def _defined(value: str) -> str:
    """
    >>> _defined("cotune.RandomDemoSearch"), _defined("cotune.nothing"), _defined("p -> w")
    ('cotune.prompting.demos.RandomDemoSearch', 'cotune.nothing', 'p -> w')
    """
    module, _, name = value.rpartition(".")
    if not value.startswith("cotune.") or " " in value:
        return value
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return value
    return f"{found.__module__}.{found.__qualname__}" if hasattr(found, "__qualname__") else value


def _flat(config: Any, name: str) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        return {name: config}
    if not config and name:
        return {name: {}}
    return {k: v for key, value in config.items() for k, v in _flat(value, f"{name}.{key}" if name else key).items()}


def _is_free(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in _FREE)


def _option_text(options: Mapping[str, Any], name: str) -> str:
    return json.dumps(options[name], ensure_ascii=False) if name in options else "not set"
