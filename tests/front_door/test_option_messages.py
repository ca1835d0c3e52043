"""What is said of options that are wrong: the option by its whole name, the value, and where what was meant is set."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import cotune
from cotune.datamodules import Bootstrapping, Iris
from cotune.lightning_modules import LanguageModel, ProgramModule

from cotune.fit.option_errors import OptionError, check_groups, own_modules
from cotune.fit.parse_errors import explain


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("lr", "model.optimizer.lr"),
        ("model.lr", "model.optimizer.lr"),
        ("num_train_epochs", "alternate.epochs"),
        ("output_dir", "runs_dir"),
        ("threshold", "data.bootstrapping.threshold"),
        ("trainer.acc", "trainer.accelerator"),
    ],
)
def test_a_name_from_elsewhere_or_an_abbreviated_one_is_told_ours(word: str, meant: str) -> None:
    options = {"trainer.accelerator": str}
    said = explain(f"unrecognized arguments: --{word} 3", options)
    assert said == f"unknown option --{word}. Did you mean --{meant}?"


def test_one_value_for_a_group_is_told_its_options() -> None:
    options = {"model.learning_rate.warmup": int, "sizes.train": int}
    raw = 'Parser key "{}":\nUnable to load config "{}"'
    assert "The rate itself is --model.optimizer.lr" in explain(raw.format("model.learning_rate", "5e-4"), options)
    said = explain(raw.format("sizes", "100"), options)
    assert (
        said == "data.sizes 100: it is a group of options (train); give them one by one, as --data.sizes.train VALUE."
    )


def test_one_value_for_a_group_in_a_file_is_refused_too() -> None:
    with pytest.raises(OptionError, match=r"model.learning_rate 0.0005: .*The rate itself is --model.optimizer.lr"):
        check_groups(ProgramModule, {"learning_rate": 5e-4}, "model")
    with pytest.raises(OptionError, match=r"data.sizes 100: it is a group of options \(train, dev, val, test\)"):
        check_groups(Iris, {"sizes": 100, "bootstrapping": Bootstrapping()}, "data")
    with pytest.raises(OptionError, match=r"model.lm.lora 8"):
        check_groups(LanguageModel, {"lora": 8}, "model.lm")
    check_groups(Iris, {"bootstrapping": {"attempts": 2}}, "data")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\ndef broken(:\n", "mine_{}.py, line 2: invalid syntax"),
        ("x = 1\ny = 1 / 0\n", "mine_{}.py, line 2: ZeroDivisionError: division by zero"),
        ("def f():\n    return what\nf()\n", "mine_{}.py, line 2: NameError: name 'what' is not defined"),
    ],
)
def test_what_a_module_of_ones_own_raises_has_file_and_line(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"mine_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(OptionError) as error, own_modules():
        __import__(name)
    assert str(error.value).startswith(said.format(name.removeprefix("mine_")))


def test_what_cotune_or_a_library_raises_is_left_as_it_is() -> None:
    with pytest.raises(ValueError, match="epochs 0"), own_modules():
        raise ValueError("epochs 0")


def test_a_metric_that_is_none_and_a_module_that_fails_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong_metric.py").write_text("def m(e, p:\n    return 1\n")
    said = cotune(["fit", "--data", "Iris", "--data.metric", "exact_mach"], capsys)
    assert said.code == 2
    assert "there is no function" in said.err
    assert "cotune.programs.exact_match" in said.err
    said = cotune(["fit", "--data", "Iris", "--data.metric", "wrong_metric.m"], capsys)
    assert said.code == 2
    assert "wrong_metric.py, line 1" in said.err
