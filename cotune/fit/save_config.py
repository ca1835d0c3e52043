"""SaveConfig: config.yaml of a run's folder."""

from __future__ import annotations

from pathlib import Path

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from cotune.storage.durable import write_durably
from cotune.storage.redact import redacted


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml for a fit only: it says what the run was made with, also after `cotune test`.

    Where the run was continued from is no part of it, and a key is none either.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero and not self.already_saved:
            config = self.config.clone()
            config.ckpt_path, config.weights_only = None, None
            made = yaml.safe_load(self.parser.dump(config, skip_unset=False, format="yaml"))
            text = yaml.safe_dump(redacted(made), sort_keys=False, allow_unicode=True)
            write_durably(Path(trainer.default_root_dir) / self.config_filename, text)
            self.already_saved = True
