"""Parts: the module, the data and the alternation of a fit, made but not run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cotune.callbacks import Alternate
from cotune.datamodules import TraceDataModule
from cotune.lightning_modules import ProgramModule


@dataclass(frozen=True)
class Parts:
    """What a fit is made of; neither weights nor data have been read.

    Attributes:
        counted: the options that its result follows from.
        data_options: those of its data, all of them but the seed, as text.
    """

    module: ProgramModule
    data: TraceDataModule
    alternate: Alternate
    counted: Mapping[str, Any]
    data_options: str
