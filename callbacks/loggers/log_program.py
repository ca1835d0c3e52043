"""LogProgram: scores, prompts, rollouts and costs of each boundary, in whatever loggers the trainer has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cotune.callbacks.alternate import Alternate
from cotune.callbacks.boundary import Boundary, BoundaryListener
from cotune.callbacks.loggers.metrics_file import MetricsFile
from cotune.callbacks.loggers.program_tables import (
    Rows,
    candidate_rows,
    phase_costs,
    prompt_difference,
    prompt_rows,
    prompt_text,
    rejected_rows,
    rollout_rows,
    score_rows,
    trials,
)
from cotune.callbacks.loggers.wandb_artifacts import ProgramArtifacts, read_config
from cotune.callbacks.loggers.wandb_run import RunLogger
from cotune.errors import BadValueError
from cotune.programs.faults import KINDS
from cotune.reporting.plots import score_curve
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

_AXES = {
    "boundary/*": "boundary/index",
    "search/*": "boundary/index",
    "traces/*": "boundary/index",
    "cost/*": "boundary/index",
    "trial/*": "trial/number",
}
"""What W&B draws over what: all prompt steps between two epochs happen at one `trainer/global_step`."""


class LogProgram(Callback, BoundaryListener):
    """Logs each boundary: scalars everywhere, prompts and rollouts where the logger can hold them.

    Scalars are `boundary/*` at each boundary, `search/*` after a prompt step and `traces/*` after a weight step.

    W&B also gets `trial/*`, a point a candidate; `cost/<kind of step>/*`, what all steps of the kind have cost; the
    picture `boundary/curve`; tables: `boundary/scores` (all prefixes so far), `boundary/prompts` (with their difference
    from those before), `boundary/rollouts` (val, a row a stage call), `search/tried` (candidates), `search/rejected`
    (texts that became none); the run's config; and artifacts (`ProgramArtifacts`). TensorBoard gets trials, and prompts
    and their differences as text. Secrets are taken out of config and command line.

    Args:
        artifacts: log data ids, traces, adapters, prompts, config and export as W&B artifacts.
        max_rows: of the rollout table of one boundary; the rest is left out, and the table says so.
        max_characters: of one text in the rollout table; a longer one is cut in its middle.
    """

    def __init__(self, *, artifacts: bool = True, max_rows: int = 2000, max_characters: int = 4000) -> None:
        if max_rows < 0:
            raise BadValueError(f"max_rows {max_rows} is below 0; 0 logs no rollouts.")
        if max_characters < 100:
            raise BadValueError(f"max_characters {max_characters} is below 100, too few to show a text.")
        self.artifacts, self.max_rows, self.max_characters = artifacts, max_rows, max_characters
        self._artifacts: dict[int, ProgramArtifacts] = {}  # by the logger's place in the trainer's list

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    for name, axis in _AXES.items():
                        logger.experiment.define_metric(name, step_metric=axis)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes back what was logged after the checkpoint: it will be logged again."""
        if trainer.state.fn != "fit":
            return
        alternate = _alternate(trainer)
        known = checkpoint["callbacks"].get(alternate.state_key, {}) if alternate else {}
        rows = []
        for logger in trainer.loggers:  # the file of metrics stands first
            if isinstance(logger, MetricsFile):
                rows = logger.forget(step=checkpoint["global_step"], boundaries=len(known.get("history", ())))
            elif isinstance(logger, RunLogger):
                logger.log_again(rows)

    def on_boundary(self, trainer: Trainer, module: LightningModule, boundary: Boundary) -> None:
        if not trainer.is_global_zero:
            return
        alternate = _alternate(trainer)
        history = alternate.history if alternate else [boundary.record()]
        for place, logger in enumerate(trainer.loggers):
            if isinstance(logger, WandbLogger):
                artifacts = self._begun(place, logger, trainer)
                self._log_wandb(logger, boundary, history, step=trainer.global_step)
                if artifacts is not None:
                    artifacts.boundary(module, boundary)  # type: ignore[arg-type]
            elif isinstance(logger, TensorBoardLogger):
                _log_tensorboard(logger, boundary, history)
            else:
                logger.log_metrics(scalars(boundary), step=trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The fit is over, and what others write at its end is there."""
        alternate = _alternate(trainer)
        if stage == "fit" and self.artifacts and alternate and alternate.finished:
            for artifacts in self._artifacts.values():
                artifacts.end(alternate.history, alternate.best)

    def _begun(self, place: int, logger: WandbLogger, trainer: Trainer) -> ProgramArtifacts | None:
        """The artifacts of a logger's run; the first time in this process, its config and data are logged."""
        if place not in self._artifacts:
            folder = Path(trainer.default_root_dir)
            made = self._artifacts[place] = ProgramArtifacts(logger.experiment, folder)
            logger.experiment.config.update(read_config(folder), allow_val_change=True)
            if self.artifacts:
                made.begin(trainer.datamodule)  # type: ignore[attr-defined]
        return self._artifacts[place] if self.artifacts else None

    def _log_wandb(
        self, logger: WandbLogger, boundary: Boundary, history: Sequence[Mapping[str, Any]], *, step: int
    ) -> None:
        import wandb

        for point in trials(boundary, before=_trials_before(history)):
            logger.log_metrics({**point, "boundary/index": float(boundary.index)}, step=step)
        rollouts, left_out = rollout_rows(boundary.rollouts, max_rows=self.max_rows, max_characters=self.max_characters)
        tables: dict[str, Rows] = {
            "boundary/scores": score_rows(history),
            "boundary/prompts": prompt_rows(boundary.prompts, boundary.previous),
            "boundary/rollouts": rollouts,
        }
        if boundary.found is not None:
            tables["search/tried"] = candidate_rows(boundary)
            if boundary.found.rejected:
                tables["search/rejected"] = rejected_rows(boundary)
        # One call, so that the tables stand at the scalars' step.
        logger.log_metrics(
            {
                **scalars(boundary),
                **phase_costs(history),
                "boundary/rollouts_left_out": float(left_out),
                "boundary/curve": wandb.Html(score_curve(history), inject=False),
                **{name: wandb.Table(columns=columns, data=rows) for name, (columns, rows) in tables.items()},
            },
            step=step,
        )


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
            **{f"search/lm_calls_of_{role}": calls for role, calls in boundary.found.calls.items()},
        }
    if boundary.traces is not None:
        named |= {"traces/solved": boundary.traces.solved, "traces/examples": boundary.traces.examples}
        named |= {"traces/runs": boundary.traces.runs}
    if boundary.epoch is not None:
        named["boundary/kept_epoch"] = boundary.epoch
    return {name: float(value) for name, value in {**named, **_diagnosed(boundary)}.items()}


def _diagnosed(boundary: Boundary) -> dict[str, float]:
    """What a step won and lost, and the share of each label's examples that pass."""
    found = boundary.diagnosis
    counted = ("wrong", "closed", "out_of_type")
    named: dict[str, float] = {f"boundary/{name}": found[name] for name in counted if name in found}
    named |= {f"boundary/{name}": len(found[name]) for name in ("won", "lost") if name in found}
    named |= {
        f"boundary/passed/{label}": passed / total for label, (passed, total) in found.get("by_label", {}).items()
    }
    by_label = boundary.coverage.get("by_label", {})
    named |= {f"traces/by_stage/{stage}": count for stage, count in boundary.coverage.get("by_stage", {}).items()}
    named |= {f"traces/by_label/{label}": solved / total for label, (solved, total) in by_label.items()}
    return named


def _log_tensorboard(logger: TensorBoardLogger, boundary: Boundary, history: Sequence[Mapping[str, Any]]) -> None:
    logger.log_metrics({**scalars(boundary), **phase_costs(history)}, step=boundary.index)
    for point in trials(boundary, before=_trials_before(history)):
        logger.log_metrics(point, step=int(point["trial/number"]))
    for stage, prompt in boundary.prompts.items():
        difference = prompt_difference(boundary.previous.get(stage), prompt)
        for name, text in ((f"prompts/{stage}", prompt_text(prompt)), (f"prompts/{stage}/difference", difference)):
            shown = "\n".join(f"    {line}" for line in text.splitlines())  # indented: shown as it is
            logger.experiment.add_text(name, shown, boundary.index)


def _trials_before(history: Sequence[Mapping[str, Any]]) -> int:
    return sum(len(record.get("candidates", ())) for record in history[:-1])


def _alternate(trainer: Trainer) -> Alternate | None:
    return next((c for c in trainer.callbacks if isinstance(c, Alternate)), None)  # type: ignore[attr-defined]
