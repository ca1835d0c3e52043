"""Claims about the same command again: a run goes on by itself, or is refused with what has changed."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Said, cotune, fit
from cotune.callbacks import Alternate
from cotune.callbacks.step_work import StepWork
from cotune.lightning_modules import LanguageModel
from cotune.reporting.closing_table import read_history
from cotune.storage.durable import find_whole
from cotune.storage.run_folder import RunFolder

from cotune.__main__ import main

Run = Callable[..., Said]
TABLE = Path("flowers.csv")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *words: cotune(words, capsys)


class StoppedError(Exception):
    """The end of the process, as far as a test can make one."""


def stopped_at(owner: type, method: str, run: Run, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """A run that ends where this would be called."""

    def stop(*_: Any, **__: Any) -> None:
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, stop)
        with pytest.raises(StoppedError):
            run(*words)


def stopped_in_training(run: Run, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """A run that ends before its weight step does."""
    stopped_at(StepWork, "_end_weight_step", run, monkeypatch, [*words, "--alternate.save_every", "1"])


def error(said: Said) -> str:
    assert said.code == 2, said.err
    (line,) = [line for line in said.err.splitlines() if line]
    return line.removeprefix("cotune: error: ")


def history(folder: Path) -> list[tuple[Any, ...]]:
    kept = ("prefix", "val_score", "prompts", "lm_calls")
    records, damage = read_history(folder / "history.jsonl")
    assert damage == ""
    return [tuple(record[name] for name in kept) for record in records]


def test_the_same_command_again_goes_on_from_the_last_save(
    run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, finished: Any
) -> None:
    words = fit(tiny_model, "--alternate.keep", "last", "--data.bootstrapping.demo_share", "0.5")
    stopped_in_training(run, monkeypatch, words)
    # Spelled otherwise, and with what may be another.
    again = [
        *words[:3],
        "--alternate.search",
        "RandomDemoSearch",
        *words[3:-2],
        "--data.bootstrapping.demo_share=0.50",
        "--trainer.log_every_n_steps",
        "2",
    ]
    said = run(*again, "--alternate.save_every", "3")
    assert said.code == 0, said.err
    assert "continuing runs/tiny/checkpoints/last.ckpt" in said.out
    assert history(Path("runs/tiny")) == history(finished.folder)
    config = yaml.safe_load(Path("runs/tiny/config.yaml").read_text())
    assert config["ckpt_path"] is None, "another run of this config starts at its own beginning"


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_taken_and_without_any_nothing_is_loaded(
    run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = fit(tiny_model)
    stopped_in_training(run, monkeypatch, words)
    last, previous = (Path("runs/tiny/checkpoints", name) for name in ("last.ckpt", "previous.ckpt"))
    whole = {path: path.read_bytes() for path in (last, previous)}
    for path in whole:
        path.write_bytes(b"PK")
    for more in ([], ["--ckpt_path", "last"]):
        assert error(run(*words, *more)).startswith("no checkpoint is intact: runs/tiny/checkpoints/last")
    assert "previous.ckpt is not what was written" in error(run(*words, "--ckpt_path", str(previous)))
    previous.write_bytes(whole[previous])
    data = bytearray(whole[last])
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    said = run(*words)
    assert said.code == 0, said.err
    assert "runs/tiny/checkpoints/last.ckpt is not what was written" in said.out
    assert "continuing runs/tiny/checkpoints/previous.ckpt" in said.out


def test_a_finished_run_shows_its_table_and_is_not_touched(run: Run, tiny_model: Path) -> None:
    words = fit(tiny_model, schedule="p")
    first = run(*words)
    assert first.code == 0, first.err
    before = {path: path.read_bytes() for path in Path("runs/tiny").rglob("*") if path.is_file()}
    said = run(*words)
    assert said.code == 0, said.err
    assert "runs/tiny is finished; --fresh archives it and starts over." in said.out
    assert said.out.partition("finished")[2].count("test score") == 1
    assert {path: path.read_bytes() for path in Path("runs/tiny").rglob("*") if path.is_file()} == before
    again = run(*words, "--fresh")
    assert again.code == 0, again.err
    assert "the earlier run is archived as runs/tiny.old-1" in again.out
    assert Path("runs/tiny.old-1/history.jsonl").read_bytes() == before[Path("runs/tiny/history.jsonl")]
    assert history(Path("runs/tiny")) == history(Path("runs/tiny.old-1"))
    summary = json.loads(Path("runs/tiny/summary.json").read_text())
    assert summary["cached_calls"] == summary["lm_calls"] > 0, "nothing was generated twice"


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--alternate.epochs", "3"], "alternate.epochs: 2 -> 3"),
        (["--seed_everything", "5"], "seed_everything: 0 -> 5"),
        (["--alternate.schedule", "p -> w"], 'alternate.schedule: "p -> w -> p" -> "p -> w"'),
        (["--model.lm.lora.r", "3"], "model.lm.init_args.lora.r: 32 -> 3"),
        (
            ["--data.batch_size", "5", "--trainer.gradient_clip_val", "2"],
            "data.init_args.batch_size: 8 -> 5; trainer.gradient_clip_val: 1.0 -> 2",
        ),
    ],
)
def test_another_option_is_refused_by_name(more: list[str], named: str, run: Run, tiny_model: Path, once: Path) -> None:
    shutil.copytree(once / "runs", "runs")
    said = error(run(*fit(tiny_model, *more)))
    assert said == (
        f"runs/tiny holds a different run (then -> now): {named}. Resume it unchanged, start over with --fresh "
        "(the old run is archived), or give this one another --name."
    )


@pytest.fixture(scope="session")
def once(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that has begun, and no more."""
    folder = tmp_path_factory.mktemp("once")

    def stop(*_: Any, **__: Any) -> None:
        raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(Alternate, "on_fit_start", stop)
        with pytest.raises(StoppedError):
            main(fit(tiny_model))
    return folder


def test_a_run_that_had_saved_nothing_begins_again(run: Run, tiny_model: Path, once: Path) -> None:
    shutil.copytree(once / "runs", "runs")
    # Stopped again, so that it costs no whole run.
    said = run(*fit(tiny_model, "--data.metric", "tiny_fit.digest"), "--alternate.schedule", "p -> w -> p")
    assert said.code == 0, said.err
    assert "nothing saved yet: starting from the beginning" in said.out


def test_other_weights_under_the_same_name_are_refused(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    assert run(*fit(model, schedule="p")).code == 0
    moved = model.rename(tmp_path / "moved")
    shutil.rmtree("runs/tiny.old-1", ignore_errors=True)
    not_ended(Path("runs/tiny"))
    assert run(*fit(moved, schedule="p")).code == 0, "the same weights elsewhere are the same"
    not_ended(Path("runs/tiny"))
    weights = moved / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "(then -> now): base model: " in error(run(*fit(moved, schedule="p")))


def not_ended(folder: Path) -> None:
    """As if the run had been killed just before its last mark."""
    from dataclasses import replace

    from cotune.storage.run_identity import read_identity

    identity = read_identity(folder)
    assert identity is not None
    assert identity.finished
    replace(identity, finished=False).write(folder)


def test_other_data_under_the_same_name_are_refused(run: Run, tiny_model: Path) -> None:
    rows = "".join(f"{i},{'yes' if i % 3 else 'no'}\n" for i in range(30))
    TABLE.write_text("question,answer\n" + rows)
    config = Path("table.yaml")
    config.write_text(
        "model: {program: {class_path: Predict, init_args: {signature: question -> answer}}}\n"
        "data: {class_path: Table, init_args: {path: flowers.csv, inputs: [question], labels: [answer]}}\n"
    )
    words = [word if not word.endswith("iris.yaml") else str(config) for word in fit(tiny_model, schedule="p")]
    assert run(*words).code == 0
    not_ended(Path("runs/tiny"))
    TABLE.write_text("question,answer\n" + rows.replace("7,yes", "7,YES"))
    said = error(run(*words))
    assert "(then -> now): data, " in said
    assert " set: " in said


def test_a_finished_run_is_refused_too_where_its_data_or_its_base_are_others_and_loads_no_weights(
    run: Run, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    rows = "question,answer\n" + "".join(f"{i},{'yes' if i % 3 else 'no'}\n" for i in range(30))
    TABLE.write_text(rows)
    Path("table.yaml").write_text(
        "model: {program: {class_path: Predict, init_args: {signature: question -> answer}}}\n"
        "data: {class_path: Table, init_args: {path: flowers.csv, inputs: [question], labels: [answer]}}\n"
    )
    words = [word if not word.endswith("iris.yaml") else "table.yaml" for word in fit(model, schedule="p")]
    assert run(*words).code == 0

    def load(self: LanguageModel, **_: Any) -> None:
        raise StoppedError

    monkeypatch.setattr(LanguageModel, "load", load)
    assert "runs/tiny is finished" in run(*words).out
    TABLE.write_text(rows.replace("7,yes", "7,YES"))
    assert "holds a different run (then -> now): data, " in error(run(*words))
    TABLE.write_text(rows)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert "holds a different run (then -> now): base model: " in error(run(*words))


def begun(run: Run, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """A run that ends before its first score."""
    stopped_at(Alternate, "on_fit_start", run, monkeypatch, words)


def test_reused_traces_may_be_elsewhere_and_not_others(
    run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, finished: Any
) -> None:
    from datasets import load_from_disk

    shutil.copytree(finished.folder / "traces" / "step-2", "mine")
    words = fit(tiny_model, "--data.traces", "mine", schedule="w")
    begun(run, monkeypatch, words)
    Path("mine").rename("moved")
    Path("moved/cache-1.arrow").write_text("what `datasets` leaves of a look at them")
    moved = [word if word != "mine" else "moved" for word in words]
    begun(run, monkeypatch, moved)
    load_from_disk("moved").select(range(2)).save_to_disk("mine")
    assert "holds a different run (then -> now): data, traces set: " in error(run(*words))
    none = error(run(*fit(tiny_model, schedule="w")))
    assert 'holds a different run (then -> now): data.init_args.traces: "mine" -> not set' in none
    gone = [word if word != "mine" else "nowhere" for word in words]
    assert error(run(*gone)).startswith('data.traces "nowhere" holds no traces; give a folder that a run wrote')


def test_the_adapter_that_a_run_begins_from_may_be_elsewhere_and_not_another(
    run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, finished: Any
) -> None:
    shutil.copytree(finished.export / "adapter", "mine")
    words = fit(tiny_model, "--model.lm.adapter", "mine", schedule="p")
    begun(run, monkeypatch, words)
    Path("mine").rename("moved")
    moved = [word if word != "mine" else "moved" for word in words]
    assert run(*moved).code == 0
    assert "runs/tiny is finished" in run(*moved).out
    weights = Path("moved/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert "holds a different run (then -> now): the adapter that it begins from: " in error(run(*moved))


def test_a_run_that_did_not_note_its_traces_goes_on(
    run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, finished: Any
) -> None:
    from dataclasses import replace

    from cotune.storage.run_identity import read_identity

    shutil.copytree(finished.folder / "traces" / "step-2", "mine")
    words = fit(tiny_model, "--data.traces", "mine", schedule="w")
    begun(run, monkeypatch, words)
    made = read_identity(Path("runs/tiny"))
    assert made is not None
    kept = {name: digest for name, digest in made.data.items() if name != "traces"}
    assert set(made.data) - set(kept) == {"traces"}
    replace(made, data=kept).write(Path("runs/tiny"))
    begun(run, monkeypatch, words)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_fit_goes_on_from_no_checkpoint_but_its_own(
    run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitor=val/score"]
    words = [*fit(tiny_model, "--alternate.keep", "last", schedule="w"), *own]
    stopped_in_training(run, monkeypatch, words)
    (theirs,) = Path("runs/tiny/model_checkpoints").iterdir()
    last = Path("runs/tiny/checkpoints/last.ckpt")
    other = [word if word != "tiny" else "other" for word in words]
    Path("junk.ckpt").write_text("junk")
    for asked, given, said in (
        (
            words,
            theirs,
            f"--ckpt_path {theirs}: a fit continues only from its own checkpoints, which are in runs/tiny/",
        ),
        (other, last, f"--ckpt_path {last}: a fit continues only from its own checkpoints, which are in runs/other/"),
        (other, "nowhere.ckpt", "--ckpt_path nowhere.ckpt: there is no such file. Give the path of a checkpoint, or "),
        (other, "junk.ckpt", "--ckpt_path junk.ckpt: this file is no checkpoint of cotune. Give one that a run or its"),
        (words, "last", "--ckpt_path last continues the run, and --fresh starts it over: leave out one of them."),
        (words, last, f"--ckpt_path {last} continues the run, and --fresh starts it over: leave out one of them."),
    ):
        fresh = ["--fresh"] if "--fresh" in said else []
        assert error(run(*asked, "--ckpt_path", str(given), *fresh)).startswith(said)
    assert not Path("runs/other").exists()
    again = run("test", *words[1:], "--ckpt_path", "nowhere.ckpt")
    assert error(again).startswith("--ckpt_path nowhere.ckpt: there is no such file.")
    assert run("test", *words[1:], "--ckpt_path", str(theirs)).code == 0, "it may be tested"
    said = run(*words, "--ckpt_path", str(last))
    assert said.code == 0, said.err


@pytest.mark.parametrize("group", ["alternate", "record"])
def test_a_run_has_one_folder_on_the_command_line(group: str, run: Run, tiny_model: Path, once: Path) -> None:
    said = error(run(*fit(tiny_model, f"--{group}.folder", "elsewhere")))
    assert said.startswith(
        f"{group}.folder elsewhere is not allowed: on the command line all of a run is in <runs_dir>/"
    )
    assert said.endswith("and set --runs_dir and --name.")
    assert not Path("runs").exists()
    made = json.loads((once / "runs/tiny/run.json").read_text())
    assert f"{group}.folder" not in made["options"], "a run that had one goes on without"


def test_a_damaged_identity_is_refused(run: Run, tiny_model: Path, once: Path) -> None:
    shutil.copytree(once / "runs", "runs")
    path = Path("runs/tiny/run.json")
    path.write_text(path.read_text().replace('"alternate.epochs": 2', '"alternate.epochs": 9'))
    assert "runs/tiny/run.json is not what was written (its SHA-256 differs). So cotune cannot tell" in error(
        run(*fit(tiny_model))
    )


def test_a_damaged_history_is_shown_as_far_as_it_can_be_read(run: Run, tiny_model: Path, finished: Any) -> None:
    words = fit(tiny_model, "--alternate.keep", "last", "--data.bootstrapping.demo_share", "0.5")
    shutil.copytree(finished.folder.parent, "runs")
    path = Path("runs/tiny/history.jsonl")
    path.write_bytes(path.read_bytes()[:-30])
    said = run(*words)
    assert said.code == 0
    assert "history.jsonl is not what was written" in said.out
    assert "Shown are 3 of 4 records" in said.out
    path.with_name("summary.json").write_text("{}")
    assert error(run(*words)).startswith("runs/tiny/summary.json is not what was written")


def test_all_that_a_run_is_continued_from_is_listed(finished: Any) -> None:
    for name in ("run.json", "config.yaml", "history.jsonl", "summary.json", "checkpoints/last.ckpt"):
        assert find_whole(finished.folder / name) == (finished.folder / name, ""), name
    assert not list(finished.folder.rglob("*.partial"))


def test_a_lock_left_by_another_machine_is_taken_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder("runs", "mine")
    folder.path.mkdir(parents=True)
    (folder.path / ".lock").write_text("process 7 on elsewhere (boot 1234)")
    folder.acquire()
    assert "was last used by process 7 on elsewhere (boot 1234), which no longer locks it." in capsys.readouterr().out
    assert f" on {socket.gethostname()}" in (folder.path / ".lock").read_text()
    folder.release()
    again = RunFolder("runs", "mine")
    again.acquire()
    again.release()
    assert capsys.readouterr().out == ""


def test_completions_can_be_kept_elsewhere_or_not_at_all(run: Run, tiny_model: Path, finished: Any) -> None:
    assert (finished.folder.parent / "completions.sqlite").is_file()
    for value, exists in (("off", False), ("mine.sqlite", True)):
        shutil.rmtree("runs", ignore_errors=True)
        assert run(*fit(tiny_model, "--model.lm.completions", value, schedule="p")).code == 0
        assert not Path("runs/completions.sqlite").exists()
        assert Path("mine.sqlite").exists() == exists


def test_a_key_among_the_options_is_in_no_file_of_the_run(
    run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("own_lm.py").write_text(
        "from tiny_fit import CurtLM\n\n\nclass KeyedLM(CurtLM):\n"
        "    def __init__(self, *args, api_key: str = '', **kwargs):\n        super().__init__(*args, **kwargs)\n"
    )
    monkeypatch.setenv("OTHER_API_KEY", "canary-in-the-environment")
    words = [word if word != "tiny_fit.CurtLM" else "own_lm.KeyedLM" for word in fit(tiny_model, schedule="w")]
    words += ["--model.lm.api_key", "canary-among-the-options"]
    monkeypatch.setattr("sys.argv", ["cotune", *words])
    said = run(*words)
    assert said.code == 0, said.err
    files = [path for path in Path().rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert Path("runs/tiny/export/program.json") in files
    assert not [path for path in files if b"canary" in path.read_bytes()]
    assert "***" in Path("runs/tiny/config.yaml").read_text()
    not_ended(Path("runs/tiny"))
    assert run(*words[:-1], "another-key").code == 0, "a new key is no new run"
