"""The command line: LightningCLI with the alternation as a group of its own, and a folder for each run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, RichProgressBar, Timer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from cotune.callbacks import Alternate
from cotune.callbacks.checkpoint import Checkpoints, whole_checkpoint
from cotune.callbacks.contradictions import FindContradictions
from cotune.callbacks.export_program import ExportProgram
from cotune.callbacks.loggers.log_program import LogProgram
from cotune.callbacks.loggers.metrics_file import MetricsFile
from cotune.callbacks.progress import TrainingBar
from cotune.callbacks.record_boundaries import RecordBoundaries
from cotune.callbacks.record_run import RecordRun
from cotune.callbacks.say_plan import SayPlan
from cotune.callbacks.stop_signals import StopOnSignal, StopSignals
from cotune.callbacks.trainer_options import check_trainer_options
from cotune.datamodules import TraceDataModule
from cotune.datamodules.splits import NAMES
from cotune.errors import MissingFileError
from cotune.fit.config_files import check_config_files
from cotune.fit.fit_checks import check_checkpoint, check_folders, check_weights
from cotune.fit.guard import guarded
from cotune.fit.help_page import wanted
from cotune.fit.option_errors import OptionError, check_option_groups, own_modules, refused_options
from cotune.fit.parse_errors import LIGHTNINGS, SEEDS
from cotune.fit.parser import Parser
from cotune.fit.processes import check_started, end_others, end_with_first, environment, is_first, start_all
from cotune.fit.roles import meter_roles, open_ledger
from cotune.fit.save_config import SaveConfig
from cotune.fit.wandb_setup import placed_loggers
from cotune.lightning_modules import LanguageModel, ProgramModule
from cotune.lightning_modules.lightning_internals import PlainCLI
from cotune.programs import Budget, BudgetSpentError, Ledger
from cotune.shipped import with_files
from cotune.storage.redact import redacted
from cotune.storage.run_folder import RunFolder, RunFolderError
from cotune.storage.run_identity import (
    ADAPTER,
    TRACES,
    RunIdentity,
    adapter_sum,
    changed_content,
    changed_options,
    counted_options,
    data_sums,
    differences,
    library_versions,
    read_identity,
    traces_sum,
)

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


class RunFinishedError(Exception):
    """The run in the folder has come to its end, and there is nothing to do."""


class CotuneCLI(PlainCLI):
    """`cotune fit | validate | test`.

    Attributes:
        first: this process holds the run's folder and writes there; others do the same work, and only read.
    """

    def __init__(self, args: ArgsType = None) -> None:
        self.first = is_first()
        if not self.first:
            end_with_first()
        self.run_folder: RunFolder | None = None
        self._scratch: TemporaryDirectory[str] | None = None  # of a fast_dev_run
        self.signals = StopSignals(first=self.first)
        self._before: RunIdentity | None = None
        args = with_files(sys.argv[1:] if args is None else args) if isinstance(args, list | None) else args
        words = args if isinstance(args, list) else []
        first = words[0] if words else ""
        if (group := wanted(words)) is not None and first in LIGHTNINGS:
            args, Parser.help_group = [first, "--help"], group
        check_config_files(words)
        self._asked = first if first in LIGHTNINGS else ""
        try:
            with self.signals, own_modules():
                self._run(args)
        except BudgetSpentError as spent:
            if self.first and self.subcommand == "fit" and self._scratch is None and self._alternate.history:
                self._end_early(spent.bound)
            raise
        finally:
            self._let_go()

    def _let_go(self) -> None:
        if hasattr(self, "trainer") and self.first:
            end_others(self.trainer, seconds=600.0 if sys.exc_info()[0] is None else 10.0)
        if self.run_folder is not None:
            self.run_folder.release()
        if hasattr(self, "model"):
            self.model.lm.close()  # it opens again where it is asked again
        if self._scratch is not None:
            self._scratch.cleanup()

    def _run(self, args: ArgsType) -> None:
        super().__init__(
            model_class=ProgramModule,
            datamodule_class=TraceDataModule,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,  # it would ask for parameters before the model is loaded
            save_config_callback=SaveConfig,
            args=args,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        # Lightning's predict would run over the test set; `cotune predict` answers new rows from an export. Each one's
        # parser takes a quarter of a second to build, so only that of the one asked for is.
        names = [name for name in LIGHTNINGS if self._asked in (name, "")]
        return {name: PlainCLI.subcommands()[name] for name in names}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        # As the base class does, with a parser that suggests.
        parser = Parser(**{**kwargs, "allow_abbrev": False})
        parser.add_argument("-c", "--config", action="config", help="a YAML file with any of these options")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str, default="run", help="of this run; its files are in <runs_dir>/<name>")
        parser.add_argument("--runs_dir", type=str, default="runs", help="folder of all runs")
        parser.add_argument("--fresh", action="store_true", help="start over; an earlier run is archived")
        parser.add_lightning_class_args(Alternate, "alternate")
        parser.add_lightning_class_args(RecordBoundaries, "record")
        parser.add_lightning_class_args(LogProgram, "log")
        parser.add_class_arguments(Budget, "budget")
        parser.set_defaults({"model.lm": "cotune.lightning_modules.LanguageModel", **_TRAINER_DEFAULTS})
        inside = {"then": {"class_path": "cotune.RandomDemoSearch"}}
        search = {"class_path": "cotune.CalibratedSearch", "init_args": inside}
        parser.set_defaults({"alternate.search": search})
        for target in ("model.seed", "data.init_args.seed", "alternate.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=int)

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if self.subcommand == "fit":
            self._check_trainer(config)
        check_option_groups(config)
        if self.subcommand == "fit":
            check_weights(config)
            check_folders(config)
        if config.get("ckpt_path") == "best" and not Path("best").exists():
            raise OptionError(
                'ckpt_path "best": checkpoints are not ranked. A finished run\'s last one holds its best prefix: give '
                "--ckpt_path last, or the path of a checkpoint."
            )
        self.run_folder = RunFolder(config.runs_dir, config.name)
        if self.subcommand == "fit":
            check_checkpoint(config, self.run_folder.path)
            self._take_folder(config)
        elif config.get("ckpt_path") == "last":
            config.ckpt_path = self._newest()
            if config.ckpt_path is None:
                folder = self.run_folder.path / "checkpoints"
                raise MissingFileError(f"{folder} holds no checkpoint; is --name {config.name} the run you mean?")
        if config.get("ckpt_path"):
            config.ckpt_path = str(whole_checkpoint(config.ckpt_path))
            config.weights_only = True  # nothing is ever unpickled
        config.trainer.default_root_dir = str(self.run_folder.path)

    def _check_trainer(self, config: Any) -> None:
        """Refuses what the trainer would do otherwise than it is asked to, before the run's folder is touched."""
        check_trainer_options(vars(config.trainer))
        check_started(config.trainer.devices, config.trainer.num_nodes)
        if config.trainer.max_time is not None:
            with refused_options():
                self.signals.max_seconds = Timer(config.trainer.max_time).time_remaining()
        if config.trainer.fast_dev_run:
            self._scratch = TemporaryDirectory(prefix="cotune-")
            config.runs_dir = self._scratch.name

    def _take_folder(self, config: Any) -> None:
        """Takes the run's folder, and finds out where the run that is in it goes on."""
        assert self.run_folder is not None
        fresh, config.fresh = config.fresh, False
        if self.first:
            self.run_folder.acquire(fresh=fresh)
        self._before = read_identity(self.run_folder.path) if self.first or not fresh else None
        self._options = counted_options(self._dumped())
        if self._before is not None:
            self._refuse(changed_options(self._before, self._options))
            if self._before.finished:
                self._check_finished()
                raise RunFinishedError(self.run_folder.path)
        if self.first and config.get("ckpt_path") in (None, "last"):
            asked, config.ckpt_path = config.get("ckpt_path"), self._newest()
            if config.ckpt_path:
                print(f"continuing {config.ckpt_path}")
            elif asked or self._before is not None:
                print("nothing saved yet: starting from the beginning")

    def _check_finished(self) -> None:
        """Data and base model must be those of the finished run; neither a trainer is made nor weights loaded."""
        config = self.config.clone()
        trainer = config[self.subcommand].trainer
        trainer["logger"], trainer["callbacks"] = False, None
        with refused_options():
            made = self.parser.instantiate(config)[self.subcommand]
        self.datamodule, self.model = made["data"], made["model"]
        self._keep_completions()
        self._check_identity()

    def _newest(self) -> str | None:
        """The newest checkpoint that is whole; says what is wrong with a newer one."""
        assert self.run_folder is not None
        checkpoint, wrong = Checkpoints(self.run_folder.path / "checkpoints").newest()
        for why in wrong:
            print(f"{why}; using the one before it.")
        return None if checkpoint is None else str(checkpoint)

    def _dumped(self) -> dict[str, Any]:
        """The options as plain data, as parsed: order and spelling in files and on the command line do not count."""
        text = self.parser.dump(self.config, skip_unset=False, format="yaml")
        return dict(yaml.safe_load(text)[self.subcommand])

    def _refuse(self, found: Sequence[str]) -> None:
        assert self.run_folder is not None
        if found:
            raise RunFolderError(
                f"{self.run_folder.path} holds a different run (then -> now): {'; '.join(found)}. Resume it "
                "unchanged, start over with --fresh (the old run is archived), or give this one another --name."
            )

    def _keep_completions(self) -> Path:
        """Where all runs beside this one keep completions; its LM does, unless it is told otherwise."""
        lm, config = self.model.lm, self.config[self.subcommand]
        completions = Path(config.runs_dir) / "completions.sqlite"
        if isinstance(lm, LanguageModel) and config.model.lm.init_args.get("completions") is None:
            lm.keep_completions(completions)
        return completions

    def after_instantiate_classes(self) -> None:
        assert self.run_folder is not None
        completions = self._keep_completions()
        budget = self.config_init[self.subcommand].get("budget") or Budget()
        fits = self.subcommand == "fit"
        ledger = open_ledger(budget, self.run_folder.path, keep=self.first) if fits else Ledger(budget)
        search = self._alternate.search
        meter_roles(self.model, self.datamodule, search, ledger, completions)

    def before_fit(self) -> None:
        """Data and base model must be those that the run was made with; a new run writes down what it is made with.

        Then the other processes of the run begin, and are told where it goes on.
        """
        self._check_identity()
        start_all(self.trainer)
        config = self.config_init["fit"]
        config["ckpt_path"] = self.trainer.strategy.broadcast(config.get("ckpt_path"))
        config["weights_only"] = True if config["ckpt_path"] else config.get("weights_only")

    def _check_identity(self) -> None:
        assert self.run_folder is not None
        data = data_sums({name: getattr(self.datamodule.splits, name) for name in NAMES})
        if self.datamodule.reused_traces:
            data[TRACES] = traces_sum(Path(self.datamodule.reused_traces))
        adapter = getattr(self.model.lm, "adapter", None)
        if adapter and (found := adapter_sum(Path(adapter))):
            data[ADAPTER] = found
        base, versions = self.model.lm.base_identity(), library_versions()
        if self._before is None:
            if self.first:
                RunIdentity(self._options, data, base, versions).write(self.run_folder.path)
            return
        self._refuse(changed_content(self._before, data=data, base=base))
        for what in [] if self._before.finished else differences(self._before.versions, versions):
            print(f"resuming with another version, so results may differ in the last bits: {what}")

    def instantiate_classes(self) -> None:
        assert self.run_folder is not None
        with (
            refused_options(),
            placed_loggers(self.config[self.subcommand], self.run_folder.path, fits=self.subcommand == "fit"),
        ):
            super().instantiate_classes()

    def set_seed(self) -> None:
        seed = self.config[self.subcommand].seed_everything
        # Of true and false Lightning would draw a seed, or set none, and the run's draws have another.
        if isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise OptionError(
                f"seed_everything {str(seed).lower()} is not allowed; allowed is {SEEDS}, from which the run can be "
                "repeated, e.g. --seed_everything 0."
            )
        super().set_seed()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand]
        chosen = config.trainer.get("logger")
        own = config.trainer.get("callbacks") or []
        callbacks = own if isinstance(own, list) else [own]
        config.trainer["enable_checkpointing"] = any(isinstance(callback, Checkpoint) for callback in callbacks)
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                # Not in checkpoints/, which holds what the run is continued from.
                callback.dirpath = str(self.run_folder.path / "model_checkpoints")  # type: ignore[union-attr]
        if config.trainer.get("plugins") is None:
            config.trainer["plugins"] = [environment()]
        config.trainer["max_time"] = None  # it counts from the trainer's first batch; `signals` counts all
        loggers = chosen if isinstance(chosen, list) else [chosen] if chosen not in (None, True, False) else []
        if self.subcommand == "fit" and chosen is not False:
            assert self.run_folder is not None
            loggers = [MetricsFile(self.run_folder.path, keep=bool(config.get("ckpt_path"))), *loggers]
        config.trainer["logger"] = loggers or False
        if config.trainer.get("enable_progress_bar") is None:  # a bar in a log file is a page of fragments
            config.trainer["enable_progress_bar"] = sys.stdout.isatty()
        trainer = super().instantiate_trainer(**kwargs)
        # A bar that speaks of the schedule's steps, in the place of Lightning's default one.
        trainer.callbacks = [  # type: ignore[attr-defined]
            TrainingBar(lambda: self._alternate.epoch_title) if type(callback) is RichProgressBar else callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
        ]
        # With what is linked to other options, the seed: an export is built again from it.
        made = yaml.safe_load(self.parser.dump(self.config, skip_link_targets=False, skip_unset=False, format="yaml"))
        model = redacted(made[self.subcommand]["model"])
        # The first of all: Alternate generates in on_fit_start, and a signal is to wait for the end of its wave.
        trainer.callbacks.insert(0, StopOnSignal(self.signals))  # type: ignore[attr-defined]
        trainer.callbacks += [FindContradictions(), SayPlan(), RecordRun(), ExportProgram(config=model)]  # type: ignore[attr-defined]
        return trainer

    @property
    def _alternate(self) -> Alternate:
        (found,) = (callback for callback in self.trainer.callbacks if isinstance(callback, Alternate))  # type: ignore[attr-defined]
        return found

    def _end_early(self, bound: str) -> None:
        """Writes what a finished run writes, of the best prefix so far; the run itself stays to be continued."""
        from cotune.reporting.closing_table import closing_table

        found = ""
        if not self._alternate.finished:  # else it was the closing test that the budget did not last for
            found = self._alternate.work.take_best_so_far(self.model)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RecordRun):
                callback.write_summary(self.trainer, self.model, ended=bound, found=found)
            elif isinstance(callback, ExportProgram):
                callback.write(self.trainer, self.model)
        closing_table(Path(self.trainer.default_root_dir))

    def after_fit(self) -> None:
        folder = Path(self.trainer.default_root_dir)
        alternate = self._alternate
        if self.datamodule.splits.test:
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        if self._scratch is not None:
            print(f"fast_dev_run: {' -> '.join(alternate.schedule)} ran to its end. Nothing of it is kept.")
            return
        if not self.first:
            return
        from cotune.reporting.closing_table import closing_table

        made = read_identity(folder)
        assert made is not None
        made.ended().write(folder)
        closing_table(folder)


def run(words: Sequence[str]) -> int:
    """Runs fit, validate or test."""

    def start() -> int:
        try:
            CotuneCLI(list(words))
        except RunFinishedError as finished:
            from cotune.reporting.closing_table import closing_table

            print(f"{finished} is finished; --fresh archives it and starts over.")
            closing_table(Path(str(finished)))
        return 0

    return guarded(start, first=is_first())
