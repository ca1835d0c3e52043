"""What the command line sets on W&B loggers: the run's folder, its id, and a name, tags and group from the config."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_OURS = "cotune.callbacks.loggers.wandb_run.RunLogger"
_THEIRS = ("lightning.pytorch.loggers.WandbLogger", "lightning.pytorch.loggers.wandb.WandbLogger")
_VARIABLES = {"name": "WANDB_NAME", "project": "WANDB_PROJECT", "tags": "WANDB_TAGS", "group": "WANDB_RUN_GROUP"}
"""Settings that W&B takes from the environment, where nobody gives them otherwise."""


@contextmanager
def placed_loggers(config: Any, folder: Path, *, fits: bool = True) -> Iterator[None]:
    """Within this, a subcommand's config has each WandbLogger as a RunLogger of this run; afterwards it is as before.

    What does not fit has a W&B run of its own, in the same group: the scores of the fit's run stay.

    So config.yaml holds what the user asked for, and not one run's id and folder. What the user set is kept, in the
    config or in W&B's own environment variables.
    """
    chosen = config.trainer.get("logger")
    config.trainer["logger"] = _placed(chosen, config, folder, fits)
    try:
        yield
    finally:
        config.trainer["logger"] = chosen


def _placed(chosen: Any, config: Any, folder: Path, fits: bool) -> Any:
    if isinstance(chosen, list):
        return [_placed(one, config, folder, fits) for one in chosen]
    if not isinstance(chosen, Mapping) and not hasattr(chosen, "class_path"):
        return chosen  # True, False or None
    if chosen.class_path not in _THEIRS:
        return chosen
    made = chosen.clone()
    made.class_path = _OURS
    if not fits:
        made.init_args.keep = False
    for name, value in run_settings(config).items():
        if made.init_args.get(name) is None and not os.environ.get(_VARIABLES.get(name, "")):
            made.init_args[name] = value
    if made.init_args.save_dir == ".":
        made.init_args.save_dir = str(folder)
    else:
        made.init_args.folder = str(folder)
    return made


def run_settings(config: Any) -> dict[str, Any]:
    """Name, project, group and tags of a run. Runs of one program on one kind of data form a group."""
    program, data = (_last(part.class_path) for part in (config.model.program, config.data))
    lm = config.model.lm.init_args
    tags = [program, data, Path(str(lm.get("model", ""))).name, lm.get("quantization"), config.alternate.schedule]
    return {
        "name": config.name,
        "project": "cotune",
        "group": f"{program} on {data}",
        "tags": [str(tag)[:64] for tag in tags if tag],  # 64: W&B's limit
    }


def _last(class_path: str) -> str:
    return class_path.rpartition(".")[2]
