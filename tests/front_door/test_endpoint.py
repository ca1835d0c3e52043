"""Claims about runs whose LM is an endpoint: prompts are tuned without weights, and no answer is paid for twice."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, SIZES, Said, cotune
from commands import fit as tiny_fit
from endpoint_server import Body, EndpointServer, Reply, serving


def species(body: Body) -> str:
    """Right for setosa, and for the others once it is shown demos."""
    length = float(re.findall(r"petal_length: ([\d.]+)", body["messages"][-1]["content"])[-1])
    return "setosa" if length < 2.5 else "virginica" if len(body["messages"]) > 3 and length > 4.9 else "versicolor"


@pytest.fixture
def server() -> Iterator[EndpointServer]:
    with serving(species) as running:
        yield running


def fit(server: EndpointServer, *more: str) -> list[str]:
    sizes = [word for part, size in SIZES.items() for word in (f"--data.sizes.{part}", str(size))]
    return [
        *("fit", "--config", str(ROOT / "configs" / "iris.yaml"), "--model.lm", "OpenAILM", "--model.lm.model", "m"),
        *("--model.lm.endpoint", server.url, *sizes, "--name", "hosted", "--alternate.schedule", "P"),  # in either case
        *("--alternate.search", "RandomDemoSearch", "--alternate.search.num_candidates", "1"),
        *("--trainer.enable_progress_bar", "false", *more),
    ]


def test_a_program_is_asked_at_an_endpoint_as_it_comes(
    server: EndpointServer, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = f"{{class_path: OpenAILM, init_args: {{model: m, endpoint: {server.url}}}}}"
    Path("own.yaml").write_text(f"model:\n  lm: {lm}\n")
    program = ["--program", "petal_length -> answer", "--petal_length", "1"]
    said = cotune(["ask", "--config", "own.yaml", *program], capsys)
    assert said.code == 0, said.err
    assert said.out.splitlines()[-1] == "answer: setosa"


@pytest.fixture
def hosted(server: EndpointServer, capsys: pytest.CaptureFixture[str]) -> str:
    """A run whose LM is the endpoint, and rows to answer with it."""
    assert cotune(fit(server), capsys).code == 0
    row = {"petal_width": "0.2", "sepal_length": "5.1", "sepal_width": "3.5"}
    rows = [json.dumps({"petal_length": f"{n}", **row}) + "\n" for n in range(40)]
    Path("rows.jsonl").write_text("".join(rows), encoding="utf-8")
    server.bodies.clear()
    return "runs/hosted"


def test_answers_that_were_given_before_an_endpoint_died_are_kept_and_not_asked_for_again(
    server: EndpointServer, hosted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def dies(body: Body) -> str | Reply:
        return species(body) if len(server.bodies) <= 20 else Reply(status=401, error={"message": "key revoked"})

    words = ["predict", "--export", hosted, "--data", "rows.jsonl", "--output", "out.jsonl"]
    Path("out.jsonl").write_text("earlier", encoding="utf-8")
    server.answer = dies
    for _ in range(2):  # the second start finds the endpoint as it was left
        said = cotune(words, capsys)
        assert said.code == 2
        assert "answers so far, 20 rows, are in out.jsonl.partial; out.jsonl is as it was." in said.err
        assert "key revoked" in said.err
        assert "in the store" not in said.err
        assert Path("out.jsonl").read_text(encoding="utf-8") == "earlier"
        partial = [json.loads(line) for line in Path("out.jsonl.partial").read_text(encoding="utf-8").splitlines()]
        assert len(partial) == 20
        assert all(line["answer"] for line in partial)
    server.answer = species
    before = len(server.bodies)
    assert cotune(words, capsys).code == 0
    assert len(server.bodies) - before == 20
    assert [json.loads(line)["row"] for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()] == [
        *range(1, 41)
    ]
    assert sorted(path.name for path in Path().glob("out*")) == ["out.jsonl"]


def test_answers_before_an_endpoint_died_are_printed(
    server: EndpointServer, hosted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = lambda body: (
        species(body) if len(server.bodies) <= 20 else Reply(status=401, error={"message": "key revoked"})
    )
    said = cotune(["predict", "--export", hosted, "--data", "rows.jsonl"], capsys)
    assert said.code == 2
    assert len(said.out.splitlines()) == 20
    assert "in the store" not in said.err


def asked(server: EndpointServer) -> Counter[str]:
    """How often each request has come."""
    return Counter(json.dumps([body["messages"], body.get("seed")]) for body in server.bodies)


def summary(folder: str = "runs/hosted") -> dict[str, Any]:
    return dict(json.loads(Path(folder, "summary.json").read_text(encoding="utf-8").split("\n#")[0]))


def test_prompts_are_tuned_tested_exported_and_asked_without_weights(
    server: EndpointServer, capsys: pytest.CaptureFixture[str]
) -> None:
    said = cotune(fit(server), capsys)
    assert said.code == 0, said.err
    assert f"LM        m at {server.url}: its prompts are tuned, it has no weights here" in said.out
    made = summary()
    assert made["scores"]["p"] >= made["scores"]["vanilla"]
    assert made["test_score"] is not None
    assert made["costs"]["program"]["calls"] == len(server.bodies)
    assert f"Paid, program: {len(server.bodies)} calls" in said.out
    assert not Path("runs/hosted/export/adapter").exists()
    assert cotune(["report", "runs/hosted"], capsys).code == 0
    flower = '{"petal_length": "1.4", "petal_width": "0.2", "sepal_length": "5.1", "sepal_width": "3.5"}\n'
    Path("rows.jsonl").write_text(flower, encoding="utf-8")
    answered = cotune(["predict", "--export", "runs/hosted", "--data", "rows.jsonl"], capsys)
    assert (answered.code, json.loads(answered.out)["answer"]) == (0, "setosa")
    assert "has no weights here" in cotune(["export", "runs/hosted"], capsys).err
    served = cotune(["serve", "runs/hosted", "--port", "0", "--device", "cpu"], capsys)
    assert "leave device and engine out: it answers at its endpoint" in served.err
    assert "is finished" in cotune(fit(server), capsys).out


def test_a_run_that_breaks_off_and_meets_its_budget_pays_for_nothing_twice(
    server: EndpointServer, capsys: pytest.CaptureFixture[str]
) -> None:
    def until(count: int) -> Any:
        return lambda body: species(body) if len(server.bodies) <= count else Reply(status=401)

    server.answer = until(11)
    broken = cotune(fit(server, "--model.lm.concurrency", "1"), capsys)
    assert (broken.code, len(server.bodies)) == (2, 12)
    del server.bodies[11:]  # the one that was not answered

    server.answer = species
    spent = cotune(fit(server, "--budget.lm_calls", "30"), capsys)
    assert (spent.code, len(server.bodies)) == (4, 30)
    assert "budget    lm_calls 30, of which 11 calls" in spent.out
    assert "so it ends early, with the best so far" in spent.out
    assert "ended by budget.lm_calls 30 in step 1 of 1" in spent.out
    assert "set a larger budget.lm_calls to resume" in spent.err
    assert (summary()["best"], summary()["costs"]["program"]["calls"]) == ("vanilla", 30)
    assert Path("runs/hosted/export/prompts.json").is_file()

    file = Path("runs/hosted/spent.json")
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    refused = cotune(fit(server, "--budget.lm_calls", "500"), capsys)
    assert refused.code == 2
    assert "spent.json" in refused.err
    assert "Remove the file to count from 0 again" in refused.err
    file.write_bytes(whole)

    done = cotune(fit(server, "--budget.lm_calls", "500"), capsys)
    assert done.code == 0, done.err
    assert max(asked(server).values()) == 1
    assert (summary()["ended"], summary()["costs"]["program"]["calls"]) == ("", len(server.bodies))


def test_a_schedule_that_trains_names_what_is_missing(
    server: EndpointServer, capsys: pytest.CaptureFixture[str]
) -> None:
    said: Said = cotune(fit(server, "--alternate.schedule", "p -> w"), capsys)
    assert said.code == 2
    assert "m has no weights here, so w is missing what it trains" in said.err
    assert "data.bootstrapping.teacher" in said.err
    assert not Path("runs/hosted/run.json").exists()


def advisers(body: Body) -> str:
    """A teacher that knows the species, a judge that contradicts itself, and one that writes instructions."""
    text = body["messages"][-1]["content"]
    if "verdict" in str(body.get("response_format")):
        right = text.split("reference: ")[-1].split()[0] == text.split("answer: ")[-1].split()[0]
        verdict = "yes" if right and body["seed"] % 3 else "no"
        return json.dumps({"reasoning": "It is so.", "verdict": verdict})
    return species(body) if body["model"] == "teacher" else "```\nName the species.\n```"


def test_teacher_proposer_and_judge_have_lines_and_costs_of_their_own(
    server: EndpointServer, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = advisers

    def lm(option: str, model: str) -> list[str]:
        return [option, "OpenAILM", f"{option}.model", model, f"{option}.endpoint", server.url]

    search = ["--alternate.search", "cotune.ReflectiveSearch", "--alternate.search.max_runs", "24"]
    search += [*lm("--alternate.search.proposer", "proposer"), "--alternate.search.proposer.max_calls", "3"]
    words = [word for word in tiny_fit(tiny_model, schedule="p -> w") if word != "--alternate.search.num_candidates"]
    words.remove("1")
    judge = ["--data.metric", "cotune.programs.LMJudge", *lm("--data.metric.lm", "judge"), "--data.metric.noise", "1"]
    said = cotune([*words, *search, *lm("--data.bootstrapping.teacher", "teacher"), *judge], capsys)
    assert said.code == 0, said.err
    made, asked_of = summary("runs/tiny"), Counter(body["model"] for body in server.bodies)
    assert {role: usage["calls"] for role, usage in made["costs"].items()} == dict(asked_of)
    assert 0 < asked_of["proposer"] <= 3
    assert f"  teacher   OpenAILM('teacher', '{server.url}')" in said.out
    assert f"  proposer  OpenAILM('proposer', '{server.url}'), 3 calls at most" in said.out
    assert "by the teacher" in said.out
    assert made["judge"]["contradicted"] > 0
    assert "Metric: the judge contradicted itself on" in said.out


def test_an_lm_in_this_process_keeps_a_budget_too_and_its_store_is_free(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tiny_fit(tiny_model, schedule="p")
    assert cotune([*words, "--budget.lm_calls", "9"], capsys).code == 4
    assert summary("runs/tiny")["costs"]["program"]["calls"] == 9
    assert cotune([*words, "--budget.lm_calls", "10"], capsys).code == 4
    assert summary("runs/tiny")["costs"]["program"]["calls"] == 10
