"""Which options of Lightning's Trainer a fit with Alternate takes: one row for each of them, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cotune.errors import CotuneError


class TrainerOptionError(CotuneError, ValueError):
    """A trainer option has a value that a fit with Alternate cannot honour."""


@dataclass(frozen=True)
class TrainerOption:
    """One argument of `Trainer`.

    Attributes:
        verdict: it works; it is refused at the start unless `takes` allows the value; or it has nothing to act on.
        says: what it does here; for a refused one why, and what to do instead.
        takes: whether a value is fine all the same. None always is: it is Lightning's default.
    """

    verdict: Literal["works", "refused", "irrelevant"]
    says: str
    takes: Callable[[Any], bool] = lambda value: True


def _works(says: str, takes: Callable[[Any], bool] = lambda value: True) -> TrainerOption:
    return TrainerOption("works", says, takes)


def _refused(says: str, takes: Callable[[Any], bool] = lambda value: False) -> TrainerOption:
    return TrainerOption("refused", says, takes)


def _irrelevant(says: str) -> TrainerOption:
    return TrainerOption("irrelevant", says)


def _copies(value: Any) -> bool:
    """A strategy that has the whole LM in each process, started anew."""
    if not isinstance(value, str):
        name = getattr(value, "class_path", type(value).__name__).rpartition(".")[2]
        return name in ("DDPStrategy", "SingleDeviceStrategy")
    return value in ("auto", "single_device", "ddp")


_LENGTH = "alternate.epochs sets the length of a weight step (or alternate.steps, by letter)"

TRAINER_OPTIONS: Mapping[str, TrainerOption] = {
    "accelerator": _works(
        "cpu, gpu, cuda, mps or auto",
        lambda value: not isinstance(value, str) or value in ("cpu", "gpu", "cuda", "mps", "auto"),
    ),
    "strategy": _works(
        "auto and ddp: each process has a copy of the LM and runs its share of the examples. FSDP, DeepSpeed and the "
        "like cut the LM into parts: each token then needs all processes, and texts of unequal length would wait for "
        "one another forever. For an LM that does not fit one device use model.lm.quantization nf4, or a server for "
        "the completions (docs/scaling.md). Instead of ddp_spawn, ddp_fork and ddp_notebook use ddp",
        _copies,
    ),
    "devices": _works("processes, one per device; the command line's default is 1 (docs/scaling.md)"),
    "num_nodes": _works("machines that share the run's folder, each with as many devices"),
    "precision": _works(
        "32-true, and bf16-mixed or 16-mixed for training. The weights keep the type they were loaded with: for "
        "16-bit weights set model.lm.dtype instead",
        lambda value: str(value) in ("32", "32-true", "bf16-mixed", "16-mixed", "bf16", "16"),
    ),
    "logger": _works(
        "beside metrics.csv, which every run has; false for none, then without LearningRateMonitor and "
        "DeviceStatsMonitor"
    ),
    "callbacks": _works(
        "EarlyStopping ends the current weight step, and the schedule continues. Instead of Timer use "
        "trainer.max_time; instead of StochasticWeightAveraging and the like, alternate.average_last; instead of "
        "GradientAccumulationScheduler, trainer.accumulate_grad_batches. Leave out LearningRateFinder, BatchSizeFinder "
        "and finetuning schedules: they train outside the schedule. ModelPruning has nothing to prune: "
        "prune merged weights, after cotune export --what merged",
        lambda value: not _refused_callbacks(value),
    ),
    "fast_dev_run": _works("runs every step on one batch: search, collection, training and scoring; nothing is kept"),
    "max_epochs": _refused(_LENGTH, lambda value: value == -1),
    "min_epochs": _refused(f"{_LENGTH}, and EarlyStopping has its own patience", lambda value: value == 0),
    "max_steps": _refused(_LENGTH, lambda value: value == -1),
    "min_steps": _refused(f"{_LENGTH}, and EarlyStopping has its own patience", lambda value: value == 0),
    "max_time": _works(
        "limits the run's wall clock, including prompt steps and earlier starts. At the limit the run is saved and "
        "ends with exit code 143; the same command with more time resumes. From Python: StopSignals(max_seconds=…)"
    ),
    "limit_train_batches": _works(
        "shortens each training epoch to this many batches, or this share of them, at least one; to train nothing, "
        "leave w out of the schedule",
        lambda value: value > 0,
    ),
    "limit_val_batches": _refused(
        "steps are chosen by the score on all of val; set data.sizes.val. 0 works: no validation between epochs",
        lambda value: value == 0 or (isinstance(value, float) and value == 1),
    ),
    "limit_test_batches": _refused(
        "the final score is of all of test; set data.sizes.test", lambda value: isinstance(value, float) and value == 1
    ),
    "limit_predict_batches": _irrelevant("a fit does not predict"),
    "overfit_batches": _refused(
        "each weight step collects new rows to train on; to see whether the program can learn a few examples, set "
        "data.sizes.train to their number",
        lambda value: value == 0,
    ),
    "val_check_interval": _refused(
        "the adapter is scored at the end of an epoch; for fewer validations set trainer.check_val_every_n_epoch",
        lambda value: isinstance(value, float) and value == 1,
    ),
    "check_val_every_n_epoch": _works(
        "epochs between two validations, 1 or more; a step's last epoch always gets its score. For no validation "
        "between epochs set trainer.limit_val_batches 0",
        lambda value: value >= 1,
    ),
    "num_sanity_val_steps": _works("batches of val to run before training; their scores are not kept"),
    "log_every_n_steps": _works("optimiser steps between two rows of loss and rate; the command line's default is 1"),
    "enable_checkpointing": _irrelevant(
        "the run is saved and can be resumed in any case; you may add a ModelCheckpoint to trainer.callbacks"
    ),
    "enable_progress_bar": _works("on in a terminal, off in a log file"),
    "enable_model_summary": _works("Lightning's table of the LM's layers"),
    "accumulate_grad_batches": _works(
        "batches per optimiser step, 1 or more, weighted by their tokens", lambda value: value >= 1
    ),
    "gradient_clip_val": _works("largest norm, or value, of a gradient; the command line's default is 1"),
    "gradient_clip_algorithm": _works("norm or value"),
    "deterministic": _works("true or warn; on a CPU a run is reproducible to the bit without it"),
    "benchmark": _works("cuDNN's; most LMs have no convolutions"),
    "inference_mode": _works("whether validation and test run in torch.inference_mode"),
    "use_distributed_sampler": _irrelevant("every process reads all rows and runs its share of them"),
    "profiler": _works("simple, advanced or a profiler of Lightning's"),
    "detect_anomaly": _works("torch's search for the operation that made a NaN; slow"),
    "barebones": _refused("it switches off what saves and logs the run", lambda value: not value),
    "plugins": _works("except BitsandbytesPrecision: set model.lm.quantization"),
    "sync_batchnorm": _irrelevant("LMs have no batch norm"),
    "reload_dataloaders_every_n_epochs": _refused("each epoch has new batches; set it to 1", lambda value: value == 1),
    "default_root_dir": _irrelevant("a run's folder is <runs_dir>/<name>; from Python it is this folder"),
    "enable_autolog_hparams": _works("whether Lightning logs the hyperparameters that a module has saved"),
    "model_registry": _irrelevant("Lightning's own cloud; the run's checkpoints and export stay in its folder"),
}
"""Argument of `Trainer` -> what becomes of it in a fit."""

_CALLBACKS = {
    "Timer": "use trainer.max_time, which counts prompt steps as well",
    "StochasticWeightAveraging": "use alternate.average_last",
    "WeightAveraging": "use alternate.average_last",
    "EMAWeightAveraging": "use alternate.average_last",
    "LearningRateFinder": "set the optimiser's lr",
    "BatchSizeFinder": "if memory runs out, a batch is split automatically",
    "BackboneFinetuning": "only the adapter is trained",
    "ModelPruning": "only the adapter is trained; prune merged weights, after cotune export --what merged",
    "GradientAccumulationScheduler": "use trainer.accumulate_grad_batches, which is the same in all epochs",
}

_LOGGING = ("LearningRateMonitor", "DeviceStatsMonitor")
"""Callbacks that raise in a trainer without a logger, one of them only when training begins."""


LOGGED = ("train/loss", "train/lr", "train/skipped_steps", "val/score")
"""What a callback can monitor: all that `ProgramModule` logs while it trains."""


def _refused_callbacks(chosen: Any) -> list[str]:
    """A phrase for each callback that would break the schedule; they may be objects, or as a config names them."""
    return [f"{name}: {_CALLBACKS[name]}" for name in _names(chosen) if name in _CALLBACKS]


def _without_a_metric(chosen: Any, module: object, *, validates: bool) -> list[str]:
    """A phrase for each callback that waits for what nothing logs. A class of the user's own may log anything."""
    callbacks = list(_described(chosen))
    paths = [path for path, _ in callbacks] + ([] if module is None else [_path_of(module)])
    if any("." in path and not path.startswith(("lightning.", "cotune.")) for path in paths):
        return []
    logged = [name for name in LOGGED if validates or not name.startswith("val/")]
    return [
        f"{path.rpartition('.')[2]} monitors {monitor}, which is not logged; logged are {', '.join(logged)}"
        for path, options in callbacks
        if (monitor := getattr(options, "monitor", None)) not in (None, *logged) and getattr(options, "strict", True)
    ]


def _names(chosen: Any) -> list[str]:
    """The name of each callback's class."""
    return [path.rpartition(".")[2] for path, _ in _described(chosen)]


def _described(chosen: Any) -> Iterator[tuple[str, Any]]:
    """Class path, and what has the options, of each callback."""
    for one in chosen if isinstance(chosen, (list, tuple)) else [chosen]:
        if isinstance(one, str):
            yield one, None
        elif path := getattr(one, "class_path", None):
            yield path, getattr(one, "init_args", None)
        elif one is not None:
            yield _path_of(one), one


def _path_of(one: object) -> str:
    return f"{type(one).__module__}.{type(one).__qualname__}"


def check_trainer_options(values: Mapping[str, Any], *, but: Iterable[str] = (), module: object = None) -> None:
    """Refuses a fit with a value that it cannot honour.

    Args:
        values: argument of `Trainer` -> value.
        but: arguments that are not looked at.
        module: what is trained; None: a `ProgramModule`, which logs nothing of its own.

    Raises:
        TrainerOptionError: names the option, the reason and the way out.
    """
    for name, option in TRAINER_OPTIONS.items():
        value = values.get(name)
        if value is None or name in but or option.takes(value):
            continue
        if name == "callbacks":
            raise TrainerOptionError(f"trainer.callbacks: {'; '.join(_refused_callbacks(value))}.")
        raise TrainerOptionError(f"trainer.{name} {value} does not work here: {option.says}.")
    if values.get("logger") is False and (silent := [n for n in _names(values.get("callbacks")) if n in _LOGGING]):
        raise TrainerOptionError(
            f"trainer.logger false: {' and '.join(silent)} in trainer.callbacks has nowhere to log. Leave out "
            "--trainer.logger (every run then writes metrics.csv), or leave out the callback."
        )
    validates = values.get("limit_val_batches") != 0
    if found := _without_a_metric(values.get("callbacks"), module, validates=validates):
        raise TrainerOptionError(f"trainer.callbacks: {'; '.join(found)}.")


def page() -> str:
    """docs/trainer-options.md."""
    rows = [f"| `{name}` | {option.verdict} | {option.says} |" for name, option in TRAINER_OPTIONS.items()]
    return "\n".join(
        [
            "# Options of the Trainer",
            "",
            "cotune runs in Lightning's `Trainer`, and most of its options do what they always do. The schedule "
            "decides how long to train,",
            "so options for that are refused at the start, with the reason. `cotune validate` and `cotune test` accept "
            "all options.",
            "",
            "| `--trainer.…` | | |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )
