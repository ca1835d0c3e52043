"""The table of Trainer options: it names all of them, and each does what its row says, on a tiny fit."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from commands import cotune, fit
from cotune.callbacks.alternate import UnfinishedError
from cotune.callbacks.trainer_options import LOGGED, TRAINER_OPTIONS, TrainerOptionError, check_trainer_options, page
from cotune.datamodules import Sizes
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    Timer,
)
from lightning.pytorch.plugins.environments import LightningEnvironment
from tiny_fit import StopsAtOnce, tiny_fit

from cotune.__main__ import main

WORKS: dict[str, dict[str, Any]] = {
    "where and how it runs": {
        "accelerator": "cpu",
        "strategy": "auto",
        "devices": "1",
        "num_nodes": 1,
        "plugins": [LightningEnvironment()],
        "deterministic": True,
        "benchmark": False,
        "inference_mode": False,
    },
    "what is logged, and what is irrelevant": {
        "logger": False,
        "log_every_n_steps": 5,
        "num_sanity_val_steps": 1,
        "check_val_every_n_epoch": 2,
        "enable_progress_bar": True,
        "enable_model_summary": True,
        "profiler": "simple",
        "enable_autolog_hparams": False,
        # irrelevant, and harmless
        "limit_predict_batches": 1,
        "enable_checkpointing": True,
        "use_distributed_sampler": False,
        "sync_batchnorm": True,
        "model_registry": "none",
    },
    "an optimiser step": {
        "precision": "bf16-mixed",
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,
        "gradient_clip_algorithm": "value",
        "detect_anomaly": True,
    },
    "limit_train_batches": {"limit_train_batches": 1},
}
"""Trainer arguments that are tried together. `default_root_dir` goes with each;
`callbacks`, `fast_dev_run` and `max_time` have tests of their own."""

REFUSED: dict[str, str] = {
    "max_epochs": "3",
    "min_epochs": "3",
    "max_steps": "1",
    "min_steps": "1",
    "limit_val_batches": "2",
    "limit_test_batches": "2",
    "overfit_batches": "1",
    "val_check_interval": "50",
    "barebones": "true",
    "reload_dataloaders_every_n_epochs": "2",
    # rows that work, with values that do not
    "accelerator": "tpu",
    "strategy": "fsdp",
    "precision": "bf16-true",
    "limit_train_batches": "0",
    "callbacks": "StochasticWeightAveraging",
    "accumulate_grad_batches": "0",
    "check_val_every_n_epoch": "0",
}


@pytest.fixture
def usual_torch() -> Iterator[None]:
    """`deterministic` and `detect_anomaly` are settings of the whole process."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.autograd.set_detect_anomaly(False)


def test_the_table_has_a_row_for_each_argument_of_the_trainer() -> None:
    assert list(TRAINER_OPTIONS) == list(inspect.signature(Trainer.__init__).parameters)[1:]


def test_each_row_is_tried() -> None:
    of = {verdict: {n for n, o in TRAINER_OPTIONS.items() if o.verdict == verdict} for verdict in ("works", "refused")}
    irrelevant = set(TRAINER_OPTIONS) - of["works"] - of["refused"]
    tried = {option for together in WORKS.values() for option in together}
    assert of["works"] | irrelevant == {*tried, "default_root_dir", "callbacks", "fast_dev_run", "max_time"}
    assert of["refused"] <= set(REFUSED)


def test_the_page_says_what_the_table_says() -> None:
    written = Path(__file__).resolve().parents[2] / "docs" / "trainer-options.md"
    assert written.read_text(encoding="utf-8") == page()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WORKS)
def test_what_works_runs_to_the_end_of_the_schedule(
    name: str, tiny_model: Path, tmp_path: Path, usual_torch: None
) -> None:
    sizes = Sizes(train=6, dev=2, val=3, test=2)
    run = tiny_fit(tiny_model, tmp_path, "w", sizes=sizes, trainer=WORKS[name], metric=lambda *_: 1.0).run()
    assert run.alternate.finished
    assert run.trainer.global_step > 0


@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_ddp_with_one_process_is_the_run_without_it(tiny_model: Path, tmp_path: Path) -> None:
    sizes = Sizes(train=6, dev=2, val=3, test=2)
    alone = tiny_fit(tiny_model, tmp_path / "alone", "w", sizes=sizes, metric=lambda *_: 1.0).run()
    with mock.patch.dict(os.environ):
        ddp = tiny_fit(
            tiny_model, tmp_path / "ddp", "w", sizes=sizes, metric=lambda *_: 1.0, trainer={"strategy": "ddp"}
        )
        try:
            ddp.run()
        finally:
            torch.distributed.destroy_process_group()
    assert ddp.alternate.finished
    assert ddp.lm.fingerprint() == alone.lm.fingerprint()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_said_in_one_line(name: str) -> None:
    with pytest.raises(TrainerOptionError) as error:
        check_trainer_options({name: yaml.safe_load(REFUSED[name])})
    assert f"trainer.{name}" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["max_epochs", "callbacks"])
def test_on_the_command_line_it_is_refused_before_anything_is_touched(
    name: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    extra = ("--trainer.callbacks.swa_lrs=0.1",) if name == "callbacks" else ()
    said = cotune(fit(tiny_model, f"--trainer.{name}={REFUSED[name]}", *extra), capsys)
    assert said.code == 2
    lines = [line for line in said.err.splitlines() if line.startswith("cotune: error: ")]
    assert len(lines) == 1
    assert f"trainer.{name}" in lines[0]
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_steps": 1}, "trainer.max_steps 1.*alternate.epochs"),
        ({"overfit_batches": 1}, "trainer.overfit_batches 1.*data.sizes.train"),
        ({"val_check_interval": 50}, "trainer.val_check_interval 50.*check_val_every_n_epoch"),
        ({"accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches 0.*1 or more"),
        ({"check_val_every_n_epoch": 0}, "trainer.check_val_every_n_epoch 0.*1 or more"),
        ({"max_time": "00:01:00:00"}, "trainer.callbacks: Timer: use trainer.max_time"),
    ],
)
def test_from_python_it_is_refused_before_the_model_is_loaded(
    changes: dict[str, Any], said: str, tiny_model: Path, tmp_path: Path
) -> None:
    run = tiny_fit(tiny_model, tmp_path, trainer=changes)
    with pytest.raises(TrainerOptionError, match=said):
        run.run()
    assert run.lm.model is None


def test_values_that_are_none_are_lightnings_own() -> None:
    check_trainer_options(dict.fromkeys(TRAINER_OPTIONS))
    check_trainer_options({"callbacks": [EarlyStopping("val/score"), ModelCheckpoint()], "devices": [0]})
    with pytest.raises(TrainerOptionError, match="Timer"):
        check_trainer_options({"callbacks": Timer("00:00:01:00")})


def test_a_callback_that_monitors_what_nothing_logs_is_refused_unless_code_of_ones_own_may_log_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    wrong = EarlyStopping("val_loss")
    said = "EarlyStopping monitors val_loss, which is not logged; logged are train/loss, .*, val/score"
    run = tiny_fit(tiny_model, tmp_path, callbacks=[wrong])
    with pytest.raises(TrainerOptionError, match=said):
        run.run()
    assert run.lm.model is None
    with pytest.raises(TrainerOptionError, match=r"ModelCheckpoint monitors val/score, .* train/skipped_steps\.$"):
        check_trainer_options({"callbacks": [ModelCheckpoint(monitor="val/score")], "limit_val_batches": 0})
    for name in LOGGED:
        check_trainer_options({"callbacks": EarlyStopping(name)})
    check_trainer_options({"callbacks": [wrong, StopsAtOnce()]})
    check_trainer_options({"callbacks": EarlyStopping("val_loss", strict=False)})


@pytest.mark.parametrize("callback", [LearningRateMonitor(), DeviceStatsMonitor()])
def test_a_callback_that_has_nowhere_to_log_is_refused_before_the_model_is_loaded(
    callback: Callback, tiny_model: Path, tmp_path: Path
) -> None:
    said = (
        f"trainer.logger false: {type(callback).__name__} in trainer.callbacks has nowhere to log. Leave out --trainer"
    )
    with pytest.raises(TrainerOptionError, match=said):
        check_trainer_options({"logger": False, "callbacks": callback})
    check_trainer_options({"logger": None, "callbacks": callback})
    run = tiny_fit(tiny_model, tmp_path, callbacks=[callback])
    with pytest.raises(TrainerOptionError, match=said):
        run.run()
    assert run.lm.model is None


def test_batches_are_accumulated_by_one_number_for_all_epochs() -> None:
    said = "GradientAccumulationScheduler: use trainer.accumulate_grad_batches"
    with pytest.raises(TrainerOptionError, match=said):
        check_trainer_options({"callbacks": [GradientAccumulationScheduler({0: 1, 1: 3})]})


@pytest.mark.parametrize(("schedule", "share", "steps"), [("w", 0.001, 2), ("w", 0.5, 4), ("p", 0.5, 0)])
def test_a_share_of_the_batches_is_one_at_least_and_needs_none_where_nothing_is_trained(
    schedule: str, share: float, steps: int, tiny_model: Path, tmp_path: Path
) -> None:
    limited = {"limit_train_batches": share}
    run = tiny_fit(tiny_model, tmp_path, schedule, trainer=limited, metric=lambda *_: 1.0).run()
    assert run.alternate.finished
    assert run.trainer.global_step == steps
    assert run.module.optimiser_step == run.module.optimiser_steps * bool(steps)


# What the command line makes of some


@pytest.fixture
def small(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A short fit's words, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return fit(tiny_model, "--alternate.epochs", "1", schedule="w")


def test_fast_dev_run_walks_the_schedule_and_keeps_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = cotune(fit(tiny_model, "--trainer.fast_dev_run=true", schedule="w -> p -> w"), capsys)
    assert said.code == 0, said.err
    assert "fast_dev_run: w -> p -> w ran to its end. Nothing of it is kept." in said.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("batches", "score"), [(2, 1.0), (1, 0.0)])
def test_fast_dev_run_trains_on_its_batches_in_every_weight_step(
    batches: int, score: float, tiny_model: Path, tmp_path: Path
) -> None:
    """Also where no run passes."""
    fast = {"fast_dev_run": batches}
    run = tiny_fit(tiny_model, tmp_path, "w -> p -> w", trainer=fast, metric=lambda *_: score).run()
    assert run.alternate.finished
    assert run.trainer.global_step == 2 * batches
    assert list(tmp_path.iterdir()) == []


def test_from_python_too_an_unfinished_fit_ends_with_an_error(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UnfinishedError, match=r"ended in step 2 of 3 \(p -> w -> p\)"):
        tiny_fit(tiny_model, tmp_path, callbacks=[StopsAtOnce()]).run()


def test_a_schedulers_variables_in_an_interactive_shell_do_no_harm(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"JOB_ID": "1", "NTASKS": "4", "JOB_NAME": "train", "LOCALID": "0", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert cotune(small, capsys).code == 0
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert "srun has started this command 4 times" in cotune([*small, "--fresh"], capsys).err


def test_a_users_model_checkpoint_saves_beside_the_runs_own(small: list[str]) -> None:
    own = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitor=val/score"]
    assert main([*small, *own]) == 0
    assert len(list(Path("runs/tiny/model_checkpoints").glob("*.ckpt"))) == 1
    assert {path.name for path in Path("runs/tiny/checkpoints").iterdir()} <= {
        "last.ckpt",
        "previous.ckpt",
        "SHA256SUMS",
    }


def test_a_callback_without_its_metric_is_refused_before_anything_is_touched(
    small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = cotune([*small, "--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val_loss"], capsys)
    assert said.code == 2
    assert "trainer.callbacks: EarlyStopping monitors val_loss, which is not logged" in said.err
    assert not Path("runs").exists()


def test_a_run_whose_time_is_over_goes_on_with_more(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    first = cotune([*small, "--trainer.max_time=00:00:00:00"], capsys)
    assert first.code == 143
    assert "trainer.max_time is over" in first.err
    assert not Path("runs/tiny/summary.json").exists()
    assert cotune([*small, "--trainer.max_time=00:01:00:00"], capsys).code == 0
    assert Path("runs/tiny/summary.json").is_file()


def test_a_fit_that_something_else_ends_is_no_finished_run(
    small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = cotune([*small, "--trainer.callbacks=tiny_fit.StopsAtOnce"], capsys)
    assert said.code == 2
    assert "the fit ended in step 1 of 1 (w), because something outside the schedule stopped the trainer" in said.err
    assert not Path("runs/tiny/summary.json").exists()
    assert not Path("runs/tiny/export").exists()


def test_an_abbreviated_option_is_a_typo(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = cotune([*small, "--alternate.epoch", "2"], capsys)
    assert said.code == 2
    assert "unknown option --alternate.epoch. Did you mean --alternate.epochs?" in said.err
