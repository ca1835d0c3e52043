"""RunLogger: a W&B logger that lives in the run's folder, and goes on where a resumed run goes on."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cotune.errors import CotuneError
from cotune.storage.durable import as_not_written, write_whole
from cotune.storage.redact import HIDDEN, is_secret, redacted
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only


class WandbError(CotuneError):
    """W&B does not take the run. The message says why, and what to do."""


class RunLogger(WandbLogger):
    """Lightning's WandbLogger for a cotune run: one W&B run, however often the process is stopped and continued.

    The id of the W&B run is kept in the run's folder, and what a resumed run logs anew is added to it: after a kill W&B
    may have points twice, and lacks none that metrics.csv has.

    Args:
        save_dir: W&B's files go into its `wandb/`.
        folder: the run's, whose `wandb/` keeps the id and the list of what was sent; None: `save_dir` is the run's.
        keep: false for a W&B run of its own, that nothing goes on with.
        options: those of Lightning's WandbLogger and of `wandb.init`; None leaves W&B's own default.
    """

    _sent: Path | None = None
    _listing = False  # the list goes on from where W&B stood

    def __init__(
        self, save_dir: str | Path, *, folder: str | Path | None = None, keep: bool = True, **options: Any
    ) -> None:
        own = Path(folder or save_dir) / "wandb"
        for made in (own, Path(save_dir) / "wandb"):
            made.mkdir(parents=True, exist_ok=True)  # W&B would else take a temporary folder
        own_id = options.pop("version", None) or options.pop("id", None)
        if keep:
            self._sent = own / "sent.txt"
            own_id = own_id or kept_id(own)
        super().__init__(save_dir=str(save_dir), id=own_id, **options)

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

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self._list([_text_of({**metrics, "step": step})])
        super().log_metrics(metrics, step)

    @rank_zero_only
    def log_again(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Logs what metrics.csv has and W&B may lack, in a run that goes on: a kill can lose points of W&B's alone.

        Online W&B knows how many points it has, and the list of those sent says which they are: candidates' points,
        which metrics.csv lacks, and those of steps that are done a second time are among them. Offline nobody knows,
        so this process's file begins with all of them.
        """
        run = self.experiment
        known = set(self._received(run, rows))
        lacking = [row for row in rows if _text_of(row) not in known]
        self._list(map(_text_of, lacking))
        for row in lacking:
            run.log({"trainer/global_step" if name == "step" else name: value for name, value in row.items()})

    def _received(self, run: Any, rows: Sequence[Mapping[str, float]] = ()) -> list[str]:
        """The points that W&B had when this process began, in their order; "" is one that nothing is known of.

        Args:
            rows: of metrics.csv, for a run that has no list yet. Without candidates they are W&B's points.
        """
        count = run.starting_step
        if self._sent is not None and self._sent.is_file():
            listed = self._sent.read_text(encoding="utf-8").splitlines()[:count]
        else:
            plain = not any("boundary/index" in row for row in rows)
            listed = [_text_of(row) for row in rows[:count]] if plain else []
        return [*listed, *([""] * (count - len(listed)))]

    def _list(self, points: Iterable[str]) -> None:
        """Adds points that are about to be sent to the list, of which W&B has the first; the rest was lost."""
        if self._sent is None:
            return
        if not self._listing:
            begun = self._received(self.experiment)
            write_whole(self._sent, "".join(f"{point}\n" for point in begun))
            self._listing = True
        with as_not_written(self._sent), self._sent.open("a", encoding="utf-8") as file:
            file.writelines(f"{point}\n" for point in points)


def _text_of(point: Mapping[str, Any]) -> str:
    """What a point is known by, in W&B and in metrics.csv: a boundary by its number, any other by its values.

    >>> _text_of({"step": 3, "train/loss": 0.5}), _text_of({"boundary/index": 1.0, "boundary/curve": "html"})
    ('{"step": 3.0, "train/loss": 0.5}', 'boundary 1')
    """
    if "boundary/index" in point and "trial/number" not in point:
        return f"boundary {int(point['boundary/index'])}"
    return json.dumps({n: float(v) for n, v in sorted(point.items()) if isinstance(v, (int, float))})


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
