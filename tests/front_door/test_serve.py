"""Claims about `cotune serve`: programs' inputs over HTTP, what is no question, and an end in order."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, cast

import httpx2
import pytest
from commands import cotune, served
from cotune.datamodules.tasks.iris import iris_examples
from cotune.inference.vllm import VLLMServer
from cotune.programs import Example, Rollout
from vllm_server import VLLMServerProcess, vllm_servers

from cotune import Predict, ProgramModule, load
from cotune.front import Front
from cotune.testing import FakeLM
from cotune.tuned import Tuned

FLOWERS = [dict(example.inputs) for example in iris_examples()[:6]]


def ask(url: str, text: Any, *, model: str = "tiny", key: str = "", **more: Any) -> httpx2.Response:
    content = text if isinstance(text, str) else json.dumps(text)
    body = {"model": model, "messages": [{"role": "user", "content": content}], **more}
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx2.post(f"{url}/v1/chat/completions", content=json.dumps(body), headers=headers, timeout=60)


@contextmanager
def front(tuned: Tuned, **options: Any) -> Iterator[str]:
    serving = Front("127.0.0.1", 0, name="tiny", **options)
    serving.give(tuned)
    yield f"http://127.0.0.1:{serving.server_port}"
    serving.end()


@pytest.fixture(scope="module")
def tuned(finished: Any) -> Tuned:
    return load(finished.folder)


@pytest.fixture(scope="module")
def url(tuned: Tuned) -> Iterator[str]:
    with front(tuned, key="secret") as at:
        yield at


def test_many_questions_at_once_get_the_programs_answers(tuned: Tuned, url: str) -> None:
    with ThreadPoolExecutor(6) as together:
        got = list(together.map(lambda inputs: ask(url, inputs, key="secret"), FLOWERS))
    for inputs, response in zip(FLOWERS, got, strict=True):
        (rollout,) = tuned.rollouts([next(e for e in iris_examples() if dict(e.inputs) == inputs)])
        body = response.json()
        if rollout.error:
            assert response.status_code == 422
            assert rollout.error.message in body["error"]["message"]
        else:
            assert json.loads(body["choices"][0]["message"]["content"]) == rollout.prediction
            assert body["usage"]["completion_tokens"] == sum(len(s.completion.completion_ids) for s in rollout.steps)
    assert {response.status_code for response in got} >= {200}


@pytest.mark.parametrize(
    ("text", "more", "status", "said"),
    [
        ("setosa", {}, 400, "no JSON object: it holds the program's inputs as JSON, petal_length, petal_width, sepal"),
        ({"petal_length": "1"}, {}, 400, "petal_width"),
        ({**FLOWERS[0], "colour": "red"}, {}, 400, "colour: no input"),
        (FLOWERS[0], {"model": "gpt"}, 404, 'there is no model "gpt", only "tiny"'),
        (FLOWERS[0], {"stream": True}, 400, "stream"),
        (FLOWERS[0], {"messages": []}, 400, "one message of the user"),
        (FLOWERS[0], {"key": "guessed"}, 401, "key"),
    ],
)
def test_what_is_no_question_says_why(url: str, text: Any, more: dict[str, Any], status: int, said: str) -> None:
    response = ask(url, text, **{"key": "secret", **more})
    assert response.status_code == status
    assert said in response.json()["error"]["message"]


def test_a_program_with_one_input_takes_plain_text(tuned: Tuned) -> None:
    module = ProgramModule(Predict("question -> answer"), tuned.module.lm, sampling=tuned.module.sampling)
    with front(Tuned(module.eval())) as at:
        plain = ask(at, "What is red?")
        assert plain.status_code == ask(at, {"question": "What is red?"}).status_code
        assert httpx2.get(f"{at}/v1/models").json()["data"][0]["id"] == "tiny"
        assert httpx2.get(f"{at}/v2").status_code == 404


def test_half_a_surrogate_pair_is_refused_with_an_answer(url: str) -> None:
    response = ask(url, FLOWERS[0], key="secret", model="\ud800")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    response = ask(url, {**FLOWERS[0], "\ud800": "1"}, key="secret")
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_inputs")


@pytest.mark.parametrize("depth", [600, 100_000])
def test_what_is_nested_too_deeply_is_refused(url: str, depth: int) -> None:
    nested = "[" * depth + "]" * depth
    text = json.dumps({**FLOWERS[0], "petal_length": "HERE"}).replace('"HERE"', nested)
    assert ask(url, text, key="secret").status_code == 400
    headers = {"authorization": "Bearer secret"}
    assert httpx2.post(f"{url}/v1/chat/completions", content=nested, headers=headers).status_code == 400


def test_a_client_that_hangs_up_is_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    began, left = threading.Event(), threading.Event()

    class Slow:
        module = ProgramModule(Predict("question -> answer"), FakeLM(lambda request: ""))

        def rollouts(self, examples: Sequence[Example]) -> list[Rollout]:
            began.set()
            left.wait(60)
            return [Rollout(example, (), {"answer": "yes"}, 0.0) for example in examples]

    content = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "Red?"}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    with front(cast(Tuned, Slow())) as at:
        client = socket.create_connection(("127.0.0.1", int(at.rpartition(":")[2])))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes with a reset
        client.sendall(head + content)
        assert began.wait(60)
        client.close()
        left.set()
        assert ask(at, "Blue?").status_code == 200
    assert capsys.readouterr().err == ""


def test_records_in_an_answer_are_json() -> None:
    @dataclass
    class Order:
        pieces: int

    class Dated:
        module = ProgramModule(Predict("question -> answer"), FakeLM(lambda request: ""))

        def rollouts(self, examples: Sequence[Example]) -> list[Rollout]:
            made = {"order": Order(2), "day": date(2024, 7, 26)}
            return [Rollout(example, (), made, 0.0) for example in examples]

    with front(cast(Tuned, Dated())) as at:
        content = ask(at, "When?").json()["choices"][0]["message"]["content"]
    assert json.loads(content) == {"order": {"pieces": 2}, "day": "2024-07-26"}


def test_the_command_serves_on_vllm_servers_until_sigterm(
    finished: Any, tiny_model: Path, tmp_path: Path, tuned: Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    got: list[dict[str, Any]] = []
    server: VLLMServerProcess
    with vllm_servers(tiny_model, max_rank=32) as (server,):

        def asking(at: str) -> None:
            got.extend(ask(at, inputs).json() for inputs in FLOWERS)

        code, said = served([str(finished.folder), "--url", server.url], asking)
        assert server.completions()
        assert (tmp_path / ".cache" / "cotune" / "adapters").is_dir()
        over = load(finished.folder, engine=VLLMServer([server.url], adapters=str(tmp_path / "adapters")), device="cpu")
        assert [r.prediction for r in over.rollouts(iris_examples()[:6])] == [
            r.prediction for r in tuned.rollouts(iris_examples()[:6])
        ]
    assert code == 0
    assert f"by vLLM at {server.url}" in said
    assert [json.loads(one["choices"][0]["message"]["content"]) for one in got if "choices" in one] == [
        r.prediction for r in tuned.rollouts(iris_examples()[:6]) if not r.error
    ]


def test_what_cannot_be_served_is_said_before_anything_is_loaded(finished: Any, capsys: Any, tmp_path: Path) -> None:
    taken = Front("127.0.0.1", 0, name="x")
    for words, message in (
        (["--port", str(taken.server_port)], "give another --port"),
        (["--port", "99999"], "--port 99999 is no port; give one of 1 to 65535, or 0 for any free one."),
        (["--port", "-1"], "--port -1 is no port"),
        (["--port", "0", "--host", "no.such.host.invalid"], "give a --host that is an address of this machine"),
        (["--engine", "local", "--url", "http://127.0.0.1:1"], "takes neither"),
        (["--python", str(tmp_path / "python"), "--port", "0"], "no Python"),
        (["--key_variable", "NO_SUCH"], "this environment variable is not set"),
    ):
        said = cotune(["serve", str(finished.folder), *words], capsys)
        assert (said.code, message in said.err) == (2, True), said.err
    taken.server_close()
