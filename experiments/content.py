"""Content: what data and base models are now, to be compared with those that finished runs were made of."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from cotune.callbacks.progress import say
from cotune.datamodules.splits import NAMES
from cotune.experiments.parts import Parts
from cotune.experiments.runs import Cell, Run
from cotune.lightning_modules import LanguageModel
from cotune.lightning_modules.foreign import ModelNotFoundError
from cotune.storage.run_identity import TRACES, data_sums, traces_sum


class ContentNow:
    """The data of each seed and the base of each cell, read once; no weights are loaded.

    Args:
        parts: of each cell.
        store: the file that remembers the sums of a model's files.
    """

    def __init__(self, parts: Mapping[Cell, Parts], store: Path) -> None:
        self._parts, self._store = parts, store
        self._sums: dict[tuple[str, int], dict[str, str]] = {}
        self.base = cache(self._base)

    def data(self, run: Run) -> dict[str, str]:
        """Set -> SHA-256 of the examples that this run would have now; cells with the same data options share them."""
        parts = self._parts[run.cell]
        key = (parts.data_options, run.seed)
        if key not in self._sums:
            splits = parts.data.reseeded(run.seed).splits
            self._sums[key] = data_sums({name: getattr(splits, name) for name in NAMES})
            if parts.data.reused_traces:
                self._sums[key][TRACES] = traces_sum(Path(parts.data.reused_traces))
        return self._sums[key]

    def _base(self, cell: Cell) -> str:
        """The identity of the cell's base model; "" where it is not on this machine, which may only write the page."""
        lm = self._parts[cell].module.lm
        if not isinstance(lm, LanguageModel):
            return lm.base_identity()
        lm.keep_completions(self._store)
        try:
            return lm.base_identity()
        except ModelNotFoundError as error:
            say(f"  {cell}: its base model is not compared with that of its finished runs ({error})")
            return ""
        finally:
            lm.close()
