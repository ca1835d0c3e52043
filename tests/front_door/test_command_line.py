"""Claims about the command line: what it takes, and that what is wrong is said in one message."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from commands import ROOT, Said, cotune, fit, tiny

from cotune.fit.help_page import wanted
from cotune.fit.parse_errors import OWN_COMMANDS

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
IRIS = str(ROOT / "configs" / "iris.yaml")
Run = Callable[..., Said]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *words: cotune(words, capsys)


def one_error(said: Said, code: int = 2) -> str:
    """The message of a command that ended with exactly one, and no traceback."""
    assert said.code == code, said.err
    assert "Traceback" not in said.err
    (line,) = [line for line in said.err.splitlines() if line]
    assert line.startswith("cotune: error: ")
    return line.removeprefix("cotune: error: ")


# Help and configs


def test_help_comes_without_the_heavy_libraries() -> None:
    script = (
        "import sys\nfrom cotune.__main__ import main\n"
        "for words in map(str.split, sys.argv[1:]):\n    print('\\f')\n"
        "    try:\n        main(words)\n    except SystemExit as stop:\n        assert not stop.code\n"
        "    assert not {'torch', 'lightning', 'transformers'} & set(sys.modules), words"
    )
    lines = ["", "--version", *(f"{name} --help" for name in ("", "fit", *OWN_COMMANDS))]
    done = subprocess.run([sys.executable, "-c", script, *lines], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = done.stdout.split("\f")[1:]
    assert len(pages) == len(lines)
    assert all("cotune" in page for page in pages)


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_the_help_is_one_screen_first_and_all_of_it_has_the_default_classes_options(run: Run, command: str) -> None:
    first, said = run(command, "--help"), run(command, "--help=all")
    assert first.code == said.code == 0, said.err
    assert len(first.out.splitlines()) <= 40
    assert max(map(len, first.out.splitlines())) <= 120
    for page in (first.out, said.out):
        assert page.startswith(f"usage: cotune {command} --config FILE")
    heads = [line for line in said.out.splitlines() if re.match(r"\S.*:$", line)]
    assert heads[0] == "options:"
    assert heads[-1] == "Lightning's trainer:"
    assert len(set(heads)) == len(heads)
    # All that the README and docs/data.md show, and nothing twice.
    for option in ("name", "alternate.search.then.racing", "model.lm.quantization", "data.bootstrapping.hints", "data"):
        assert len(re.findall(rf"^  --{option}[ ,]", said.out, re.MULTILINE)) == 1, option
    assert "--weights_only" not in said.out
    known = {*re.findall(r"^  --([\w.]+)", said.out, re.MULTILINE), "config", "data.path", "model.optimizer.lr"}
    assert set(re.findall(r"^  (?:-c, )?--([\w.]+)", first.out, re.MULTILINE)) <= known


def test_a_group_of_options_has_a_help_of_its_own(run: Run) -> None:
    for word in ("--help=search", "--help=record"):
        options = re.findall(r"^  --([\w.]+)", run("fit", word).out, re.MULTILINE)
        start = {"--help=search": "alternate.search", "--help=record": "record"}[word]
        assert options
        assert all(option.startswith(start) for option in options)
    assert run("fit", "--record.help").out == run("fit", "--help=record").out
    assert wanted(["fit", "--search.help"]) == "search"
    assert wanted(["fit", "--data.help", "Iris"]) is None
    assert one_error(run("fit", "--help=lora")).startswith('there is no group "lora" of options; write all or one of')


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a matter of glibc")
@pytest.mark.parametrize(("user_set", "new_pages"), [({}, False), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, True)])
def test_a_large_array_is_made_in_memory_that_was_freed(user_set: dict[str, str], new_pages: bool) -> None:
    script = (
        "import resource\nfrom cotune.__main__ import _keep_freed_memory\n_keep_freed_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "make = lambda: bytes(1) * (1536 * 4096)\nfor _ in range(5): make()\n"
        "before = faults()\nfor _ in range(20): make()\nprint(faults() - before)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | user_set
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 10_000) is new_pages, f"{done.stdout} page faults; each product is 1,536 pages"


def test_the_package_offers_its_names_without_importing_them() -> None:
    script = (
        "import sys, cotune\nassert 'torch' not in sys.modules\nfrom cotune import Program, Stage, Signature\n"
        "assert 'torch' not in sys.modules\nassert set(cotune.__all__) <= set(dir(cotune))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_public_name_is_there() -> None:
    import cotune

    assert all(getattr(cotune, name) is not None for name in cotune.__all__)
    assert callable(cotune.load)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = cotune.lod


def test_a_printed_config_is_read_back_as_the_same(run: Run) -> None:
    first = run("fit", "--config", "iris", "--print_config")  # a shipped config goes by its name
    assert first.code == 0, first.err
    Path("printed.yaml").write_text(first.out)
    assert yaml.safe_load(first.out)["alternate"]["schedule"] == "p -> w -> p"
    assert run("fit", "--config", "printed.yaml", "--print_config").out == first.out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses(run: Run, path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("#"), "the first line says hardware, time and score"
    # One that is laid over a task says how.
    files = re.findall(r"--config (\S+)", first) or [f"configs/{path.name}"]
    assert f"configs/{path.name}" in files
    said = run("fit", *(word for file in files for word in ("--config", str(ROOT / file))), "--print_config")
    assert said.code == 0, said.err


def test_null_can_be_typed_for_an_option_of_nested_settings(run: Run) -> None:
    said = run("fit", "--config", IRIS, "--data.bootstrapping.teacher", "null", "--print_config")
    assert said.code == 0, said.err
    assert yaml.safe_load(said.out)["data"]["init_args"]["bootstrapping"]["teacher"] is None


def test_classes_go_by_their_short_names(run: Run) -> None:
    words = ("--data", "Iris", "--alternate.search", "RandomDemoSearch", "--alternate.search.num_candidates", "2")
    said = run("fit", "--config", IRIS, *words, "--trainer.logger", "WandbLogger", "--print_config")
    assert said.code == 0, said.err
    config = yaml.safe_load(said.out)
    assert config["alternate"]["search"]["init_args"]["num_candidates"] == 2
    assert config["trainer"]["logger"]["class_path"] == "lightning.pytorch.loggers.WandbLogger"


# Typos


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--alternate.shedule", "p -> w"], "unknown option --alternate.shedule. Did you mean --alternate.schedule?"),
        (["--modle.lm.model", "x"], "unknown option --modle.lm.model. Did you mean --model.lm.model?"),
        (["--alternate.search.num_candidats", "3"], '"num_candidats". Did you mean then.num_candidates?'),
        (["--model.lm.lora.alfa", "3"], "unknown option --lora.alfa. Did you mean --lora.alpha?"),
        (["--alternate.sched", "p"], "unknown option --alternate.sched. Did you mean --alternate.schedule?"),
        (["stray"], '"stray" is no option; options begin with --'),
        (["--alternate.keep", "bst"], "alternate.keep: 'bst' is not allowed; allowed is best or last."),
        (["--alternate.epochs", "many"], "alternate.epochs: 'many' is not allowed; allowed is a whole number."),
        (["--model.lm.quantization", "nf5"], "'nf5' is not allowed; allowed is nf4 or fp4 or int8 or null."),
        (
            ["--alternate.search", "RandomDemoSerch"],
            'alternate.search: there is no class "RandomDemoSerch"; known are CalibratedSearch, FormSearch, Joint',
        ),
        (["--data", "Irs"], 'data: there is no class "Irs"; known are Banking77'),
        (["--trainer.logger", "WandbLoger"], "Did you mean WandbLogger?"),
        (["--model.form", "tiny_fit.Fit"], "model.form"),
        (["--model.template", "Lines"], "unknown option --model.template. Did you mean --model.form?"),
        (["--data.metric", "no_module.metric"], "No module named 'no_module'"),
    ],
)
def test_a_typo_on_the_command_line_is_named_with_the_nearest_right(run: Run, words: list[str], named: str) -> None:
    assert named in one_error(run("fit", "--config", IRIS, *words))


@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ("schedule:", "shedule:", 'unknown option "alternate.shedule". Did you mean alternate.schedule?'),
        ("max_new_tokens:", "max_new_token:", "Did you mean model.sampling.max_new_tokens?"),
        ("signature:", "signatur:", "Did you mean"),
        ("alternate:", "alternat:", "Did you mean alternate"),
        ("cotune.programs.Predict", "cotune.programs.Predct", "Did you mean Predict?"),
        ("cotune.programs.Predict", "my_program.Mine", "module.Class"),
        ("schedule: p", "schedule: [p", "line"),
        ("class_path: cotune.datamodules.Iris", "class_pth: Iris", "name the class in class_path, one of Banking77"),
    ],
)
def test_a_typo_in_a_config_is_named_with_the_nearest_right(run: Run, right: str, wrong: str, named: str) -> None:
    text = Path(IRIS).read_text()
    assert right in text
    Path("typo.yaml").write_text(text.replace(right, wrong))
    assert named in one_error(run("fit", "--config", "typo.yaml"))


def test_an_unknown_command_is_named(run: Run) -> None:
    message = one_error(run("fti"))
    assert message == f'unknown command "fti"; commands are fit, validate, test, {", ".join(OWN_COMMANDS)}.'


def test_a_config_that_is_missing_is_named(run: Run) -> None:
    message = one_error(run("fit", "--config", "nowhere.yaml"))
    nowhere = f"there is no such file in {Path.cwd()}, and none that cotune configs lists."
    assert message == f'--config "nowhere.yaml": {nowhere}'
    assert one_error(run("fit", "--config", "irs")) == f'--config "irs": {nowhere} Did you mean iris?'
    Path("task.yaml").write_text("name: mine\n")
    assert one_error(run("fit", "--config", "tsk.yaml")).endswith("Did you mean task.yaml?")
    assert one_error(run("fit", "--config", "/no/where.yaml")) == '--config "/no/where.yaml": there is no such file.'
    assert one_error(run("fit")) == "missing: model.program, data. Give them in a file, --config FILE, or as options."


def test_a_variable_that_nothing_reads_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTUNE_SCHEDULE", "p")
    assert "COTUNE_SCHEDULE: cotune reads no such environment variable, only COTUNE_CACHE" in run("fti").err


# What only shows when a run starts


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("seed_everything", "-1", "seed_everything -1 is not allowed; allowed is a whole number from 0 to 4294967295"),
        (
            "trainer.max_steps",
            "-5",
            "trainer.max_steps -5 does not work here: alternate.epochs",
        ),
        ("trainer.accelerator", "abacus", "trainer.accelerator abacus does not work here: cpu, gpu, cuda, mps or auto"),
        ("data.bootstrapping.threshold", "0.0", "threshold 0.0 is outside (0, 1]; at 0 a failed run would count"),
        ("alternate.search.max_demos", "0", "max_demos 0 is below 1"),
        ("ckpt_path", "best", "A finished run's last one holds its best prefix: give --ckpt_path last"),
        ("model.lm.dtype", "null", 'dtype "None" is none of float32, bfloat16, float16.'),
        ("model.program.signature", "two\nlines", 'signature "two lines" has 0 arrows.'),
    ],
)
def test_a_value_that_its_owner_refuses_is_one_line(
    run: Run, tiny_model: Path, option: str, value: str, said: str
) -> None:
    assert said in one_error(run(*fit(tiny_model), f"--{option}={value}"))


@pytest.mark.parametrize("signature", ["a -> b: float", "a: int, c -> b: Literal['x', 'y']", "a -> b"])
def test_a_signature_with_types_can_be_typed_as_it_is(run: Run, tiny_model: Path, signature: str) -> None:
    made = run(*fit(tiny_model), f"--model.program.signature={signature}", "--print_config")
    assert yaml.safe_load(made.out)["model"]["program"]["init_args"]["signature"] == signature


def test_a_hub_that_does_not_answer_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    from cotune.fit.guard import _retries_said_once

    log = logging.getLogger("a test's Hub client")
    log.addFilter(_retries_said_once())
    for attempt in (1, 2):
        log.warning("'[Errno -2] Name or service not known' thrown while requesting HEAD https://huggingface.co/x")
        log.warning(f"Retrying in {attempt}s [Retry {attempt}/5].")
    log.warning("something else")
    said = [record.getMessage() for record in caplog.records]
    assert said == ["cotune: the Hub does not answer; trying for about half a minute", "something else"]


def test_a_class_that_lacks_its_package_says_which(run: Run, tiny_model: Path) -> None:
    message = one_error(run(*fit(tiny_model, "--trainer.logger", "MLFlowLogger")))
    assert message.startswith("Requirement 'mlflow")
    assert "pip install" in message


def test_an_unknown_step_is_named_before_anything_is_loaded(run: Run, tiny_model: Path) -> None:
    message = one_error(run(*fit(tiny_model, schedule="p -> x")))
    assert message == (
        'schedule "p -> x": unknown step "x". '
        'Steps are "p" (prompts) and "w", "d", "k", "g" (weights), e.g. "p -> w -> p".'
    )


def test_a_model_that_is_not_there_is_named(run: Run, tiny_model: Path) -> None:
    message = one_error(run(*fit(tiny_model, "--model.lm.model", "./models/mine")))
    assert message.startswith('model "./models/mine": there is no such folder or .gguf file. Give "embedded"')


TABLE = """
model:
  program: {class_path: Predict, init_args: {signature: question -> answer}}
data:
  class_path: Table
  init_args: {path: rows.csv, inputs: [question], labels: [answer], sizes: {train: 1, dev: 1, val: 1, test: 0}}
"""


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ("question\n1\n2\n3\n", "rows.csv, row 1: field 'answer' is missing; the row has 'question'. (3 of 3 rows"),
        ("question,answer\n1,2\n2,\n3,4\n", "rows.csv, row 2: field 'answer' is empty; a label is what the metric"),
        ("question,answer\n1,2\n2\n3,4\n", "rows.csv, row 2: it has 1 cells, the header 2"),
        ("question,answer\n1,2\n", "too few examples: 1 in"),
    ],
)
def test_a_bad_row_is_named_with_its_field(run: Run, tiny_model: Path, rows: str, named: str) -> None:
    Path("rows.csv").write_text(rows)
    Path("table.yaml").write_text(TABLE)
    assert named in one_error(run("fit", "--config", "table.yaml", *tiny(tiny_model)))


def own_metrics() -> None:
    Path("own_metrics.py").write_text(
        # It looks for what labels do not have, so that it cannot be asked whether it would pass them.
        "def never(example, prediction):\n    return 0.0 * len(prediction.get('confidence', ''))\n\n\n"
        "def broken(example, prediction):\n    return prediction['answr'] == example.labels['answer']\n"
    )


def test_a_metric_that_raises_ends_the_run_with_what_it_raised(run: Run, tiny_model: Path) -> None:
    own_metrics()
    message = one_error(run(*fit(tiny_model, "--data.metric", "own_metrics.broken")))
    assert "the metric failed on 8 of 8 examples, more than max_error_rate 0.5 allows." in message
    assert 'there is no value "answr"; there are answer' in message


def test_a_program_that_never_succeeds_is_told_what_to_change(run: Run, tiny_model: Path) -> None:
    own_metrics()
    message = one_error(run(*fit(tiny_model, "--data.metric", "own_metrics.never", schedule="w")), 3)
    assert message.startswith("weight step: no run reached a score of 1, so there is nothing to train on: 0 of 12")
    assert "Raise data.bootstrapping.attempts (now 2)" in message
    assert "set data.bootstrapping.gold_answers, or put a prompt step first" in message  # its stage writes the label


def test_a_program_that_never_succeeds_can_train_on_its_gold_answers(run: Run, tiny_model: Path) -> None:
    own_metrics()
    options = ["--data.metric", "own_metrics.never", "--data.bootstrapping.gold_answers", "true"]
    done = run(*fit(tiny_model, *options, schedule="w"))
    assert done.code == 0, done.err
    assert ", 12 more with their gold answer" in done.out


def test_a_bug_of_ours_keeps_its_traceback(run: Run, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("cotune.fit.cli.RunFolder.acquire", broken)
    with pytest.raises(KeyError):
        run(*fit(tiny_model))


# Run folders


def test_a_folder_in_use_is_refused_and_says_by_whom(run: Run, tiny_model: Path) -> None:
    hold = (
        "import sys; from cotune.storage.run_folder import RunFolder\n"
        "folder = RunFolder('runs', 'tiny'); folder.acquire(); print('held', flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for more in ([], ["--fresh"], ["--ckpt_path", "last"]):
            message = one_error(run(*fit(tiny_model, *more)))
            assert message.startswith(f"runs/tiny is in use by process {holder.pid} on ")
            assert message.endswith("Wait for it, or give another --name.")
        holder.communicate("")
    assert not list(Path("runs").glob("*.old-*"))


def test_a_run_is_tested_again_from_its_own_config(run: Run, finished: Any) -> None:
    config = finished.folder / "config.yaml"
    before = config.read_text()
    said = run("test", "--config", str(config), "--ckpt_path", "last", "--data.val_batch_size", "3")
    assert said.code == 0, said.err
    assert "test/score" in said.out
    assert config.read_text() == before, "it still says what the run was made with"


@pytest.mark.parametrize("name", ["../elsewhere", "", "a b", ".hidden"])
def test_a_run_name_is_a_folder_name(run: Run, tiny_model: Path, name: str) -> None:
    assert f'run name "{name}" is not usable' in one_error(run(*fit(tiny_model, name=name)))


# Seeds, loggers, secrets


def test_one_seed_reaches_model_data_and_alternate(run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cotune.fit.cli import CotuneCLI

    monkeypatch.setattr(CotuneCLI, "_run_subcommand", lambda self, name: made.append(self))
    made: list[CotuneCLI] = []
    assert run(*fit(tiny_model, "--seed_everything", "3")).code == 0
    (cli,) = made
    (alternate,) = [c for c in cli.trainer.callbacks if type(c).__name__ == "Alternate"]
    assert (cli.model.seed, cli.datamodule.seed, alternate.options.seed) == (3, 3, 3)


@pytest.mark.parametrize("value", ["true", "false", "-1", "4294967296"])
def test_a_seed_is_a_number(value: str, run: Run, tiny_model: Path) -> None:
    said = one_error(run(*fit(tiny_model, f"--seed_everything={value}")))
    assert f"seed_everything {value} is not allowed; allowed is a whole number from 0 to 4294967295" in said
    assert not Path("runs").exists()


@pytest.mark.parametrize("value", ["1.5", "abc", "null"])
def test_what_is_no_seed_is_told_what_a_seed_is(value: str, run: Run, tiny_model: Path) -> None:
    said = one_error(run(*fit(tiny_model, "--seed_everything", value)))
    assert said.startswith("seed_everything: ")
    assert said.endswith(" is not allowed; allowed is a whole number from 0 to 4294967295.")


def test_the_key_of_a_logger_is_in_no_file_of_the_run(
    run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-123")
    monkeypatch.setenv("WANDB_MODE", "offline")
    said = run(*fit(tiny_model, "--trainer.logger", "WandbLogger", schedule="w"))
    wandb.finish()
    assert said.code == 0, said.err
    assert list(Path("runs/tiny/wandb").glob("offline-run-*"))
    files = [path for path in Path().rglob("*") if path.is_file()]
    assert Path("runs/tiny/config.yaml") in files
    assert not [path for path in files if b"canary-123" in path.read_bytes()]


def test_own_modules_are_found_in_the_working_folder(run: Run) -> None:
    """From a shell, too: tests/docs/test_your_own_program.py starts processes."""
    Path("metric_here.py").write_text("def metric(example, prediction):\n    return 1.0\n")
    said = run("fit", "--config", IRIS, "--data.metric", "metric_here.metric", "--print_config")
    assert said.code == 0, said.err
    assert "metric: metric_here.metric" in said.out


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "cotune", "configs"], stdout=write, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, b"")


def test_ctrl_c_during_the_imports_is_one_line_too(tmp_path: Path) -> None:
    heard = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # background jobs of a shell ignore it
    then = "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    (tmp_path / "torch.py").write_text(f"import os, signal, time\n{heard}\n{then}")
    words = [sys.executable, "-m", "cotune", "fit", "--config", "iris"]
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "\ncotune: stopped.\n")
