"""Claims about OpenAILM against a server of our own: right completions after any failure, or one clear error."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from cotune.inference.endpoint import EndpointError
from cotune.inference.openai import OpenAILM
from cotune.programs import Completion, Field, LMUnavailableError, Request, Sampling
from cotune.programs.layout import Choices
from cotune.programs.lm import told_of_completions
from endpoint_server import Body, EndpointServer, Reply, serving

KEY = "sk-canary-0123456789"


@pytest.fixture
def server() -> Iterator[EndpointServer]:
    with serving(shouted) as running:
        yield running


def shouted(body: Body) -> str:
    return str(body["messages"][-1]["content"]).upper()


def asking(*texts: str, **changes: Any) -> list[Request]:
    return [Request([{"role": "user", "content": text}], **changes) for text in texts]


def texts(completions: list[Completion]) -> list[str]:
    return [one.text for one in completions]


def failing(reply: Reply, times: int = 1) -> Callable[[Body], str | Reply]:
    """Each request fails so often before it is answered."""
    seen: Counter[str] = Counter()

    def answer(body: Body) -> str | Reply:
        text = body["messages"][-1]["content"]
        seen[text] += 1
        return reply if seen[text] <= times else shouted(body)

    return answer


LETTERS = [chr(ord("a") + n) for n in range(8)]


# What is sent and what comes back


def test_completions_stand_in_the_order_of_the_requests_and_are_told_of_as_they_come(
    server: EndpointServer, lm_at: Any
) -> None:
    server.answer = lambda body: Reply(shouted(body), wait=0.2 if "a" in shouted(body).lower() else 0)
    told: list[int] = []
    with told_of_completions(told.append):
        assert texts(lm_at(server).complete(asking(*LETTERS), Sampling())) == [letter.upper() for letter in LETTERS]
    assert sum(told) == len(LETTERS)
    assert len(told) > 1


def test_sampling_seed_and_stops_are_sent(server: EndpointServer, lm_at: Any) -> None:
    lm = lm_at(server, extra={"reasoning_effort": "low"})
    layout = (Field("answer", stops=("###", "\nquestion:")),)
    lm.complete(asking("a", seed=2**40 + 7, layout=layout), Sampling(0.7, 0.9, 20))
    (body,) = server.bodies
    assert body.pop("messages") == [{"role": "user", "content": "a"}]
    assert body == {
        "model": "m",
        "max_tokens": 20,
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 7,
        "stop": ["###", "\nquestion:"],
        "reasoning_effort": "low",
    }


def test_a_server_that_takes_no_notice_of_stops_is_cut(server: EndpointServer, lm_at: Any) -> None:
    server.answer = lambda body: "four\nquestion: and 3+3?"
    (one,) = lm_at(server).complete(asking("2+2", layout=(Field("answer", stops=("\nquestion:",)),)), Sampling())
    assert (one.text, one.finished) == ("four", "stop")


def test_thinking_is_no_part_of_a_completion(server: EndpointServer, lm_at: Any) -> None:
    server.answer = lambda body: "<think>\nIs it 4? It is.\n</think>\n\n4" if "2" in shouted(body) else "<think> on and"
    assert texts(lm_at(server).complete(asking("2+2", "x"), Sampling())) == ["4", ""]


def test_a_completion_that_was_cut_says_so(server: EndpointServer, lm_at: Any) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "on and on"}, "finish_reason": "length"}
    server.answer = lambda body: Reply(changes={"choices": [choice]})
    assert lm_at(server).complete(asking("a"), Sampling()) == [Completion("on and on", finished="length")]


def test_no_more_requests_are_under_way_than_allowed(server: EndpointServer, lm_at: Any) -> None:
    server.answer = lambda body: Reply(shouted(body), wait=0.05)
    lm_at(server, concurrency=3).complete(asking(*map(str, range(12))), Sampling())
    assert server.most == 3


def test_equal_requests_are_asked_once(server: EndpointServer, lm_at: Any) -> None:
    lm = lm_at(server)
    assert texts(lm.complete(asking("a", "b", "a"), Sampling())) == ["A", "B", "A"]
    assert (len(server.bodies), lm.usage.calls) == (2, 2)


# Failures that pass


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(Reply(status=status, error={"message": "busy"}), id=str(status))
        for status in (408, 409, 429, 500, 502, 503)
    ]
    + [
        pytest.param(
            Reply(status=429, error={"message": "Rate limit. For more add a payment method: /account/billing"}),
            id="429 that names billing",
        ),
        pytest.param(Reply(reset=True), id="reset"),
        pytest.param(Reply("never read", half=20), id="half a response"),
        pytest.param(Reply(raw=b'{"choices": [{"mess'), id="truncated JSON"),
        pytest.param(Reply(raw=b"<html>We are back soon</html>"), id="another content"),
        pytest.param(Reply(changes={"choices": []}), id="no choices"),
        pytest.param(Reply(changes={"choices": None}), id="no choices at all"),
    ],
)
def test_a_failure_that_passes_changes_no_completion(reply: Reply, server: EndpointServer, lm_at: Any) -> None:
    server.answer = failing(reply, times=2)
    lm = lm_at(server)
    assert texts(lm.complete(asking(*LETTERS), Sampling())) == [letter.upper() for letter in LETTERS]
    assert (lm.usage.calls, lm.usage.retries, lm.usage.refused) == (8, 16, 0)


def test_a_slow_answer_is_asked_for_again(server: EndpointServer, lm_at: Any) -> None:
    server.answer = failing(Reply("late", wait=1.5))
    assert texts(lm_at(server, timeout=0.3).complete(asking("a"), Sampling())) == ["A"]


def test_a_storm_of_429_is_waited_out_as_long_as_the_server_says(server: EndpointServer, lm_at: Any) -> None:
    began = time.monotonic()
    open_at = began + 0.8

    def answer(body: Body) -> str | Reply:
        if time.monotonic() < open_at:
            return Reply(status=429, error={"message": "slow down"}, headers={"retry-after": "0.8"})
        return shouted(body)

    server.answer = answer
    lm = lm_at(server, tries=2)  # tries alone would not last
    assert texts(lm.complete(asking(*LETTERS), Sampling())) == [letter.upper() for letter in LETTERS]
    assert lm.usage.retries <= 8


def test_a_wait_that_one_request_is_ordered_holds_for_all(server: EndpointServer, lm_at: Any) -> None:
    came: dict[str, list[float]] = {}

    def answer(body: Body) -> str | Reply:
        times = came.setdefault(body["messages"][-1]["content"], [])
        times.append(time.monotonic())
        if body["messages"][-1]["content"] == "a" and len(times) == 1:
            return Reply(status=429, error={"message": "slow down"}, headers={"retry-after": "1"})
        return Reply(shouted(body), wait=0.3)

    server.answer = answer
    lm_at(server, concurrency=2).complete(asking("a", "b", "c"), Sampling())
    assert came["c"][0] >= came["a"][0] + 0.95  # b was answered long before


def test_a_wait_until_a_date_is_understood(server: EndpointServer, lm_at: Any) -> None:
    date = formatdate(time.time() + 2, usegmt=True)
    server.answer = failing(Reply(status=503, error={"message": "later"}, headers={"retry-after": date}))
    began = time.monotonic()
    lm_at(server).complete(asking("a"), Sampling())
    assert 0.9 < time.monotonic() - began < 5


# Failures that stay


def test_nobody_listening_is_one_error(lm_at: Any) -> None:
    with serving(shouted) as gone:
        url = gone.url
    with pytest.raises(
        EndpointError, match=rf'{url} does not answer for model "m": .*refused.*after 2 tries'
    ) as caught:
        lm_at(url, tries=2).complete(asking("a", "b"), Sampling())
    assert isinstance(caught.value, LMUnavailableError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (
            401,
            {"message": f"Incorrect API key provided: {KEY}"},
            r"key is read from .* OPENAI_API_KEY: is it the right",
        ),
        (404, {"message": 'The model "m" does not exist'}, r'"m" does not exist.*does the server have that model'),
        (402, {"message": "pay"}, "out of credit"),
        (429, {"message": "You exceeded your current quota", "code": "insufficient_quota"}, "out of credit"),
        (400, {"message": "Unknown parameter: reasoning_effort"}, "refuses every request .* reasoning_effort"),
        (503, {"message": "down for the day"}, "503, down for the day, after 3 tries"),
    ],
)
def test_a_failure_of_the_set_up_is_one_error_without_the_key(
    status: int, error: Any, said: str, server: EndpointServer, lm_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.answer = lambda body: Reply(status=status, error=error)
    lm = lm_at(server, tries=3)
    with pytest.raises(EndpointError, match=said) as caught:
        lm.complete(asking("a"), Sampling())
    assert KEY not in str(caught.value)
    assert server.keys[0] == f"Bearer {KEY}"
    assert len(server.bodies) == (3 if status == 503 else 1)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (
            Reply(status=429, error={"message": "slow down"}),
            r"429, slow down, after 2 tries\. .* lower this LM's concurrency \(now 5\), or wait and start",
        ),
        (Reply(status=502, raw=b"<html>bad gateway</html>"), "status 502, .* its log or its status page"),
        (
            Reply("x" * 500, changes={"choices": None, "error": {"code": 502, "message": "Provider returned error"}}),
            "in place of a completion: Provider returned error, after 2 tries.* the server behind that address",
        ),
        (Reply("x", changes={"choices": None, "error": "no GPU"}), "in place of a completion: no GPU"),
        (Reply(raw=b"<html>hi"), "holds no completion .* is it an endpoint with chat completions"),
        (Reply("x", wait=0.3), "no answer within 0.1 s.* is it running.* needs a higher timeout"),
    ],
)
def test_what_to_look_at_follows_from_what_went_wrong(
    reply: Reply, said: str, server: EndpointServer, lm_at: Any
) -> None:
    server.answer = lambda body: reply
    timeout = 0.1 if reply.wait else 60.0
    with pytest.raises(EndpointError, match=said):
        lm_at(server, tries=2, concurrency=5, timeout=timeout).complete(asking("a"), Sampling())


def test_an_endpoint_that_refuses_everything_is_not_asked_everything(server: EndpointServer, lm_at: Any) -> None:
    server.answer = lambda body: Reply(status=400, error={"message": "no such option"})
    with pytest.raises(EndpointError, match="refuses every request, status 400, no such option"):
        lm_at(server, concurrency=2).complete(asking(*map(str, range(50))), Sampling())
    assert len(server.bodies) < 12


def test_calibrated_prompts_are_refused_before_anything_is_asked(server: EndpointServer, lm_at: Any) -> None:
    lifted = asking("a", layout=(Field("mood", syntax=Choices(("good", "bad"), (0.0, 2.0))),))
    with pytest.raises(ValueError, match="the prompts have a calibration, and an endpoint cannot add its offsets"):
        lm_at(server).complete(lifted, Sampling())
    assert not server.bodies


def test_a_wait_for_hours_ends_the_run(server: EndpointServer, lm_at: Any) -> None:
    server.answer = lambda body: Reply(status=429, error={"message": "tomorrow"}, headers={"retry-after": "80000"})
    with pytest.raises(EndpointError, match="asks to wait 80000 s"):
        lm_at(server).complete(asking("a"), Sampling())


def test_one_bad_request_spoils_no_other(
    server: EndpointServer, lm_at: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"message": "This model's maximum context length is 4096 tokens", "code": "context_length_exceeded"}
    replies = {
        "b": Reply(status=400, error=long),
        "c": Reply(status=400, error={"message": "content policy"}),
        "d": Reply(status=500, error={"message": "it makes the server fall over"}),
    }
    server.answer = lambda body: replies.get(body["messages"][-1]["content"], shouted(body))
    lm = lm_at(server, tries=3, concurrency=1)
    done = lm.complete(asking("a", "b", "c"), Sampling()) + lm.complete(asking("e"), Sampling())
    assert [one.finished for one in done] == ["eos", "too_long", "refused", "eos"]
    assert (lm.usage.calls, lm.usage.refused) == (2, 1)
    assert "refused a request, which therefore has no completion: status 400, content policy" in capsys.readouterr().out


def test_a_request_that_breaks_the_server_is_refused_while_others_are_answered(
    server: EndpointServer, lm_at: Any
) -> None:
    def answer(body: Body) -> str | Reply:
        if body["messages"][-1]["content"] == "b":
            return Reply(status=500, error={"message": "it makes the server fall over"}, wait=0.1)
        return shouted(body)

    server.answer = answer
    done = lm_at(server, tries=3, concurrency=2).complete(asking("b", *"acdefgh"), Sampling())
    assert [one.finished for one in done] == ["refused", *["eos"] * 7]


def test_what_was_answered_before_the_endpoint_was_lost_is_stored(
    server: EndpointServer, lm_at: Any, tmp_path: Path
) -> None:
    server.answer = lambda body: Reply(status=401, error={"message": "no"}) if len(server.bodies) > 5 else shouted(body)
    store = str(tmp_path / "calls.sqlite")
    with pytest.raises(EndpointError):
        lm_at(server, completions=store, concurrency=1).complete(asking(*LETTERS), Sampling())
    server.answer = shouted
    lm = lm_at(server, completions=store)
    assert texts(lm.complete(asking(*LETTERS), Sampling())) == [letter.upper() for letter in LETTERS]
    assert (lm.usage.stored, lm.usage.calls) == (5, 3)


# What an endpoint does not take


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("seed", {"message": "Unsupported parameter", "param": "seed"}),
        ("temperature", {"message": "Unsupported value: 'temperature' does not support 0 with this model."}),
    ],
)
def test_a_parameter_that_is_not_taken_is_left_out_and_named(
    name: str, error: Any, server: EndpointServer, lm_at: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = lambda body: Reply(status=400, error=error) if name in body else shouted(body)
    lm = lm_at(server, concurrency=1)
    assert texts(lm.complete(asking(*LETTERS), Sampling())) == [letter.upper() for letter in LETTERS]
    assert len(server.bodies) == 9  # learnt once
    assert capsys.readouterr().out.count(f'"m" does not take {name}; it is left out.') == 1


def test_the_newer_name_of_the_token_limit_is_found(server: EndpointServer, lm_at: Any) -> None:
    said = {"message": "'max_tokens' is not supported: use 'max_completion_tokens' instead.", "param": "max_tokens"}
    server.answer = lambda body: Reply(status=400, error=said) if "max_tokens" in body else shouted(body)
    lm_at(server).complete(asking("a"), Sampling(max_new_tokens=9))
    assert server.bodies[-1]["max_completion_tokens"] == 9


# Cost, and who answers


def test_cost_comes_from_the_answer_or_from_the_prices(server: EndpointServer, lm_at: Any) -> None:
    usage = {"prompt_tokens": 1000, "completion_tokens": 100}
    server.answer = lambda body: Reply(changes={"usage": {**usage, **({"cost": 0.5} if shouted(body) == "B" else {})}})
    lm = lm_at(server, prices={"m": [2.0, 10.0], "other": [1, 1]})
    lm.complete(asking("a", "b"), Sampling())
    assert lm.usage.dollars == pytest.approx(0.003 + 0.5)
    assert (lm.usage.tokens_in, lm.usage.tokens_out, lm.usage.estimated) == (2000, 200, 0)
    free = lm_at(server)
    free.complete(asking("a", "b"), Sampling())
    assert (lm.unpriced, free.unpriced, free.usage.dollars) == (0, 1, 0.5)
    with pytest.raises(ValueError, match='prices have no "m"; they have other'):
        lm_at(server, prices={"other": [1, 1]})


def test_tokens_that_an_answer_does_not_count_are_guessed_and_said(
    server: EndpointServer, lm_at: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = lambda body: Reply("x" * 40, changes={"usage": None})
    lm = lm_at(server)
    lm.complete(asking("y" * 400, "z" * 400), Sampling())
    assert (lm.usage.tokens_in, lm.usage.tokens_out, lm.usage.estimated) == (200, 20, 2)
    assert capsys.readouterr().out.count("does not report how many tokens it used") == 1


def test_another_model_answering_is_said_once(
    server: EndpointServer, lm_at: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = lambda body: Reply("x", changes={"model": "m-mini" if shouted(body) == "C" else "m-2026-01-01"})
    lm = lm_at(server)
    for _ in range(2):
        lm.complete(asking("a", "b", "c"), Sampling())
    assert lm.answered_by == {"m-2026-01-01": 4, "m-mini": 2}
    assert capsys.readouterr().out.count('"m-mini" answers in place of "m"') == 1


# Keys


def test_the_key_stands_nowhere_but_in_the_request(
    server: EndpointServer, lm_at: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OTHER_KEY", KEY)
    lm = lm_at(server, key_variable="OTHER_KEY", completions=str(tmp_path / "calls.sqlite"))
    lm.complete(asking("a"), Sampling())
    assert server.keys == [f"Bearer {KEY}"]
    assert KEY not in f"{lm!r} {lm.identity} {vars(lm.lm)} {vars(lm.lm._endpoint)} {copy.deepcopy(lm)}"
    lm.close()
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.iterdir())


def test_a_key_in_the_wrong_place_is_refused_and_not_repeated() -> None:
    for options in ({"endpoint": f"https://user:{KEY}@host/v1"}, {"key_variable": KEY}):
        with pytest.raises(ValueError) as caught:
            OpenAILM("m", **options)
        assert KEY not in str(caught.value)


def test_the_hosted_endpoint_asks_for_a_key_before_it_is_asked(lm_at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(EndpointError, match="set the environment variable OPENAI_API_KEY"):
        lm_at("https://api.openai.com/v1").complete(asking("a"), Sampling())


def test_a_copy_of_the_lm_connects_itself(server: EndpointServer, lm_at: Any) -> None:
    lm = lm_at(server)
    lm.complete(asking("a"), Sampling())
    twin = copy.deepcopy(lm)
    assert texts(twin.complete(asking("b"), Sampling())) == ["B"]
    twin.close()


def test_it_serves_threads_side_by_side(server: EndpointServer, lm_at: Any) -> None:
    lm, found = lm_at(server), {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: texts(lm.complete(asking(f"t{n}"), Sampling()))}))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: [f"T{n}"] for n in range(4)}


# The store


def test_a_stored_answer_is_not_paid_again(server: EndpointServer, lm_at: Any, tmp_path: Path) -> None:
    store = str(tmp_path / "completions.sqlite")
    lm_at(server, completions=store).complete(asking("a", "b"), Sampling())
    again = lm_at(server, completions=store)
    assert texts(again.complete(asking("a", "b", "c"), Sampling())) == ["A", "B", "C"]
    assert (again.usage.stored, again.usage.calls, len(server.bodies)) == (2, 1, 3)


def test_a_request_that_differs_in_anything_is_asked_again(server: EndpointServer, lm_at: Any, tmp_path: Path) -> None:
    store = str(tmp_path / "completions.sqlite")
    base = asking("a", seed=1)
    others = [asking("b", seed=1), asking("a", seed=2), asking("a", seed=1, layout=(Field("x"),))]
    others.append(asking("a", seed=1, layout=(Field("x", stops=("s",)),)))
    lm = lm_at(server, completions=store)
    lm.complete(base, Sampling())
    for request in others:
        lm.complete(request, Sampling())
    for sampling in (Sampling(0.5), Sampling(max_new_tokens=9), Sampling(top_p=0.5)):
        lm.complete(base, sampling)
    lm_at(server, completions=store, model="other").complete(base, Sampling())
    lm_at(server, completions=store, extra={"k": 1}).complete(base, Sampling())
    assert len(server.bodies) == 1 + len(others) + 3 + 2


def test_a_killed_run_pays_no_answered_call_again(server: EndpointServer, tmp_path: Path) -> None:
    store = str(tmp_path / "completions.sqlite")
    server.answer = lambda body: Reply(shouted(body), wait=0.05)
    code = (
        "from cotune.inference import OpenAILM, StoredLM; from cotune.programs import Request, Sampling; import sys;"
        f"lm = StoredLM(OpenAILM('m', {server.url!r}, concurrency=2), {store!r});"
        "asked = [Request([{'role': 'user', 'content': str(n)}]) for n in range(40)];"
        "print([one.text for one in lm.complete(asked, Sampling())])"
    )
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    while len(server.bodies) < 15:
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    paid = server.asked
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([str(n) for n in range(40)])
    twice = [text for text, times in Counter(server.asked).items() if times > 1]
    assert len(paid) < 40
    assert len(twice) <= 4  # under way or just come when it was killed: two at a time, and a transaction


# What it imports


def test_it_loads_no_weights_library() -> None:
    code = (
        "import sys, cotune.inference.openai, cotune.programs.judge;"
        "print([name for name in ('torch', 'transformers', 'peft', 'lightning', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_client_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r'pip install "cotune\[openai\]"'):
        OpenAILM("m", "http://127.0.0.1:1/v1")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"concurrency": 0}, "concurrency 0"),
        ({"timeout": -1}, "timeout -1"),
        ({"tries": 0}, "tries 0"),
        ({"endpoint": "localhost:8000"}, r'endpoint "localhost:8000" is no http or https URL'),
        ({"response_format": "json"}, 'response_format "json"'),
        ({"prices": {"m": [1]}}, r"the price \[1\]"),
        ({"extra": {"stream": True}}, 'extra has "stream": True, .* take it out of extra'),
    ],
)
def test_an_option_out_of_range_is_named(options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        OpenAILM("m", **options)
