"""What W&B gets: a p -> w -> p recorded offline and read back, point by point, table by table, file by file."""

from __future__ import annotations

import base64
import csv
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import wandb
import yaml
from commands import fit
from cotune.callbacks.loggers.log_program import LogProgram
from cotune.callbacks.loggers.metrics_file import MetricsFile
from cotune.callbacks.loggers.program_tables import rollout_rows
from cotune.callbacks.loggers.wandb_artifacts import ProgramArtifacts
from cotune.callbacks.loggers.wandb_run import RunLogger, kept_id
from cotune.programs import Completion, Example, Rollout, Step
from tiny_fit import BreakInTraining, BrokenOffError, Fit, tiny_fit
from wandb_file import WandbFile, column

from cotune.__main__ import main
from cotune.fit.wandb_setup import placed_loggers

CANARIES = ("canary-of-the-environment", "canary-of-the-command-line", "canary-of-the-config")
KEYED = """
from tiny_fit import CurtLM


class KeyedLM(CurtLM):
    def __init__(self, *args, api_key: str = "", other_token: str = "", **kwargs):
        super().__init__(*args, **kwargs)
"""


@pytest.fixture(autouse=True, scope="module")
def _offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_API_KEY", "0123456789" * 4)
        patch.setenv("MY_SERVICE_TOKEN", CANARIES[0])
        wandb.teardown()  # what W&B keeps of the settings of tests before, in this process
        yield
        wandb.teardown()


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that the command line logged to W&B, with secrets where people put them."""
    here = tmp_path_factory.mktemp("wandb")
    (here / "keyed.py").write_text(KEYED)
    (here / "keyed.yaml").write_text(f"model: {{lm: {{init_args: {{other_token: {CANARIES[2]}}}}}}}")
    words = [*fit(tiny_model, "--model.lm", "keyed.KeyedLM"), "--model.lm.api_key", CANARIES[1]]
    words += ["--config", "keyed.yaml", "--trainer.logger", "WandbLogger", "--alternate.keep", "last"]
    words += ["--seed_everything", "2"]  # one with which the tiny model's prompt steps find something
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(sys, "argv", ["cotune", *words, CANARIES[0]])
        assert main(words) == 0
        wandb.finish()
    return here / "runs" / "tiny"


@pytest.fixture(scope="module")
def recorded(folder: Path) -> WandbFile:
    (run,) = (folder / "wandb").glob("offline-run-*")
    return WandbFile(run)


@pytest.fixture(scope="module")
def history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


# Curves


def test_every_prefix_has_a_score_over_its_own_axis(recorded: WandbFile, history: list[dict[str, Any]]) -> None:
    points = [point for point in recorded.history if "boundary/val_score" in point]
    logged = [(point["boundary/index"], point["boundary/val_score"]) for point in points]
    assert logged == [(record["index"], record["val_score"]) for record in history]
    axes = recorded.axes
    assert {axes[f"{group}/*"] for group in ("boundary", "search", "traces", "cost")} == {"boundary/index"}
    assert axes["trial/*"] == "trial/number"
    assert axes["*"] == "trainer/global_step"
    (scores,) = [table for table in recorded.tables("boundary/scores") if len(table["data"]) == 4]
    assert column(scores, "prefix") == ["vanilla", "p", "p -> w", "p -> w -> p"]
    assert column(scores, "lm_calls") == [record["lm_calls"] for record in history]


def test_the_picture_of_the_scores_has_a_band_for_each_step(recorded: WandbFile) -> None:
    paths = [point["boundary/curve.path"] for point in recorded.history if "boundary/curve.path" in point]
    last = (recorded.folder / "files" / paths[-1]).read_text()
    assert (len(paths), last.count('class="p"'), last.count('class="w"'), last.count("<circle")) == (4, 2, 1, 4)


def test_losses_are_drawn_over_optimiser_steps(recorded: WandbFile, history: list[dict[str, Any]]) -> None:
    points = [point for point in recorded.history if "train/loss" in point]
    assert [point["trainer/global_step"] for point in points] == list(range(len(points)))
    assert points
    assert [point["test/score"] for point in recorded.history if "test/score" in point]


def test_the_cost_of_each_kind_of_step_adds_up(recorded: WandbFile, history: list[dict[str, Any]]) -> None:
    last = [point for point in recorded.history if "cost/p/lm_calls" in point][-1]
    for name in ("lm_calls", "cached_calls", "prompt_tokens", "completion_tokens", "seconds"):
        for step in ("p", "w"):
            spent = sum(record[name] for record in history if record["step"] == step)
            assert last[f"cost/{step}/{name}"] == pytest.approx(spent), (step, name)


# Tables


def test_each_candidate_is_a_row_and_a_point(recorded: WandbFile, history: list[dict[str, Any]]) -> None:
    searches = [record["candidates"] for record in history if record["step"] == "p"]
    tables = recorded.tables("search/tried")
    assert [
        list(zip(*(column(t, n) for n in ("why", "dev_score", "pruned", "prompts")), strict=True)) for t in tables
    ] == [[(c["why"], c["score"], c["pruned"], c["id"]) for c in candidates] for candidates in searches]
    for table in tables:
        assert all(text.startswith("[predict]\nClassify") for text in column(table, "text"))
        assert all(runs > 0 for runs in column(table, "dev_runs"))
        assert column(table, "difference")[0] == ""
        assert "+Demo 1" in column(table, "difference")[-1]
    points = [point for point in recorded.history if "trial/number" in point]
    candidates = [c for search in searches for c in search]
    assert [point["trial/number"] for point in points] == list(range(len(candidates)))
    assert [point["trial/dev_score"] for point in points] == [c["score"] for c in candidates]


def test_prompts_are_shown_in_words_and_as_differences(recorded: WandbFile) -> None:
    tables = recorded.tables("boundary/prompts")
    assert [column(table, "stage") for table in tables] == [["predict"]] * 4
    for before, after in itertools.pairwise(tables):
        changed = column(before, "demos") != column(after, "demos")
        assert bool(column(after, "difference")[0]) == changed
    assert any(column(table, "difference")[0] for table in tables)


def test_every_call_on_val_is_a_row(recorded: WandbFile, history: list[dict[str, Any]]) -> None:
    tables = recorded.tables("boundary/rollouts")
    assert len(tables) == 4
    for table, record in zip(tables, history, strict=True):
        scores = column(table, "score")
        assert len(scores) == 8
        assert sum(scores) / len(scores) == pytest.approx(record["val_score"])
        assert column(table, "error").count("format") == record["failures"].get("format", 0)
        assert set(column(table, "stage")) == {"predict"}


def test_a_rollout_table_is_bounded_and_says_what_it_lacks() -> None:
    step = Step("s", {"q": "1"}, {"a": "x"}, (), Completion("y" * 500, (), ()))
    done = [Rollout(Example(str(n), {}, {}), (step, step), {}, 1.0) for n in range(5)]
    (columns, rows), left_out = rollout_rows(done, max_rows=5, max_characters=100)
    assert (left_out, len(rows)) == (3, 5)  # two whole rollouts of two calls, and the notice
    assert rows[-1][columns.index("message")].startswith("3 of 5 rollouts are left out here")
    assert "400 characters left out" in rows[0][columns.index("output")]
    assert rollout_rows(done, max_rows=10, max_characters=100)[1] == 0


# Artifacts


def test_artifacts_lead_from_the_data_to_the_export(recorded: WandbFile, folder: Path) -> None:
    logged = {(a["name"], *sorted(set(a["aliases"]) - {"latest"})): a for a in recorded.artifacts}
    assert set(logged) == {
        *(("tiny-config",), ("tiny-data",), ("tiny-traces", "step-2"), ("tiny-adapter", "step-2")),
        *(("tiny-export", "best"), *(("tiny-prompts", f"step-{index}") for index in range(4))),
    }
    known = {":".join(key) + "@" + artifact["digest"] for key, artifact in logged.items()}
    origins = {key: artifact["metadata"]["made_from"] for key, artifact in logged.items()}
    assert {name for names in origins.values() for name in names} <= known

    def leads_to(key: tuple[str, ...]) -> set[str]:
        return {name.split("@")[0] for name in origins[key]}

    assert leads_to(("tiny-export", "best")) == {"tiny-adapter:step-2", "tiny-prompts:step-3"}
    assert leads_to(("tiny-adapter", "step-2")) == {"tiny-traces:step-2"}
    assert leads_to(("tiny-traces", "step-2")) == {"tiny-data", "tiny-prompts:step-1"}
    assert logged["tiny-adapter", "step-2"]["metadata"]["prefix"] == "p -> w"


def test_each_artifacts_files_are_in_the_runs_folder_as_they_were_logged(recorded: WandbFile, folder: Path) -> None:
    names = set()
    for artifact in recorded.artifacts:
        for entry in artifact["manifest"]["contents"]:
            path = Path(entry["local_path"])
            assert path.is_relative_to(folder.resolve())
            assert base64.b64encode(hashlib.md5(path.read_bytes()).digest()).decode() == entry["digest"], path
            names.add((artifact["name"], entry["path"]))
    assert {("tiny-adapter", "adapter_model.safetensors"), ("tiny-export", "adapter/adapter_config.json")} <= names
    assert {("tiny-export", "prompts.json"), ("tiny-config", "config.yaml"), ("tiny-data", "data.json")} <= names


# The run


def test_the_run_is_named_after_cotunes_and_grouped_by_program_and_data(recorded: WandbFile, folder: Path) -> None:
    run = recorded.run
    assert (run["display_name"], run["project"], run["run_group"]) == ("tiny", "cotune", "Predict on Iris")
    assert {"Predict", "Iris", "p -> w -> p"} <= set(run["tags"])
    assert run["run_id"] == json.loads((folder / "wandb" / "run.json").read_text())["id"]
    assert recorded.config["alternate"]["schedule"] == "p -> w -> p"


def test_the_saved_config_is_not_tied_to_this_w_and_b_run(folder: Path) -> None:
    logger = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["logger"]
    assert logger["class_path"] == "lightning.pytorch.loggers.WandbLogger"
    assert logger["init_args"]["save_dir"] == "."
    assert not logger["init_args"]["id"]
    assert not logger["init_args"]["name"]


def test_no_secret_reaches_w_and_b(folder: Path) -> None:
    files = [path for path in (folder / "wandb").rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        for secret in (*CANARIES, "0123456789" * 4):
            assert secret.encode() not in path.read_bytes(), (path, secret)


def test_what_the_user_set_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from jsonargparse import Namespace

    def part(class_path: str, **init_args: Any) -> Namespace:
        return Namespace(class_path=class_path, init_args=Namespace(init_args))

    asked = part(
        "lightning.pytorch.loggers.WandbLogger", save_dir=".", name="mine", project=None, group=None, tags=["a"]
    )
    config = Namespace(
        name="iris",
        ckpt_path=None,
        data=part("cotune.datamodules.Iris"),
        model=Namespace(program=part("cotune.programs.Predict"), lm=part("cotune.LanguageModel", model="x/y")),
        alternate=Namespace(schedule="p"),
        trainer=Namespace(logger=[asked, part("lightning.pytorch.loggers.CSVLogger", save_dir=".")]),
    )
    monkeypatch.setenv("WANDB_PROJECT", "of the environment")
    with placed_loggers(config, tmp_path):
        ours, other = config.trainer.logger
        assert ours.class_path.endswith("RunLogger")
        assert other.class_path.endswith("CSVLogger")
        assert vars(ours.init_args) == {
            "save_dir": str(tmp_path),
            "name": "mine",
            "project": None,
            "tags": ["a"],
            "group": "Predict on Iris",
        }
    assert config.trainer.logger[0] is asked
    with placed_loggers(config, tmp_path, fits=False):
        (own, _) = config.trainer.logger
        assert (own.init_args.save_dir, own.init_args.group) == (str(tmp_path), "Predict on Iris")
        del own.init_args.project
        logger = RunLogger(**vars(own.init_args))  # which lets no secret through, as another logger would
        assert logger._sent is None
        assert not (tmp_path / "wandb" / "run.json").exists(), "what scores a run has no part in its W&B run"


def test_runs_whose_files_go_to_one_folder_are_each_a_run_of_their_own(tmp_path: Path) -> None:
    from jsonargparse import Namespace

    def id_of(run: str) -> str:
        asked = Namespace(class_path="lightning.pytorch.loggers.WandbLogger", init_args=Namespace(save_dir=str(logs)))
        config = Namespace(
            name=run,
            data=Namespace(class_path="cotune.datamodules.Iris"),
            model=Namespace(
                program=Namespace(class_path="cotune.programs.Predict"), lm=Namespace(init_args=Namespace(model="x/y"))
            ),
            alternate=Namespace(schedule="p"),
            trainer=Namespace(logger=asked),
        )
        with placed_loggers(config, tmp_path / run):
            logger = RunLogger(**vars(config.trainer.logger.init_args))
        assert logger.save_dir == str(logs)
        assert logger._sent == tmp_path / run / "wandb" / "sent.txt"
        return str(logger.version)

    logs = tmp_path / "logs"
    first, second = id_of("one"), id_of("two")
    assert first != second
    assert (id_of("one"), id_of("two")) == (first, second), "each goes on as the same"
    assert first == json.loads((tmp_path / "one" / "wandb" / "run.json").read_text())["id"]
    assert list(logs.iterdir()) == [logs / "wandb"]
    assert not list((logs / "wandb").iterdir())


# Stopped and continued


def test_a_killed_and_continued_run_is_one_run_that_lacks_no_point_of_metrics_csv(
    tiny_model: Path, tmp_path: Path
) -> None:
    first = _logged(tiny_model, tmp_path, BreakInTraining(5))
    with pytest.raises(BrokenOffError):
        first.run()
    wandb.finish()
    _logged(tiny_model, tmp_path, keep=True).run(first.last)
    wandb.finish()
    files = [WandbFile(path) for path in sorted((tmp_path / "wandb").glob("offline-run-*"))]
    assert [file.run["run_id"] for file in files] == [kept_id(tmp_path / "wandb")] * 2
    assert [file.artifacts for file in files] == [[], []], "none is asked for"
    with (tmp_path / "metrics.csv").open() as file:
        rows = [{name: float(text) for name, text in row.items() if text} for row in csv.DictReader(file)]
    points = [{"step": point.get("trainer/global_step"), **point} for point in files[-1].history]
    assert len(rows) > 8
    for row in rows:
        assert any(row.items() <= point.items() for point in points), row


class FakeRun:
    """What the two classes use of an online W&B run."""

    offline = False

    def __init__(self, starting_step: int = 0) -> None:
        self.starting_step = starting_step
        self.logged: list[dict[str, Any]] = []
        self.done: list[tuple[str, str]] = []

    def log(self, metrics: dict[str, Any]) -> None:
        self.logged.append(metrics)

    def log_artifact(self, artifact: Any, aliases: Sequence[str]) -> Any:
        self.done.append(("logged", artifact.name))
        return self.Logged(artifact.name)

    def use_artifact(self, artifact: Any) -> None:
        self.done.append(("used", artifact.name))

    class Logged:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait(self, timeout: float) -> Any:
            return self


def test_online_w_and_b_is_sent_what_it_has_not_received(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path)
    logger._experiment = cast(Any, run := FakeRun(starting_step=2))
    logger.log_again([{"step": step, "train/loss": 0.5} for step in range(4)])
    assert run.logged == [{"trainer/global_step": step, "train/loss": 0.5} for step in (2, 3)]


def test_after_a_prompt_step_too_online_w_and_b_is_sent_what_it_has_not_received(tmp_path: Path) -> None:
    """Candidates have points that metrics.csv lacks, and a resumed run does some steps a second time."""
    losses = [{"step": float(step), "train/loss": 0.5, "epoch": 0.0} for step in range(10)]
    rows: list[dict[str, float]] = [{"step": 0.0, "boundary/index": float(index)} for index in range(2)] + losses

    def begun(received: int) -> tuple[RunLogger, FakeRun]:
        logger = RunLogger(tmp_path)
        logger._experiment = cast(Any, run := FakeRun(starting_step=received))
        return logger, run

    def sent_again(run: FakeRun) -> list[float]:
        return [point["trainer/global_step"] for point in run.logged if "train/loss" in point]

    logger, _ = begun(0)
    for number in range(12):
        logger.log_metrics({"trial/number": float(number), "boundary/index": 1.0}, step=0)
    for row in rows:
        logger.log_metrics({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))
    logger, run = begun(12 + 2 + 3)
    logger.log_again(rows[:-4])  # a checkpoint of step 6
    assert sent_again(run) == [3, 4, 5]
    for step in (6, 7):
        logger.log_metrics({"train/loss": 0.5, "epoch": 0}, step=step)
    assert len(run.logged) == 5
    logger, run = begun(12 + 2 + 3 + 3 + 1)  # step 7 was lost
    logger.log_again(rows[:-2])
    assert sent_again(run) == [7]


def test_a_run_without_a_list_of_what_was_sent_is_sent_again_as_a_whole(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path)
    logger._experiment = cast(Any, run := FakeRun(starting_step=9))
    logger.log_again([{"step": 0, "boundary/index": 0.0}, {"step": 0, "train/loss": 0.5}])
    assert len(run.logged) == 2


def test_online_each_artifact_uses_those_it_is_made_from(folder: Path) -> None:
    run = FakeRun()
    artifacts = ProgramArtifacts(run, folder)
    artifacts._log("data", [folder / "summary.json"])
    artifacts._log("traces", [folder / "summary.json"], alias="step-2", origins=["data", "prompts:step-1"])
    assert run.done == [("logged", "tiny-data"), ("used", "tiny-data"), ("logged", "tiny-traces")]


def _logged(model: Path, folder: Path, *callbacks: Any, keep: bool = False) -> Fit:
    loggers = [MetricsFile(folder, keep=keep), RunLogger(folder, project="tiny")]
    log = LogProgram(artifacts=False)
    return tiny_fit(model, folder, callbacks=[log, *callbacks], trainer={"logger": loggers})


def test_a_missing_key_is_one_line_with_three_ways_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / "nobody"))
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    assert main([*fit(tiny_model), "--trainer.logger", "WandbLogger"]) == 2
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("cotune: error: ")]
    assert "cannot log to W&B (No API key configured." in line
    assert "`wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline" in line
    assert "Traceback" not in said
