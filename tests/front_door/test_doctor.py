"""Claims about `cotune doctor`: what is broken is a problem and an exit code, and no key is shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, Said, cotune
from endpoint_server import Body, Reply, serving

from cotune.commands import doctor
from cotune.commands.doctor import Finding, account_findings, disk_findings, gemm_gflops, python_findings


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(doctor, "_SIZES", {"cpu": 32, "cuda": 32})
    return lambda *words: cotune(["doctor", *words], capsys)


def named(found: Iterator[Finding], name: str) -> Finding:
    return next(one for one in found if one.name == name)


def test_it_looks_at_everything_and_json_holds_the_same(run: Any) -> None:
    said: Said = run("--json")
    found = [Finding(**one) for one in json.loads(said.out)]
    names = {(one.group, one.name) for one in found}
    assert {("python", "Python"), ("python", "torch"), ("cpu", "threads"), ("cpu", "memory")} <= names
    assert {
        ("cpu", "multiplies"),
        ("cpu", "bitsandbytes nf4"),
        ("accounts", "W&B"),
        ("disk", "embedded model"),
    } <= names
    assert ("python", "ruff") not in names, "what only developers need is not looked at"
    assert said.code == int(any(one.status == "problem" for one in found))
    text = run().out
    for one in found:
        assert f" {one.name}: " in text


def test_a_version_outside_the_range_and_a_missing_package_are_problems(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "rich":
            raise metadata.PackageNotFoundError(name)
        return "0.19.1" if name == "peft" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert named(python_findings(), "rich").status == "problem"
    peft = named(python_findings(), "peft")
    assert (peft.status, peft.value) == ("problem", "0.19.1, supported is <0.22,>=0.21")
    assert peft.fix == "pip install 'peft<0.22,>=0.21'"
    assert run("--json").code == 1


def test_a_library_that_cannot_be_imported_is_a_finding_and_the_rest_is_looked_at(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Iterator[Finding]:
        raise ImportError("libcudart.so.12: cannot open shared object file", name="torch")
        yield

    monkeypatch.setattr(doctor, "cpu_findings", broken)
    said = run("--json")
    found = [Finding(**one) for one in json.loads(said.out)]
    assert said.code == 1
    assert named(iter(found), "W&B").group == "accounts"
    (problem,) = [one for one in found if one.status == "problem"]
    assert problem.name == "torch"
    assert "libcudart" in problem.value


def test_no_key_is_shown(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-123")
    monkeypatch.setenv("HF_TOKEN", "canary-456")
    found = {one.name: one for one in account_findings()}
    assert "a key for api.wandb.ai in WANDB_API_KEY" in found["W&B"].value
    assert found["Hugging Face"].value.startswith("a token in HF_TOKEN")
    said = run()
    assert "canary" not in said.out + said.err


def test_a_login_in_netrc_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password canary-789\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    found = named(account_findings(), "W&B")
    assert (found.status, "in netrc" in found.value, "canary" in found.value) == ("ok", True, False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert named(account_findings(), "W&B").status == "note"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert named(account_findings(), "W&B").status == "ok"


def test_a_folder_that_cannot_be_written_to_is_a_problem_whatever_its_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    found = named(disk_findings(tmp_path / "file" / "deep"), "runs")
    assert (found.status, found.fix) == ("problem", "--runs_dir FOLDER")
    assert "cannot be written to" in found.value

    def full(**_: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    found = named(disk_findings(tmp_path / "runs" / "deep"), "cache")
    assert (found.status, found.fix) == ("problem", "COTUNE_CACHE=FOLDER")
    assert "Read-only file system" in found.value


def test_a_version_newer_than_tested_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.tested_versions()["peft"]
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "99.0.1" if name == "torch" else real(name))
    found = named(python_findings(), "torch")
    assert found.status == "note"
    assert found.value.startswith("99.0.1, newer than ")


def test_a_product_is_measured_and_a_type_that_does_not_run_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_SIZES", {"cpu": 64})
    speed = gemm_gflops("cpu", "float32")
    assert speed is not None
    assert 0.001 < speed < 1e6
    assert gemm_gflops("cpu", "bool") is None


def test_the_tested_versions_can_be_had_as_a_file_for_pip(run: Any) -> None:
    assert run("--constraints").out == (ROOT / "constraints.txt").read_text()


def test_an_endpoint_is_reached_and_what_it_takes_is_tried(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(body: Body) -> str | Reply:
        if "logprobs" in body:
            return Reply(status=400, error={"message": "no logprobs for sk-canary"})
        return '{"answer": 5}' if "response_format" in body else "5"

    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    with serving(answer) as server:
        said: Said = run("--engine", server.url, "--json")
        found = {one["name"]: (one["status"], one["value"]) for one in json.loads(said.out)}
        shown: Said = run("--engine", server.url)
    assert said.code == 0
    assert found["models"] == ("ok", "m")
    assert found["a request"][0] == "ok"
    assert '"m" in 0.' in found["a request"][1]
    assert (found["seed"], found["response_format"]) == (("ok", "taken"), ("ok", "taken"))
    assert found["logprobs"][1].startswith("not taken: status 400")
    assert "sk-canary" not in said.out + shown.out
    gone: Said = run("--engine", server.url)
    assert (gone.code, "does not answer" in gone.out) == (1, True)


@pytest.mark.parametrize("option", ["--model", "--key_variable"])
def test_an_option_of_an_endpoint_wants_one(run: Any, option: str) -> None:
    said: Said = run(option, "x")
    assert said.code == 2
    assert f"{option} x is about an endpoint; add its --engine URL, or leave it out." in said.err
