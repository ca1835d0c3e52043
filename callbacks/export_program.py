"""ExportProgram: the tuned program as a folder that others load: adapter/, prompts.json, program.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cotune.callbacks.record_run import write_whole
from cotune.lightning_modules import ProgramModule
from cotune.programs import prompts_to_dict
from lightning.pytorch import Callback, LightningModule, Trainer


class ExportProgram(Callback):
    """Writes `export/` when the fit ends.

    `adapter/` is what PEFT saves; `prompts.json` maps stage names to prompts; `program.json` says which program, LM,
    template and sampling they belong to.

    Args:
        folder: the run's folder; null takes the trainer's default_root_dir.
        config: the module's arguments as the command line knows them, so that `cotune predict` can build it again.
            Without them the export is loaded from Python, where the program is at hand.
    """

    def __init__(self, folder: str | None = None, config: Mapping[str, Any] | None = None) -> None:
        self.folder, self.config = folder, config

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ProgramModule)
        export_program(pl_module, Path(self.folder or trainer.default_root_dir) / "export", config=self.config)


def export_program(module: ProgramModule, folder: Path, *, config: Mapping[str, Any] | None = None) -> None:
    """Writes the export; an older one in its place is replaced only once the new one is complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    module.lm.save_adapter(partial / "adapter")
    write_whole(partial / "prompts.json", json.dumps(prompts_to_dict(module.prompts), indent=2, ensure_ascii=False))
    described = {
        "base_model": module.lm.name,
        "program": f"{type(module.program).__module__}.{type(module.program).__qualname__}",
        "stages": {
            name: {"inputs": list(stage.signature.inputs), "outputs": list(stage.signature.outputs)}
            for name, stage in module.program.stages.items()
        },
        "model": dict(config) if config is not None else None,
    }
    write_whole(partial / "program.json", json.dumps(described, indent=2, ensure_ascii=False))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
