"""cotune: tunes the prompts and the weights of multi-stage LM programs, by turns, in one Lightning run."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cotune.callbacks import Alternate
    from cotune.callbacks.export_program import ExportProgram
    from cotune.datamodules import Bootstrapping, Sizes, Table, TraceDataModule
    from cotune.errors import CotuneError
    from cotune.lightning_modules import LanguageModel, LoRA, ProgramModule
    from cotune.programs import (
        Call,
        Demo,
        Example,
        Form,
        In,
        Line,
        Out,
        Predict,
        Program,
        Prompt,
        Rollout,
        Runner,
        Sampling,
        Score,
        Signature,
        Stage,
        Unreadable,
        exact_match,
    )
    from cotune.prompting import (
        CalibratedSearch,
        FormSearch,
        JointSearch,
        PromptSearch,
        RandomDemoSearch,
        ReflectiveSearch,
    )
    from cotune.tuned import Tuned, load

__version__ = "0.1.0"

__all__ = [
    "Alternate",
    "Bootstrapping",
    "CalibratedSearch",
    "Call",
    "CotuneError",
    "Demo",
    "Example",
    "ExportProgram",
    "Form",
    "FormSearch",
    "In",
    "JointSearch",
    "LanguageModel",
    "Line",
    "LoRA",
    "Out",
    "Predict",
    "Program",
    "ProgramModule",
    "Prompt",
    "PromptSearch",
    "RandomDemoSearch",
    "ReflectiveSearch",
    "Rollout",
    "Runner",
    "Sampling",
    "Score",
    "Signature",
    "Sizes",
    "Stage",
    "Table",
    "TraceDataModule",
    "Tuned",
    "Unreadable",
    "exact_match",
    "load",
]

_HOMES = {
    "cotune.programs": (
        *("Call", "Demo", "Example", "Form", "In", "Line", "Out", "Predict", "Program", "Prompt"),
        *("Rollout", "Runner", "Sampling", "Score", "Signature", "Stage", "Unreadable", "exact_match"),
    ),
    "cotune.prompting": (
        *("CalibratedSearch", "FormSearch", "JointSearch", "PromptSearch", "RandomDemoSearch", "ReflectiveSearch"),
    ),
    "cotune.datamodules": ("Bootstrapping", "Sizes", "Table", "TraceDataModule"),
    "cotune.lightning_modules": ("LanguageModel", "LoRA", "ProgramModule"),
    "cotune.callbacks": ("Alternate",),
    "cotune.callbacks.export_program": ("ExportProgram",),
    "cotune.errors": ("CotuneError",),
    "cotune.tuned": ("Tuned", "load"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    # On first use, so that `import cotune` and `cotune --help` do not wait for torch.
    if name not in _HOME:
        raise AttributeError(f"module 'cotune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
