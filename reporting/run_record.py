"""A run as its files tell it, finished or not: what `cotune report` and `cotune compare` read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from cotune.errors import CotuneError
from cotune.reporting.closing_table import rank_of
from cotune.storage.formats import check_format
from cotune.storage.redact import redacted, redacted_text
from cotune.storage.run_folder import FORMAT
from cotune.storage.schedule_text import steps_of

Json = Mapping[str, Any]
"""A JSON object."""

_T = TypeVar("_T")
_HISTORY = {"index", "step", "prefix", "prompts", "val_score", "lm_calls", "seconds"}
_ROLLOUT = {"example", "inputs", "labels", "steps", "prediction", "score", "error"}


class ReportError(CotuneError, ValueError):
    """There is nothing to report. The message says what is missing."""


@dataclass(frozen=True)
class Prefix:
    """The program after some steps of the schedule.

    Attributes:
        index: steps before it; 0 is the program as it came.
        step: the step that led here, "p" or "w"; "" at index 0.
        name: the schedule up to here, e.g. "p -> w"; "vanilla" at index 0.
        record: its line of history.jsonl.
        prompts: stage -> {"instruction", "demos"}; None where they were not recorded.
        candidates: of the prompt step that led here, as `Candidate.to_dict` gives them, or with less in older runs.
        rejected: texts proposed in that step that became no candidate, as `Rejected.to_dict` gives them.
        rollouts: on val, a row an example; None where they were not recorded.
        tested: on test, where `alternate.test_prefixes` asked for them; None otherwise, or where not recorded.
        traces: of the weight step that led here, a row a stage call, {"stage", "outputs", "attempt"}.
    """

    index: int
    step: str
    name: str
    record: Json
    prompts: Json | None
    candidates: Sequence[Json]
    rejected: Sequence[Json]
    rollouts: Sequence[Json] | None
    tested: Sequence[Json] | None
    traces: Sequence[Json]

    @property
    def val_score(self) -> float:
        return float(self.record["val_score"])

    @property
    def test_score(self) -> float | None:
        """None unless every prefix was to be scored on test."""
        score = self.record.get("test_score")
        return None if score is None else float(score)


@dataclass(frozen=True)
class RunRecord:
    """A run's folder, read.

    Attributes:
        prefixes: those that have been reached, in order; never empty.
        schedule: all steps, the ones still to come included.
        config: of config.yaml, values that look like secrets hidden; {} without that file.
        summary: of summary.json; {} while the run is under way.
        metrics: rows of metrics.csv that hold a training loss, a rate or a val score of an epoch.
        test: rollouts of the closing test; None where they were not recorded.
        exported: the prompts in export/; {} without them.
        missing: what the folder lacks, in sentences.
    """

    folder: Path
    prefixes: Sequence[Prefix]
    schedule: Sequence[str]
    config: Json
    config_text: str
    summary: Json
    metrics: Sequence[Mapping[str, float]]
    test: Sequence[Json] | None
    exported: Json
    missing: Sequence[str]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def finished(self) -> bool:
        return bool(self.summary) and not self.summary.get("ended")

    @property
    def judge(self) -> Json:
        """How far the metric's judge agreed with itself, as `Noise` holds it; {} where none was asked twice."""
        found = self.summary.get("judge") or self.prefixes[-1].record.get("judge")
        return dict(found or {})

    @property
    def noise(self) -> float:
        """Variance of one score by the metric alone."""
        return float(self.judge.get("variance", 0.0))

    @property
    def best(self) -> Prefix:
        """The prefix the run ended with; while it is under way the best so far."""
        named = {prefix.name: prefix for prefix in self.prefixes}
        return named.get(str(self.summary.get("best"))) or max(self.prefixes, key=lambda p: rank_of(p.record))

    def epochs(self, prefix: Prefix) -> int:
        """Training epochs of the step that led to a prefix. Older runs do not record them, and had as many in each."""
        return int(prefix.record.get("epochs") or setting(self.config, "alternate.epochs", 5)) * (prefix.step == "w")

    @property
    def threshold(self) -> float:
        """The score from which a rollout counts as a success."""
        return float(setting(self.config, "data.bootstrapping.threshold", 1.0))

    @property
    def command(self) -> str:
        return redacted_text(str(self.summary.get("command", "")))

    def size(self, part: str) -> int | None:
        """Number of examples in val or test, from the rollouts or else from the configuration."""
        rows = self.test if part == "test" else self.prefixes[0].rollouts
        if rows is not None:
            return len(rows)
        value = setting(self.config, f"data.sizes.{part}", None)
        return int(value) if isinstance(value, (int, float)) else None


def read_run(folder: Path) -> RunRecord:
    """Reads a run's folder.

    Raises:
        ReportError: it is no run, it has no boundary yet, or one of its files is damaged.
        FormatError: a newer version of cotune made it.
    """
    history = _read_lines(_history_path(folder))
    made = _optional(folder / "run.json", _read_json) or {}
    check_format(folder / "run.json", made.get("format", 1), FORMAT, fix="Read it with the version that made the run.")
    if not history:
        raise ReportError(f'"{folder / "history.jsonl"}" is empty: this run has reached no boundary yet.')
    config_text, config = _read_config(folder / "config.yaml")
    summary = _read_json(folder / "summary.json") if (folder / "summary.json").is_file() else {}
    prefixes = [_prefix(folder, record) for record in history]
    run = RunRecord(
        folder=folder,
        prefixes=prefixes,
        schedule=_schedule(summary, config, prefixes),
        config=config,
        config_text=config_text,
        summary=summary,
        metrics=_read_metrics(folder / "metrics.csv"),
        test=_optional(folder / "rollouts" / "test.jsonl", _read_lines) if summary else None,
        exported=_optional(folder / "export" / "prompts.json", _read_json) or {},
        missing=(),
    )
    return RunRecord(**{**vars(run), "missing": tuple(_missing(run))})


def setting(config: Json, path: str, default: Any) -> Any:
    """A setting by its name on the command line, `init_args` left out as there.

    >>> setting({"data": {"class_path": "Iris", "init_args": {"sizes": {"val": 30}}}}, "data.sizes.val", None)
    30
    """
    value: Any = config
    for part in path.split("."):
        if isinstance(value, Mapping) and part not in value and isinstance(value.get("init_args"), Mapping):
            value = value["init_args"]
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    return default if value is None else value


def rates_in_words(rates: Mapping[str, str] | None) -> str:
    """The learning rates that summary.json holds by the letter of the step; "" where it holds none.

    >>> rates_in_words({"w": "5.0e-04 (as set)", "d": "1.0e-04 (as the step says)"})
    'w: 5.0e-04 (as set); d: 1.0e-04 (as the step says)'
    """
    return "; ".join(f"{letter}: {rate}" for letter, rate in (rates or {}).items())


def _history_path(folder: Path) -> Path:
    path = folder / "history.jsonl"
    if path.is_file():
        return path
    if (folder / "config.yaml").is_file():
        raise ReportError(
            f'"{folder}" has no history.jsonl: the run has not reached its first boundary, the val score of the '
            "untuned program. Wait for it, or look at the run's output."
        )
    runs = ", ".join(sorted(str(path.parent) for path in folder.glob("*/history.jsonl"))[:5])
    hint = f"Did you mean one of {runs}?" if runs else "Give the folder of a run, e.g. runs/iris."
    raise ReportError(f'"{folder}" is no run: it has no history.jsonl. {hint}')


def _prefix(folder: Path, record: Json) -> Prefix:
    index = record["index"]
    known = _optional(folder / "boundaries" / f"{index}.json", _read_json)
    if known is not None and known.get("prefix") != record["prefix"]:
        known = None  # of another run: the folder was written to by hand
    return Prefix(
        index=index,
        step=record["step"],
        name=record["prefix"],
        record=record,
        prompts=known["prompts"] if known else None,
        candidates=(known or {}).get("candidates") or record.get("candidates", []),
        rejected=(known or {}).get("rejected") or [],
        rollouts=_optional(folder / "rollouts" / f"val-{index}.jsonl", _read_lines),
        tested=_tested(folder, record),
        traces=_read_traces(folder / "traces" / f"step-{index}") if record["step"] == "w" else (),
    )


def _tested(folder: Path, record: Json) -> list[Json] | None:
    # Without a score in the record the file is of an earlier run in this folder.
    path = folder / "rollouts" / f"test-{record['index']}.jsonl"
    return _optional(path, _read_lines) if record.get("test_score") is not None else None


def _schedule(summary: Json, config: Json, prefixes: Sequence[Prefix]) -> list[str]:
    message = summary.get("schedule") or setting(config, "alternate.schedule", "")
    steps = list(steps_of(str(message)))
    done = [prefix.step for prefix in prefixes[1:]]
    return steps if len(steps) >= len(done) else done


def _missing(run: RunRecord) -> Iterator[str]:
    if all(prefix.rollouts is None for prefix in run.prefixes):
        yield (
            "No rollouts were recorded, so examples won and lost, and their traces, cannot be shown. Runs made with "
            "this version record them (record.max_megabytes above 0)."
        )
    elif absent := [prefix.name for prefix in run.prefixes if prefix.rollouts is None]:
        yield f"The rollouts of {', '.join(absent)} were not recorded."
    if all(prefix.prompts is None for prefix in run.prefixes):
        kept = " The exported prompts are shown." if run.exported else ""
        yield f"The prompts of each prefix were not recorded, so there is nothing to compare.{kept}"
    if not run.config:
        yield "There is no config.yaml: the run was not started from the command line, and its settings are not known."
    if not run.metrics and "w" in [prefix.step for prefix in run.prefixes]:
        yield "There is no metrics.csv with training losses, so there are no curves."
    cut = sum(bool(row.get("cut")) for prefix in run.prefixes for row in prefix.rollouts or ())
    if cut:
        yield f"{cut} recorded rollouts lost their messages or steps to record.max_megabytes."


def _read_config(path: Path) -> tuple[str, Json]:
    if not path.is_file():
        return "", {}
    try:
        loaded = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise ReportError(f'"{path}" is damaged: {" ".join(str(error).split())}') from error
    if not isinstance(loaded or {}, Mapping):
        raise ReportError(f'"{path}" is damaged: its settings are no mapping of names to values.')
    config = redacted(loaded or {})
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True), config


def _read_metrics(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    wanted = {"train/loss_step", "train/loss", "train/lr", "val/score"}
    lines = io.StringIO(_text(path), newline="")
    rows = [{name: value for name, value in row.items() if name and value} for row in csv.DictReader(lines)]
    # A resumed run may have logged a step a second time: then that counts.
    kept = {(row.get("step"), *sorted(wanted & set(row))): row for row in rows if wanted & set(row)}
    return [{name: float(value) for name, value in row.items() if _is_number(value)} for row in kept.values()]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_traces(folder: Path) -> list[Json]:
    """Those of a weight step, each of its rounds included."""
    found = [path.parent for path in (*folder.glob("state.json"), *sorted(folder.glob("round-*/state.json")))]
    if not found:
        return []
    from datasets import load_from_disk

    columns = ["example", "stage", "attempt", "outputs"]
    rows = [row for path in found for row in load_from_disk(str(path)).select_columns(columns).to_list()]
    return [{**row, "outputs": json.loads(row["outputs"])} for row in rows]


def _optional(path: Path, read: Callable[[Path], _T]) -> _T | None:
    return read(path) if path.is_file() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ReportError(f'"{path}" is damaged: it is not UTF-8 ({error}).') from error


def _read_json(path: Path) -> Json:
    text = _text(path)
    try:
        loaded = json.loads(text)
    except ValueError as error:
        raise ReportError(f'"{path}" is damaged: {error}') from error
    if not isinstance(loaded, dict):
        raise ReportError(f'"{path}" holds no record of a run.')
    return loaded


def _read_lines(path: Path) -> list[Json]:
    # Not splitlines: it also splits at characters such as U+2028, which JSON leaves standing inside a text.
    lines = _text(path).split("\n")
    return [_read_line(line, f'"{path}", line {number},') for number, line in enumerate(lines, start=1) if line.strip()]


def _read_line(line: str, where: str) -> Json:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ReportError(f"{where} is damaged: {error}") from error
    known = isinstance(row, dict) and (row.keys() >= _HISTORY or row.keys() >= _ROLLOUT)
    if not known:
        raise ReportError(f"{where} is not a record of cotune: {line[:80]}")
    return dict(row)
