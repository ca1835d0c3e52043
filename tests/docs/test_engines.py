"""The page docs/engines.md does what it says, with a small server in the endpoint's place."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import httpx2
import pytest
from commands import cotune, served, tiny
from cotune.inference.openai import OpenAILM
from endpoint_server import Body, serving
from pages import DOCS, ROOT, blocks, commands
from vllm_server import python_for, vllm_servers

PAGE = DOCS / "engines.md"


def answer(body: Body) -> str:
    """Adds, and judges."""
    asked = body["messages"][-1]["content"]
    if "verdict" in (form := str(body.get("response_format"))):
        return json.dumps({"reasoning": "It holds.", "verdict": "right" if "by luck" in form else "yes"})
    number = int(re.findall(r"(\d+) \+", asked)[-1])
    return json.dumps({"reasoning": "Twice the number.", "answer": 2 * number})


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__page__"}
    with serving(answer) as server:
        for block in blocks(PAGE):
            if block.language == "python" and "cotune.load" not in block.text:
                text = block.text.replace("http://127.0.0.1:8000/v1", server.url)
                exec(compile(text, PAGE.name, "exec"), names)
        names["lm"].close()
        names["judge"].lm.close()
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("10.0 10 calls, ")
    assert said[1].startswith("1.0 ")
    assert said[2] == "It holds."
    assert said[3].startswith("the judge contradicted itself on 0 of ")
    assert Path("calls.sqlite").is_file()


def written(file: str, url: str) -> str:
    """A file that the page has one save, with this server's address."""
    (block,) = [block for block in blocks(PAGE) if block.file == file]
    Path(file).write_text(re.sub(r"http://127.0.0.1:8000(/v1)?", url, block.text), encoding="utf-8")
    return file


def command(start: str) -> list[str]:
    """The words of the page's command that begins so, on few flowers."""
    (words,) = [words for words in commands(PAGE) if " ".join(words).startswith(start)]
    sizes = [word for part in ("train", "dev", "val", "test") for word in (f"--data.sizes.{part}", "3")]
    search = ["max_runs", "6"] if "roles.yaml" in words else ["then.num_candidates", "1"]
    small = [f"--alternate.search.{search[0]}", search[1], "--trainer.enable_progress_bar", "false"]
    return [*words, *sizes, *small] if words[0] == "fit" else words


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "configs").symlink_to(ROOT / "configs")


@pytest.mark.usefixtures("here")
def test_an_endpoints_prompts_are_tuned(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda body: "setosa") as server:
        said = cotune(["doctor", "--engine", server.url], capsys)
        assert "a request" in said.out
        written("hosted.yaml", server.url)
        assert cotune(command("fit --config configs/iris.yaml --config hosted.yaml"), capsys).code == 0


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("file", "schedule"), [("roles.yaml", "p -> w"), ("judge.yaml", "p")])
def test_a_teacher_a_proposer_and_a_judge_are_asked(
    file: str, schedule: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "test"):
        rows = [{"question": f"For {part}: {n} + {n}?", "answer": f"Twice.\n#### {2 * n}"} for n in range(12)]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quick = ["--data.path", str(tmp_path), "--alternate.schedule", schedule, "--alternate.epochs", "1"]
    quick += ["--data.bootstrapping.attempts", "1", "--model.sampling.max_new_tokens", "6"]
    with serving(answer) as server:
        words = command(f"fit --config configs/gsm8k.yaml --config {written(file, server.url)}")
        said = cotune([*words, *tiny(tiny_model, metric=False), *quick], capsys)
        assert said.code == 0, said.err
        assert {body["model"] for body in server.bodies} == {"qwen3-32b"}


@pytest.mark.usefixtures("here")
def test_vllm_servers_write_rollouts_and_serve_what_was_tuned(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answers(at: str) -> None:
        httpx2.get(f"{at}/v1/models", timeout=30).raise_for_status()

    with vllm_servers(tiny_model, max_rank=32) as (server,):
        told = python_for(server, tmp_path / "vllm" / "bin" / "python")
        words = command(f"fit --config configs/iris.yaml --config {written('vllm.yaml', server.url)}")
        own = [written("own.yaml", "") if word == "vllm.yaml" else word for word in words] + ["--name", "own"]
        quick = ["--alternate.epochs", "1", "--data.bootstrapping.attempts", "2", "--alternate.schedule", "w"]
        for fit in (words, own):
            said = cotune([*fit, *tiny(tiny_model), *quick], capsys)
            assert said.code == 0, said.err
        first, trained, again = server.loads()  # the rest of the second run is in the store
        assert first == again != trained
        assert "--max-lora-rank 32" in told.read_text()
        for form in ("--url", "--python", "--engine local"):
            serve = [server.url if word.startswith("http") else word for word in command(f"serve runs/iris {form}")]
            code, said_there = served(serve[1:], answers)
            assert (code, "answers at" in said_there) == (0, True)
        assert len(told.read_text().splitlines()) == 2
        (block,) = [block for block in blocks(PAGE) if "cotune.load" in block.text]
        loading = block.text.replace("http://127.0.0.1:8000", server.url).replace(
            "print(flowers", "print(bool(flowers)"
        )
        exec(compile(loading.partition("(petal_length")[0] + ")", PAGE.name, "exec"), {"__name__": "__page__"})


def test_its_table_shows_the_options_and_their_defaults() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, option in inspect.signature(OpenAILM).parameters.items():
        row = re.search(rf"^\| `{name}` \| ([^|]+) \|", text, re.MULTILINE)
        if row is None:
            assert name in ("model", "key_variable"), f"{name} is not in the table"
        elif isinstance(option.default, (int, float)):
            assert float(row[1]) == option.default
