"""RecordBoundaries: prompts, candidates and rollouts of each boundary, as files that `cotune report` shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cotune.callbacks.boundary import Boundary, BoundaryListener
from cotune.errors import BadValueError
from cotune.programs import Failure, Rollout, prompts_to_dict
from cotune.programs.types import plain
from cotune.storage.durable import write_whole
from cotune.storage.redact import redacted_text
from lightning.pytorch import Callback, LightningModule, Trainer


class RecordBoundaries(Callback, BoundaryListener):
    """Writes what a reader of the run wants to look up, one file a boundary, each whole or absent.

    `boundaries/0.json` holds the prompts and, after a prompt step, its candidates; `rollouts/val-0.jsonl` the runs on
    val that gave the boundary its score, a line an example; `rollouts/test.jsonl` those of the closing test, and
    `rollouts/test-0.jsonl` those of a boundary where `Alternate.test_prefixes` asks for them. A resumed run that comes
    to a boundary again replaces that boundary's files.

    Args:
        folder: the run's folder; null takes the trainer's default_root_dir. From Python only.
        max_megabytes: largest file of rollouts. Rows past it lose their messages, then their steps, never their scores;
            a row's `cut` says what it lost. 0 records no rollouts.
        max_characters: longest single text in a rollout; a longer one is cut in its middle, and says so there.
    """

    def __init__(self, folder: str | None = None, *, max_megabytes: float = 20.0, max_characters: int = 20_000) -> None:
        if max_megabytes < 0:
            raise BadValueError(f"max_megabytes {max_megabytes} is below 0; 0 records no rollouts.")
        if max_characters < 100:
            raise BadValueError(f"max_characters {max_characters} is below 100, too few to show a text.")
        self.folder, self.max_megabytes, self.max_characters = folder, max_megabytes, max_characters
        self._fits = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._fits = self._fits or stage == "fit"

    def on_boundary(self, trainer: Trainer, module: LightningModule, boundary: Boundary) -> None:
        if trainer.is_global_zero:
            name = f"boundaries/{boundary.index}.json"
            write_whole(self._path(trainer, name), json.dumps(_boundary_record(boundary), ensure_ascii=False) + "\n")
            self._write(trainer, f"rollouts/val-{boundary.index}.jsonl", boundary.rollouts)
            if boundary.tested is not None:
                self._write(trainer, f"rollouts/test-{boundary.index}.jsonl", boundary.tested)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only the test that closes a fit is the run's own; `cotune test` may score anything.
        if self._fits and trainer.is_global_zero:
            self._write(trainer, "rollouts/test.jsonl", pl_module.evaluated)  # type: ignore[arg-type]

    def _write(self, trainer: Trainer, name: str, done: Sequence[Rollout]) -> None:
        if self.max_megabytes:
            limit = int(self.max_megabytes * 1e6)
            lines = rollout_lines(done, max_bytes=limit, max_characters=self.max_characters)
            write_whole(self._path(trainer, name), "".join(f"{line}\n" for line in lines))

    def _path(self, trainer: Trainer, name: str) -> Path:
        return Path(self.folder or trainer.default_root_dir) / name


def _boundary_record(boundary: Boundary) -> dict[str, Any]:
    """Prompts and candidates of a boundary, in plain types; its numbers stand in history.jsonl."""
    record: dict[str, Any] = {
        "index": boundary.index,
        "step": boundary.step,
        "prefix": boundary.prefix,
        "prompts": prompts_to_dict(boundary.prompts),
    }
    if boundary.found is not None:
        record["candidates"] = [candidate.to_dict() for candidate in boundary.found.candidates]
        record["rejected"] = [one.to_dict() for one in boundary.found.rejected]
    return record


def rollout_lines(done: Sequence[Rollout], *, max_bytes: int, max_characters: int) -> list[str]:
    """JSON lines of rollouts, which keep within `max_bytes` as long as ids, scores and errors alone do."""
    rows = [_shortened(rollout_record(rollout), max_characters) for rollout in done]
    least = [_line(_without_steps(row)) for row in rows]
    left = max_bytes - sum(len(line) + 1 for line in least)
    lines = []
    for row, smallest in zip(rows, least, strict=True):
        fuller = (_line(row), _line(_without_messages(row)))
        line = next((line for line in fuller if len(line) - len(smallest) <= left), smallest)
        left -= len(line) - len(smallest)
        lines.append(line.decode())
    return lines


def rollout_record(rollout: Rollout) -> dict[str, Any]:
    """One rollout with all its steps, in plain types."""
    return {
        "example": rollout.example.id,
        "inputs": dict(rollout.example.inputs),
        "labels": dict(rollout.example.labels),
        "steps": [
            {
                "stage": step.stage,
                "inputs": dict(step.inputs),
                "messages": [dict(message) for message in step.messages],
                "completion": step.completion.text,
                **({"thinking": step.completion.thinking} if step.completion.thinking else {}),
                **({"put_there": put} if (put := step.completion.put_there) else {}),
                **({"closed": step.closed} if step.closed else {}),
                "finished": step.completion.finished,
                "prompt_tokens": len(step.completion.prompt_ids),
                "completion_tokens": len(step.completion.completion_ids),
                "outputs": dict(step.outputs),
            }
            for step in rollout.steps
        ],
        "prediction": None if rollout.prediction is None else dict(rollout.prediction),
        "score": rollout.score,
        "error": None if rollout.error is None else _error(rollout.error),
        "cut": "",
    }


def _error(error: Failure) -> dict[str, str]:
    # The user's code may have put the address it called, key included, into its message.
    return {"kind": error.kind, "message": redacted_text(error.message)}


def _line(row: Mapping[str, Any]) -> bytes:
    # A text that is no valid Unicode must not end a run of hours: what UTF-8 cannot hold becomes "?".
    return json.dumps(plain(row), ensure_ascii=False).encode(errors="replace")


def _without_messages(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "steps": [{**step, "messages": []} for step in row["steps"]], "cut": "messages"}


def _without_steps(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "inputs": {}, "labels": {}, "steps": [], "prediction": None, "cut": "steps"}


def _shortened(value: Any, limit: int) -> Any:
    """The value with every text in it cut to about `limit` characters, in the middle."""
    if isinstance(value, str) and len(value) > limit:
        left_out = len(value) - limit
        return f"{value[: limit // 2]} […{left_out:,} characters left out…] {value[-(limit - limit // 2) :]}"
    if isinstance(value, Mapping):
        return {str(name): _shortened(part, limit) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shortened(part, limit) for part in value]
    return value
