"""RunLogger: a W&B logger that lives in the run's folder, and goes on where a resumed run goes on."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cotune.errors import CotuneError
from cotune.storage.durable import write_whole
from cotune.storage.redact import HIDDEN, is_secret, redacted
from lightning.pytorch.loggers import WandbLogger


class WandbError(CotuneError):
    """W&B does not take the run. The message says why, and what to do."""


class RunLogger(WandbLogger):
    """Lightning's WandbLogger for a cotune run: one W&B run, however often the process is stopped and continued.

    The id of the W&B run is kept in the run's folder, and what a resumed run logs anew is added to it: after a kill W&B
    may have points twice, and lacks none that metrics.csv has.

    Args:
        save_dir: the run's folder; W&B's files go into its `wandb/`.
        options: those of Lightning's WandbLogger and of `wandb.init`; None leaves W&B's own default.
    """

    def __init__(self, save_dir: str | Path, **options: Any) -> None:
        folder = Path(save_dir) / "wandb"
        folder.mkdir(parents=True, exist_ok=True)  # W&B would else take a temporary folder
        own_id = options.pop("version", None) or options.pop("id", None)
        super().__init__(save_dir=str(save_dir), id=own_id or kept_id(folder), **options)

    @property
    def experiment(self) -> Any:
        from wandb.errors import Error

        try:
            with _redacted_command_line():
                return super().experiment
        except Error as error:  # no key, a key that is refused, no connection
            raise WandbError(
                f"cannot log to W&B ({' '.join(str(error).split())}) Run `wandb login`, set WANDB_API_KEY, or set "
                "WANDB_MODE=offline to log to a local folder and upload it later with `wandb sync`."
            ) from error

    def log_again(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Logs what metrics.csv has and W&B may lack, in a run that goes on: a kill can lose points of W&B's alone.

        Online W&B knows how many points it has. Offline nobody does, so this process's file begins with all of them.
        """
        run = self.experiment
        for row in rows[run.starting_step :]:
            run.log({"trainer/global_step" if name == "step" else name: value for name, value in row.items()})


def kept_id(folder: Path) -> str:
    """The id of the W&B run that this folder belongs to; a new one, written down, if it has none."""
    path = folder / "run.json"
    if path.is_file():
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    made = secrets.token_hex(4)
    write_whole(path, json.dumps({"id": made}) + "\n")
    return made


@contextmanager
def _redacted_command_line() -> Iterator[None]:
    """W&B records sys.argv when a run begins."""
    words = sys.argv
    sys.argv = [
        HIDDEN if before.startswith("--") and is_secret(before) else _redacted_word(word)
        for before, word in zip(["", *words], words, strict=False)
    ]
    try:
        yield
    finally:
        sys.argv = words


def _redacted_word(word: str) -> str:
    name, equals, _ = word.partition("=")
    return f"{name}={HIDDEN}" if equals and word.startswith("--") and is_secret(name) else str(redacted(word))
