"""The command line: LightningCLI with the alternation as a group of its own, and a folder for each run."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

from cotune.callbacks import Alternate
from cotune.callbacks.export_program import ExportProgram
from cotune.callbacks.log_program import LogProgram
from cotune.callbacks.metrics_file import MetricsFile
from cotune.callbacks.record_boundaries import RecordBoundaries
from cotune.callbacks.record_run import RecordRun
from cotune.datamodules import TraceDataModule
from cotune.lightning_modules import ProgramModule
from cotune.parse_errors import explain
from cotune.run_folder import RunFolder

_TRAINER_DEFAULTS: dict[str, Any] = {
    "trainer.max_epochs": -1,  # Alternate knows the number: weight steps times alternate.epochs
    "trainer.num_sanity_val_steps": 0,
    "trainer.reload_dataloaders_every_n_epochs": 1,
    "trainer.gradient_clip_val": 1.0,  # without it small batches at 5e-4 spike, and learning starts late or never
    "trainer.enable_checkpointing": False,  # Alternate saves, at boundaries and epochs, what belongs together
    "trainer.enable_model_summary": False,
    "trainer.log_every_n_steps": 1,
    "trainer.devices": 1,
}


_ROOMS = ("programs", "prompting", "datamodules", "lightning_modules", "callbacks")


class Parser(LightningArgumentParser):
    """Lightning's parser, whose errors are one line and name the nearest right option."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # The base class would print a page of usage first, and the message would be lost behind it.
        print(f"cotune: error: {explain(message, self._options())}", file=sys.stderr)
        sys.exit(2)

    def _options(self) -> dict[str, Any]:
        """Options and their types, the subcommands' included."""
        found: dict[str, Any] = {}
        for action in self._actions:
            if isinstance(action.choices, dict):  # the subcommands
                for parser in action.choices.values():
                    found |= parser._options()
            else:
                found[action.dest] = getattr(action, "_typehint", None)
        return found


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml for a fit only: it says what the run was made with, also after `cotune test`."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class CotuneCLI(LightningCLI):
    """`cotune fit | validate | test`."""

    def __init__(self, args: ArgsType = None) -> None:
        self.run_folder: RunFolder | None = None
        try:
            super().__init__(
                model_class=ProgramModule,
                datamodule_class=TraceDataModule,
                subclass_mode_data=True,
                seed_everything_default=0,
                auto_configure_optimizers=False,  # it would ask for parameters before the model is loaded
                save_config_callback=SaveConfig,
                save_config_kwargs={"overwrite": True},
                args=args,
            )
        finally:
            self._release_folder()

    def _release_folder(self) -> None:
        if self.run_folder is not None:
            self.run_folder.release()

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        # Lightning's predict would run over the test set; `cotune predict` answers new rows from an export.
        return {name: LightningCLI.subcommands()[name] for name in ("fit", "validate", "test")}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        # As the base class does, with a parser that suggests.
        parser = Parser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="a YAML file with any of these options")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str, default="run", help="of this run; its files are in <runs_dir>/<name>")
        parser.add_argument("--runs_dir", type=str, default="runs", help="folder of all runs")
        parser.add_argument("--fresh", action="store_true", help="start over; an earlier run is kept aside")
        parser.add_lightning_class_args(Alternate, "alternate")
        parser.add_lightning_class_args(RecordBoundaries, "record")
        parser.set_defaults({"model.lm": "cotune.lightning_modules.LanguageModel", **_TRAINER_DEFAULTS})
        parser.set_defaults({"alternate.search": "cotune.prompting.RandomDemoSearch"})
        for target in ("model.seed", "data.init_args.seed", "alternate.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=int)

    def _parse_ckpt_path(self) -> None:
        # Lightning would let values saved in the checkpoint override those on the command line, without a word.
        pass

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        self.run_folder = RunFolder(config.runs_dir, config.name)
        last = config.get("ckpt_path") == "last"
        if self.subcommand == "fit":
            checkpoint = self.run_folder.acquire(fresh=config.fresh, resume=last)
            if last:
                print(f"continuing {checkpoint}" if checkpoint else "nothing saved yet: starting from the beginning")
                config.ckpt_path = str(checkpoint) if checkpoint else None
            config.fresh = False
        elif last:
            checkpoint = self.run_folder.path / "checkpoints" / "last.ckpt"
            if not checkpoint.is_file():
                raise FileNotFoundError(f"{checkpoint} does not exist; is --name {config.name} the run you mean?")
            config.ckpt_path = str(checkpoint)
        config.trainer.default_root_dir = str(self.run_folder.path)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand]
        chosen = config.trainer.get("logger")
        loggers = chosen if isinstance(chosen, list) else [chosen] if chosen not in (None, True, False) else []
        if self.subcommand == "fit" and chosen is not False:
            assert self.run_folder is not None
            loggers = [MetricsFile(self.run_folder.path, keep=bool(config.get("ckpt_path"))), *loggers]
        config.trainer["logger"] = loggers or False
        trainer = super().instantiate_trainer(**kwargs)
        self._dump_config()
        trainer.callbacks += [RecordRun(), LogProgram(), ExportProgram(config=self.config_dump["model"])]  # type: ignore[attr-defined]
        return trainer

    def after_fit(self) -> None:
        self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        from cotune.closing_table import closing_table

        closing_table(Path(self.trainer.default_root_dir))


def run(words: Sequence[str]) -> int:
    """Runs fit, validate or test."""

    def start() -> int:
        CotuneCLI(list(words))
        return 0

    return guarded(start)


def guarded(command: Callable[[], int]) -> int:
    """Runs a command. Errors that the user can mend end with one message and exit code 2.

    Set COTUNE_DEBUG=1 for the traceback of such an error as well.
    """
    _quiet()
    _find_own_modules()
    try:
        return command()
    except KeyboardInterrupt:
        return _stopped()
    except SystemExit as end:
        # In a fit Lightning turns Ctrl-C into an exit; only what it was handling then tells it from any other.
        if isinstance(end.__context__, KeyboardInterrupt):
            return _stopped()
        raise
    except BrokenPipeError:  # the reader of our output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("COTUNE_DEBUG") or not _is_ours(error):
            raise
        print(f"cotune: error: {error}", file=sys.stderr)
        return 2


def _stopped() -> int:
    print("\ncotune: stopped. The same command with --ckpt_path last goes on from the last save.", file=sys.stderr)
    return 130


def _find_own_modules() -> None:
    """Makes the user's modules in the working folder importable, behind all that is installed."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _is_ours(error: BaseException) -> bool:
    """Whether cotune raised it on purpose, with a message for the user; anything else deserves its traceback."""
    package = Path(__file__).resolve().parent
    house = [package, *(package.parent / room for room in _ROOMS)]  # editable: rooms beside cotune/; installed: in it
    last = traceback.extract_tb(error.__traceback__)[-1]
    file = Path(last.filename).resolve()
    return any(file.is_relative_to(folder) for folder in house) and (last.line or "").startswith("raise ")


def _quiet() -> None:
    """Silences what libraries say that a user can do nothing about."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    for pattern in (
        ".*does not have many workers.*",
        ".*`is_gradient_checkpointing` is deprecated.*",
        ".*isinstance.*LeafSpec.*",
        ".*You have overridden `transfer_batch_to_device`.*",
        ".*args parameter is intended to run from within Python.*",
    ):
        warnings.filterwarnings("ignore", message=pattern)
