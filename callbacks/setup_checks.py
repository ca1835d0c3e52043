"""What a fit with Alternate must be like, checked before the model is loaded; and advice where a step finds nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cotune.callbacks.alternation import Alternation
from cotune.callbacks.diagnosis import advice_without_traces
from cotune.callbacks.schedule import PROMPTS, WeightStep
from cotune.callbacks.trainer_options import check_trainer_options
from cotune.datamodules import Report, TraceDataModule
from cotune.errors import BadValueError, WrongTypeError
from cotune.lightning_modules import ProgramModule
from cotune.lightning_modules.lightning_internals import Share
from cotune.lightning_modules.text_lm import TextLM
from cotune.programs import Program, prompts_id
from lightning.pytorch import LightningModule, Trainer


def ours(trainer: Trainer, module: LightningModule | None = None) -> tuple[ProgramModule, TraceDataModule]:
    """The trainer's module and data, as what `check_setup` has made sure that they are."""
    return module or trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined, return-value]


def check_setup(trainer: Trainer, module: LightningModule, alternation: Alternation) -> None:
    """Refuses what Alternate cannot run.

    Raises:
        WrongTypeError: module or data are of another kind.
        TrainerOptionError: the trainer was made with an option that cannot be honoured.
        NoWeightsError: the schedule trains, and the LM has no weights here.
        BadValueError: several processes would ask an LM that has no weights here, a set is empty that a step
            needs, or gold answers are asked for where labels give none.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(module, ProgramModule) or not isinstance(data, TraceDataModule):
        raise WrongTypeError(
            f"Alternate works with a ProgramModule and a TraceDataModule; this fit has {type(module).__name__} and "
            f"{type(data).__name__}. Call trainer.fit(module, datamodule=data)."
        )
    if trainer.world_size > 1 and isinstance(module.lm, TextLM):
        raise BadValueError(
            f"this fit has {trainer.world_size} processes, one per device, but {module.lm.name} uses no device here. "
            "Set trainer.devices to 1; to send more requests at once, raise model.lm.concurrency."
        )
    if any(step.rounds for step in alternation.steps):
        _ = module.weights
    _check_trainer(trainer, module, sum(step.rounds for step in alternation.steps))
    if not data.splits.val:
        raise BadValueError("the val set is empty, but its scores choose between steps; set data.sizes.val.")
    if not data.splits.dev and not all(step.rounds for step in alternation.steps):
        raise BadValueError("the dev set is empty, but prompt steps score candidates on it; set data.sizes.dev.")
    if data.val_samples > 1 and module.sampling.temperature == 0:
        raise BadValueError(
            f"data.val_samples is {data.val_samples}, but at model.sampling.temperature 0 all runs of an example are "
            "the same; set a temperature above 0, or val_samples to 1."
        )
    if data.bootstrapping.gold_answers is True and not _labels_fill_a_stage(module.program, data):
        labels = sorted({name for example in data.splits.train for name in example.labels})
        stages = "; ".join(f"{name}: {', '.join(s.signature.outputs)}" for name, s in module.program.stages.items())
        raise BadValueError(
            "data.bootstrapping.gold_answers is true, but no stage has labels for all its outputs "
            f"(labels: {', '.join(labels) or 'none'}; stages: {stages}). Set it to false; for stages "
            "that reason, use data.bootstrapping.hints."
        )


def check_teachers(
    module: ProgramModule, schedule: Sequence[str], steps: Mapping[str, WeightStep], *, fresh: bool
) -> None:
    """Refuses a step that would distil prompts into the weights where there can be none but the plain ones, and one
    that compares itself with weights that `fresh` ones do not start from.

    Raises:
        ValueError: no prompt step stands before it, and the run begins with the program's own prompts; or a weight step
            stands before it, and its weights are to be fresh.
    """
    for place, letter in enumerate(schedule):
        reference = steps[letter].learns.reference if letter in steps else None
        if fresh and reference is not None and reference.prompts == "rows" and set(schedule[:place]) - {PROMPTS}:
            raise BadValueError(
                f'alternate.weights is "fresh", but step {letter} of "{" -> ".join(schedule)}" learns from runs of the '
                'weights before it, and compares itself with them. Use "continue".'
            )
        if reference is None or reference.prompts != "before" or PROMPTS in schedule[:place]:
            continue
        if prompts_id(module.prompts) == prompts_id(module.initial_prompts):
            raise BadValueError(
                f'schedule "{" -> ".join(schedule)}": step {letter} distils the prompts that p found into the weights, '
                f"but no p comes before it, so teacher and student would have the same prompts. Put a p before it, "
                f'e.g. "p -> {letter} -> p".'
            )


def _check_trainer(trainer: Trainer, module: ProgramModule, epochs: int) -> None:
    """What the trainer was made with, as far as it still says so. Its number of epochs may be the schedule's own."""
    own = ("callbacks", "strategy", "precision", "val_check_interval", "limit_train_batches", "limit_val_batches")
    counts = ("accumulate_grad_batches", "check_val_every_n_epoch", "overfit_batches", "max_steps", "min_steps")
    names = (*own, *counts, "reload_dataloaders_every_n_epochs", "min_epochs")
    values = {name: getattr(trainer, name, None) for name in (*names, "max_epochs")}
    values["logger"] = bool(trainer.loggers)
    but: tuple[str, ...] = () if epochs else ("reload_dataloaders_every_n_epochs",)
    if trainer.max_epochs in (1000, epochs):  # 1000 is what Lightning makes of none
        but = (*but, "max_epochs")
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        but = (*but, "max_epochs", "max_steps", "limit_val_batches")  # Lightning has set them
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        but = (*but, "limit_train_batches", "limit_val_batches")  # so here
    check_trainer_options(values, but=but, module=module)
    if isinstance(trainer.limit_train_batches, float) and trainer.limit_train_batches < 1:
        trainer.limit_train_batches = Share(trainer.limit_train_batches)


def _labels_fill_a_stage(program: Program, data: TraceDataModule) -> bool:
    """Whether the labels give some stage all that it writes."""
    labels = {name for example in data.splits.train for name, value in example.labels.items() if value is not None}
    return any(set(stage.signature.outputs) <= labels for stage in program.stages.values())


def no_traces(report: Report, program: Program, data: TraceDataModule) -> str:
    """What to say, and to advise, where a collection brought nothing to train on."""
    options = data.bootstrapping
    offered = options.gold_answers is not True and _labels_fill_a_stage(program, data)
    return (
        f"weight step: no run reached a score of {options.threshold:g}, so there is nothing to train on: {report}. "
        f"{advice_without_traces(report, options, gold_answers=offered)}"
    )
