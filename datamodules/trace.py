"""Traces: single stage calls to learn from, and the folder that keeps them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cotune.errors import BadValueError
from cotune.programs import Demo, Program
from cotune.storage.durable import DamagedFileError, as_not_written, damaged_file, new_folder
from cotune.storage.formats import check_format

FORMAT = 2
"""Of the folder: a column says it, so that it outlives what people do to a data set. Folders without one are of 1."""


@dataclass(frozen=True)
class Trace:
    """One stage call of a run, to be learnt from.

    Attributes:
        example: its id.
        attempt: of the collection, from 0.
        score: the run's.
        call: its place among the run's calls.
        messages: what it was generated from.
        completion_ids: the very ids that were written.
        complete: whether the last of them ends the turn.
        prompts: id of the prompts it was run with.
        hinted: the run was shown the gold answer.
        gold: the run failed (`score` is its own), and outputs and completion are the labels instead.
        forced: for each of `completion_ids`, whether the engine put it there; empty where none was.
        closed: a text in it was closed at its token limit, not by the LM.
        tokenizer, base: which tokenizer the ids are of (`Vocabulary`), and the LM's name; "" where nobody said.
        ce, pg, kl, candidates, reference, sampled: of each of `completion_ids`, as in `Pair`. As they are, they make a
            completion loss.
        group, desirable: as in `Pair`.
    """

    example: str
    attempt: int
    score: float
    stage: str
    call: int
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    messages: Sequence[Mapping[str, str]]
    completion: str
    completion_ids: Sequence[int]
    complete: bool
    prompts: str
    hinted: bool = False
    gold: bool = False
    forced: Sequence[bool] = ()
    closed: bool = False
    tokenizer: str = ""
    base: str = ""
    ce: Sequence[float] | None = None
    pg: Sequence[float] = ()
    kl: Sequence[float] = ()
    candidates: Sequence[Sequence[int]] = ()
    reference: Sequence[Sequence[float]] = ()
    sampled: Sequence[float] = ()
    group: str = ""
    desirable: bool | None = None

    @property
    def demo(self) -> Demo:
        return Demo(self.inputs, self.outputs, self.example)

    def free(self, weight: float = 1.0) -> tuple[float, ...]:
        """This weight for each id that the LM chose, 0 for those that were forced: a stream that judges its choices."""
        forced = self.forced or (False,) * len(self.completion_ids)
        return tuple(0.0 if put_there else weight for put_there in forced)


def save_traces(traces: Sequence[Trace], folder: Path) -> None:
    """Writes traces as a `datasets` data set, a row a stage call; inputs and outputs as JSON text.

    A kill leaves no folder or all of it.

    Raises:
        NotWrittenError: the disk is full, read-only or broken.
    """
    from datasets import Dataset, disable_progress_bars, enable_progress_bars, is_progress_bar_enabled

    rows = [
        {
            **vars(trace),
            "inputs": json.dumps(dict(trace.inputs), ensure_ascii=False),
            "outputs": json.dumps(dict(trace.outputs), ensure_ascii=False),
            "messages": [dict(message) for message in trace.messages],
            "format": FORMAT,
        }
        for trace in traces
    ]
    shown = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        with as_not_written(folder), new_folder(folder) as partial:
            Dataset.from_list(rows).save_to_disk(str(partial))
    finally:
        if shown:
            enable_progress_bars()


def load_traces(folder: str | Path, program: Program) -> list[Trace]:
    """Reads what `save_traces` wrote, whichever run wrote it.

    Raises:
        DamagedFileError: a file in it is not as the run wrote it.
        ValueError: the folder holds no traces, or they are those of a program with other stages or fields.
    """
    from datasets import load_from_disk

    if why := damaged_file(Path(folder)):
        raise DamagedFileError(
            f"{why}. Start over with --fresh, which archives this run; stored completions are not generated again. "
            "If you changed the traces on purpose, save them to another folder and give it as data.traces."
        )
    try:
        rows = load_from_disk(str(folder)).to_list()
        newest = max((row.get("format", 1) for row in rows), default=1)
        check_format(folder, newest, FORMAT, fix="Use the newer cotune that wrote these traces, or collect them anew.")
        traces = [_trace(row) for row in rows]
    except (FileNotFoundError, TypeError, KeyError, AttributeError) as error:
        raise BadValueError(
            f'"{folder}" holds no traces; give a folder that a run wrote, e.g. runs/<name>/traces/step-1.'
        ) from error
    signatures = {name: stage.signature for name, stage in program.stages.items()}
    for trace in traces:
        signature = signatures.get(trace.stage)
        # Steps that learn from runs as they are keep calls that could not be read: they have no outputs.
        unread = not trace.outputs and trace.ce is not None
        if (
            signature is None
            or set(trace.inputs) != set(signature.inputs)
            or (set(trace.outputs) != set(signature.outputs) and not unread)
        ):
            raise BadValueError(
                f'traces in "{folder}" are of another program: stage "{trace.stage}" '
                f"({', '.join(trace.inputs)} -> {', '.join(trace.outputs)}); this program has {_stages(signatures)}."
            )
    return traces


def _trace(row: Mapping[str, Any]) -> Trace:
    """A row as it was saved; lists come back as tuples. What an older format lacks is as `Trace` has it by itself."""
    read: dict[str, Any] = {name: value for name, value in row.items() if name != "format"}
    read |= {name: json.loads(read[name]) for name in ("inputs", "outputs")}
    for name in ("completion_ids", "forced", "ce", "pg", "kl", "candidates", "reference", "sampled"):
        if read.get(name) is not None:
            read[name] = tuple(tuple(entry) if isinstance(entry, list) else entry for entry in read[name])
    return Trace(**read)


def _stages(signatures: Mapping[str, Any]) -> str:
    return "; ".join(f'"{name}" ({", ".join(s.inputs)} -> {", ".join(s.outputs)})' for name, s in signatures.items())
