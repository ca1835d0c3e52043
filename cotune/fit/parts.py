"""What a command line of fit describes, made but not run: for tables, which ask what their runs will cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import cast

import yaml
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from cotune.callbacks import Alternate
from cotune.datamodules import TraceDataModule
from cotune.experiments.parts import Parts
from cotune.fit.cli import CotuneCLI
from cotune.fit.option_errors import check_option_groups
from cotune.lightning_modules import ProgramModule
from cotune.lightning_modules.lightning_internals import PlainCLI
from cotune.storage.run_identity import counted_options


def parts_of(words: Sequence[str]) -> Parts:
    """The parts of `cotune fit` with these words; exits with one line, as that would, if they are wrong."""
    cli = _Unrun(list(words[1:] if words[:1] == ["fit"] else words))
    options = yaml.safe_load(cli.parser.dump(cli.config, skip_unset=False, format="yaml"))
    alternate = cast(Alternate, cli.config_init["alternate"])
    alternate.narrow_search(cli.model.program)
    data_options = json.dumps(options["data"], sort_keys=True, default=str)
    return Parts(cli.model, cli.datamodule, alternate, counted_options(options), data_options)


class _Unrun(CotuneCLI):
    """Parses and makes the parts, and leaves run folder, trainer and everything else alone."""

    def _run(self, args: ArgsType) -> None:
        PlainCLI.__init__(
            self,
            model_class=ProgramModule,
            datamodule_class=TraceDataModule,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=None,
            args=args,
            run=False,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # The base class warns of words that are not this process's own.
        self.config = parser.parse_args(cast(Sequence[str], args))

    def before_instantiate_classes(self) -> None:
        check_option_groups(self.config)

    def after_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        self.config_init = self.parser.instantiate(self.config)
        self.datamodule = self.config_init["data"]
        self.model = self.config_init["model"]

    def set_seed(self) -> None:
        pass  # this process draws nothing, and says nothing of seeds
