"""LogProgram: scores, prompts, rollouts and costs of each boundary, in whatever loggers the trainer has."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from cotune.callbacks.alternate import Alternate
from cotune.callbacks.boundary import Boundary, BoundaryListener
from cotune.callbacks.metrics_file import MetricsFile
from cotune.programs import Prompt, Prompts, prompts_id
from cotune.programs.faults import KINDS
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

Rows = tuple[list[str], list[list[Any]]]
"""Column names, and rows."""


class LogProgram(Callback, BoundaryListener):
    """Logs each boundary: scalars everywhere, prompts and rollouts where the logger can hold them.

    Scalars are `boundary/*` at each boundary, `search/*` after a prompt step and `traces/*` after a weight step. They
    are drawn over `boundary/index`, because all prompt steps between two epochs happen at one `trainer/global_step`.

    W&B also gets tables: `boundary/scores` (all prefixes so far), `boundary/prompts` (with their difference from those
    before), `boundary/rollouts` (val, a row a stage call), `search/tried` (candidates). TensorBoard gets the prompts as
    text. Nothing of the environment or the command line is logged here.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    for name in ("boundary/*", "search/*", "traces/*"):
                        logger.experiment.define_metric(name, step_metric="boundary/index")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes back from metrics.csv what was logged after the checkpoint: it will be logged again."""
        if trainer.state.fn != "fit":
            return
        alternate = _alternate(trainer)
        known = checkpoint["callbacks"].get(alternate.state_key, {}) if alternate else {}
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.forget(step=checkpoint["global_step"], boundaries=len(known.get("history", ())))

    def on_boundary(self, trainer: Trainer, module: LightningModule, boundary: Boundary) -> None:
        alternate = _alternate(trainer)
        history = alternate.history if alternate else [boundary.record()]
        for logger in trainer.loggers:
            _log(logger, boundary, history, step=trainer.global_step)


def _log(logger: Logger, boundary: Boundary, history: list[dict[str, Any]], *, step: int) -> None:
    metrics = scalars(boundary)
    if isinstance(logger, WandbLogger):
        # One call, so that the tables stand at the scalars' step.
        logger.log_metrics({**metrics, **_wandb_tables(boundary, history)}, step=step)
    elif isinstance(logger, TensorBoardLogger):
        logger.log_metrics(metrics, step=boundary.index)
        for stage, prompt in boundary.prompts.items():
            text = "\n".join(f"    {line}" for line in prompt_text(prompt).splitlines())  # indented: shown as it is
            logger.experiment.add_text(f"prompts/{stage}", text, boundary.index)
    else:
        logger.log_metrics(metrics, step=step)


def scalars(boundary: Boundary) -> dict[str, float]:
    """The numbers of a boundary, one meaning a name. Costs are of the step that led here.

    `boundary/lm_calls` includes scoring on val; `search/lm_calls` does not.
    """
    failures = Counter(r.error.kind for r in boundary.rollouts if r.error is not None)
    named = {
        "boundary/index": boundary.index,
        "boundary/val_score": boundary.val_score,
        **{f"boundary/val_score_{name}_prompts": score for name, score in boundary.scores.items()},
        **{f"boundary/{kind}_failures": failures[kind] for kind in ("format", *KINDS)},
        **{f"boundary/{name}": value for name, value in boundary.cost.items()},
    }
    if boundary.found is not None:
        candidates = boundary.found.candidates
        scoring = sum(len(rollout.steps) for rollout in boundary.rollouts)
        named |= {
            "search/best_score": boundary.found.score,
            "search/candidates": len(candidates),
            "search/pruned": sum(candidate.pruned for candidate in candidates),
            "search/lm_calls": boundary.cost.get("lm_calls", scoring) - scoring,
        }
    if boundary.traces is not None:
        named |= {"traces/solved": boundary.traces.solved, "traces/examples": boundary.traces.examples}
        named |= {"traces/runs": boundary.traces.runs}
    if boundary.epoch is not None:
        named["boundary/kept_epoch"] = boundary.epoch
    return {name: float(value) for name, value in named.items()}


def prompt_text(prompt: Prompt) -> str:
    """A prompt as a reader would write it down: the instruction, then the demos field by field."""
    lines = [prompt.instruction]
    for number, demo in enumerate(prompt.demos, start=1):
        lines += ["", f"Demo {number}" + (f" ({demo.source})" if demo.source else "")]
        lines += [f"{name}: {value}" for name, value in {**demo.inputs, **demo.outputs}.items()]
    return "\n".join(lines)


def prompt_difference(before: Prompt | None, after: Prompt) -> str:
    """Unified diff of two prompts' texts; "" where they are equal."""
    old = prompt_text(before).splitlines() if before is not None else []
    return "\n".join(difflib.unified_diff(old, prompt_text(after).splitlines(), "before", "after", lineterm=""))


def score_rows(history: list[dict[str, Any]]) -> Rows:
    """A row a prefix of the schedule."""
    columns = ["index", "prefix", "val_score", "prompts", "lm_calls", "seconds"]
    return columns, [[record.get(name) for name in columns] for record in history]


def prompt_rows(prompts: Prompts, previous: Prompts) -> Rows:
    """A row a stage."""
    rows = [
        [
            stage,
            prompt.instruction,
            json.dumps([demo.to_dict() for demo in prompt.demos], ensure_ascii=False, indent=1),
            len(prompt.demos),
            prompt_difference(previous.get(stage), prompt),
        ]
        for stage, prompt in prompts.items()
    ]
    return ["stage", "instruction", "demos", "number of demos", "difference"], rows


def rollout_rows(boundary: Boundary) -> Rows:
    """A row a stage call on val; a rollout that failed before its first call has one row without a stage."""
    columns = ["example", "call", "stage", "inputs", "output", "finished", "score", "error", "message"]
    rows: list[list[Any]] = []
    for rollout in boundary.rollouts:
        error = rollout.error
        end = [rollout.score, error.kind if error else "", error.message if error else ""]
        for call, step in enumerate(rollout.steps):
            inputs = json.dumps(dict(step.inputs), ensure_ascii=False)
            written = step.completion
            rows.append([rollout.example.id, call, step.stage, inputs, written.text, written.finished, *end])
        if not rollout.steps:
            rows.append([rollout.example.id, 0, "", "{}", "", "", *end])
    return columns, rows


def candidate_rows(boundary: Boundary) -> Rows:
    """A row a candidate of the prompt search, in the order of trying."""
    columns = ["why", "dev_score", "pruned", "prompts", "parent", "kept", "text"]
    if boundary.found is None:
        return columns, []
    kept = prompts_id(boundary.prompts)
    rows = [
        [c.why, c.score, c.pruned, c.id, c.parent, c.id == kept, _all_text(c.prompts)]
        for c in boundary.found.candidates
    ]
    return columns, rows


def _all_text(prompts: Prompts) -> str:
    return "\n\n".join(f"[{stage}]\n{prompt_text(prompt)}" for stage, prompt in prompts.items())


def _wandb_tables(boundary: Boundary, history: list[dict[str, Any]]) -> Mapping[str, Any]:
    import wandb

    tables = {
        "boundary/scores": score_rows(history),
        "boundary/prompts": prompt_rows(boundary.prompts, boundary.previous),
        "boundary/rollouts": rollout_rows(boundary),
    }
    if boundary.found is not None:
        tables["search/tried"] = candidate_rows(boundary)
    return {name: wandb.Table(columns=columns, data=rows) for name, (columns, rows) in tables.items()}


def _alternate(trainer: Trainer) -> Alternate | None:
    return next((c for c in trainer.callbacks if isinstance(c, Alternate)), None)  # type: ignore[attr-defined]
