"""What a fit refuses before its run's folder is touched."""

from __future__ import annotations

from pathlib import Path
from pydoc import locate
from typing import Any

from cotune.callbacks.checkpoint import whole_checkpoint
from cotune.fit.option_errors import OptionError
from cotune.lightning_modules import LanguageModel
from cotune.lightning_modules.text_lm import NoWeightsError, no_weights
from cotune.storage.schedule_text import steps_of


def check_weights(config: Any) -> None:
    """Refuses a schedule that trains an LM that has no weights here.

    Raises:
        NoWeightsError: it does.
    """
    lm = locate(config.model.lm.class_path)
    steps = set(steps_of(config.alternate.schedule))
    if isinstance(lm, type) and not issubclass(lm, LanguageModel) and steps != {"p"}:
        raise NoWeightsError(no_weights(str(config.model.lm.init_args.get("model", lm.__name__))))


def check_folders(config: Any) -> None:
    """Refuses a folder of its own for a part of the run: it is looked for in the run's folder alone.

    Raises:
        OptionError: there is one.
    """
    for group in ("alternate", "record"):
        if (folder := config[group].get("folder")) is not None:
            raise OptionError(
                f"{group}.folder {folder} is not allowed: on the command line all of a run is in <runs_dir>/<name>, "
                f"where it is continued and reported from. Leave out {group}.folder, and set --runs_dir and --name."
            )


def check_checkpoint(config: Any, run: Path) -> None:
    """Refuses to continue a run from a checkpoint that is not its own.

    Raises:
        OptionError: --ckpt_path names one elsewhere, or it comes with --fresh.
        MissingFileError, CheckpointError: as `whole_checkpoint`.
    """
    asked = config.get("ckpt_path")
    if asked is None:
        return
    if config.fresh:
        raise OptionError(f"--ckpt_path {asked} continues the run, and --fresh starts it over: leave out one of them.")
    if asked == "last":
        return
    own = run / "checkpoints"
    if whole_checkpoint(asked).resolve().parent != own.resolve():
        raise OptionError(
            f"--ckpt_path {asked}: a fit continues only from its own checkpoints, which are in {own}. Leave out "
            "--ckpt_path, and the run that --name says goes on from its newest one. Files of ModelCheckpoint and "
            "checkpoints of other runs are for cotune test and cotune validate."
        )
