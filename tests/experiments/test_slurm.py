"""Claims about tables on a SLURM cluster: what is submitted, what a task does, and how stores come together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from cotune.experiments.runner import Runner
from cotune.experiments.runs import runs_of
from cotune.experiments.slurm import merge_stores, own_store, submit, under_way
from cotune.experiments.table_config import TableConfig, TableError, read_table
from cotune.storage.row_store import RowStore

TABLE = """
name: small
tasks: {iris: {configs: [iris.yaml]}}
lms: {tiny: []}
presets: {default: []}
strategies: ["p -> p", "p -> w -> p"]
seeds: [0, 1]
"""


@pytest.fixture
def config(tmp_path: Path) -> TableConfig:
    (tmp_path / "iris.yaml").write_text("{}", encoding="utf-8")
    (tmp_path / "table.yaml").write_text(TABLE, encoding="utf-8")
    return read_table(tmp_path / "table.yaml")


def cluster(folder: Path, monkeypatch: pytest.MonkeyPatch, *, code: int = 0) -> Path:
    """An sbatch that notes what it is asked, and gives numbers."""
    asked = folder / "asked"
    script = folder / "bin" / "sbatch"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> {asked}\necho $(wc -l < {asked})\nexit {code}\n', encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=":")
    return asked


def test_controls_are_submitted_behind_the_runs_they_equal(
    config: TableConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = cluster(tmp_path, monkeypatch)
    runs = runs_of(config)
    assert submit(runs, tmp_path / "t", ["table"], name="small", options=["--gres=gpu:1"]) == ["1", "2"]
    first, second = asked.read_text(encoding="utf-8").splitlines()
    assert "--dependency" not in first
    assert "--dependency=afterany:1" in second
    names = [(tmp_path / "t" / f"submit-{n}.txt").read_text(encoding="utf-8").split() for n in (1, 2)]
    assert sorted(names[0] + names[1]) == sorted(run.name for run in runs)
    assert names[1] == [run.name for run in runs if run.equal]
    script = (tmp_path / "t" / "submit-1.sbatch").read_text(encoding="utf-8")
    assert f"--array=1-{len(names[0])} " in script
    assert "#SBATCH --gres=gpu:1\n" in script
    assert 'cotune table --run "$run"' in script


def test_what_is_under_way_is_known(config: TableConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(tmp_path, monkeypatch)
    assert under_way(tmp_path / "t") == []
    submit(runs_of(config), tmp_path / "t", ["table"], name="small")
    queue = tmp_path / "bin" / "squeue"
    queue.write_text('#!/bin/sh\n[ "$4" = 1,2 ] && echo "1_[3-4]\n2_1"\n', encoding="utf-8")
    queue.chmod(0o755)
    assert under_way(tmp_path / "t") == ["1_[3-4]", "2_1"]
    queue.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    assert under_way(tmp_path / "t") == []


def test_an_sbatch_that_is_not_there_or_refuses_is_an_error(
    config: TableConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TableError, match="needs sbatch"):
        submit(runs_of(config), tmp_path / "t", ["table"], name="small")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    cluster(tmp_path, monkeypatch, code=1)
    with pytest.raises(TableError, match="sbatch refuses"):
        submit(runs_of(config), tmp_path / "t", ["table"], name="small")


def test_a_task_runs_one_run_with_a_store_of_its_own(config: TableConfig, tmp_path: Path) -> None:
    given: list[Sequence[str]] = []

    def fit(words: Sequence[str]) -> int:
        given.append(words)
        return 3

    run = runs_of(config)[0]
    assert Runner(config, tmp_path).run_here(run, fit=fit) == 3
    (words,) = given
    assert words[words.index("--model.lm.completions") + 1] == str(own_store(tmp_path / run.name))
    assert json.loads((tmp_path / run.name / "outcome.json").read_text(encoding="utf-8"))["state"] == "no traces"
    control = next(run for run in runs_of(config) if run.equal)
    assert Runner(config, tmp_path).run_here(control, fit=fit) == 1  # what it equals has not run
    assert len(given) == 1


def test_stores_of_runs_become_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        store = RowStore(own_store(tmp_path / name))
        store.write({f"{name}{n}".encode(): b"value" for n in range(600)})
        store.close()
    shared = own_store(tmp_path)
    assert merge_stores([tmp_path / name for name in ("a", "b", "c")], shared) == 2
    merged = RowStore(shared)
    assert len(merged.read([f"{name}{n}".encode() for name in "ab" for n in range(600)])) == 1200
    merged.close()
    assert not own_store(tmp_path / "a").exists()
    assert merge_stores([tmp_path / "a"], shared) == 0
