"""Claims about what an endpoint refuses: a fault of one request scores that rollout 0, any other ends the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cotune.inference import StoredLM
from cotune.inference.endpoint import EndpointError
from cotune.inference.try_error import TryError
from cotune.programs import BudgetedLM, Field, Fixed, Ledger, Request, Sampling
from endpoint_server import Body, EndpointServer, Reply, serving

FILTERED = Reply(status=400, error={"message": "The prompt triggers the content management policy", "code": "filter"})
FLAGGED = Reply(status=403, error={"message": 'm requires moderation. Your input was flagged for "violence"'})
BROKEN = Reply(status=500, error={"message": "it makes the server fall over"})
DOWN = Reply(status=503, error={"message": "overloaded"}, wait=0.05)


@pytest.fixture
def server() -> Iterator[EndpointServer]:
    with serving(said) as running:
        yield running


def said(body: Body) -> str:
    return str(body["messages"][-1]["content"]).upper()


def replying(reply: Reply) -> Callable[[Body], str | Reply]:
    """Whatever speaks of something bad gets this reply."""
    return lambda body: reply if "BAD" in said(body) else said(body)


def ended(lm: Any, *texts: str) -> list[str]:
    """How the completions of these requests ended."""
    asked = [Request([{"role": "user", "content": text}]) for text in texts]
    return [one.finished for one in lm.complete(asked, Sampling())]


# A run that is resumed


@pytest.mark.parametrize("reply", [FILTERED, FLAGGED, BROKEN], ids=["filtered", "flagged", "broken"])
def test_a_resumed_run_goes_on_where_all_that_is_left_was_refused(
    reply: Reply, server: EndpointServer, lm_at: Any, tmp_path: Path
) -> None:
    server.answer = replying(reply)
    texts = ["a", "b", *(f"bad {n}" for n in range(9))]  # more than may be refused before anything is answered
    for _process in range(2):
        charged = BudgetedLM(lm_at(server, concurrency=1, tries=2), Ledger())
        lm = StoredLM(charged, str(tmp_path / "calls.sqlite"))
        assert ended(lm, *texts) == ["eos"] * 2 + ["refused"] * 9
        lm.close()
    assert sum(text in ("a", "b") for text in server.asked) == 2


def test_an_endpoint_that_refuses_all_of_a_new_run_is_an_error_with_a_store_too(
    server: EndpointServer, lm_at: Any, tmp_path: Path
) -> None:
    server.answer = replying(FILTERED)
    with pytest.raises(EndpointError, match="refuses every request"):
        ended(StoredLM(lm_at(server), str(tmp_path / "calls.sqlite")), "bad", "bad too")


# An outage, and a request that breaks the server


@pytest.mark.parametrize("tries", [1, 3])
def test_an_outage_is_no_refusal_of_what_was_under_way(tries: int, server: EndpointServer, lm_at: Any) -> None:
    server.answer = lambda body: said(body) if len(server.bodies) <= 2 else DOWN
    asked = [Request([{"role": "user", "content": str(n)}]) for n in range(20)]
    answers, came = lm_at(server, concurrency=8, tries=tries).answers(asked, Sampling()), []
    with pytest.raises(EndpointError, match="503, overloaded, after"):
        came.extend(one.finished for come in answers for one in come.values())
    assert came == ["eos", "eos"]


def test_a_request_that_breaks_the_server_is_refused_though_no_other_is_left(
    server: EndpointServer, lm_at: Any
) -> None:
    server.answer = replying(BROKEN)
    assert ended(lm_at(server, concurrency=1, tries=3), "a", "bad") == ["eos", "refused"]
    assert server.asked == ["a", *["bad"] * 3, "Say hello.", "bad", "Say hello."]


# A 403, which may be the content's or the key's


def test_flagged_content_is_refused_once_others_were_answered(server: EndpointServer, lm_at: Any) -> None:
    server.answer = replying(FLAGGED)
    assert ended(lm_at(server, concurrency=1), "a", "bad", "b") == ["eos", "refused", "eos"]


@pytest.mark.parametrize("good", [0, 3], ids=["from the start", "after others were answered"])
def test_a_key_that_has_no_rights_is_an_error(good: int, server: EndpointServer, lm_at: Any) -> None:
    forbidden = Reply(status=403, error={"message": "Forbidden"})
    server.answer = lambda body: said(body) if len(server.bodies) <= good else forbidden
    lm = lm_at(server, concurrency=1)
    with pytest.raises(EndpointError, match=r"403, Forbidden.* the key is read from"):
        ended(lm, *"abcdef")
    assert lm.usage.refused == 0


# Parameters


@pytest.mark.parametrize("quoting", ["Blocked by policy: '{}'", "Invalid content: '{}'"])
def test_a_refusal_that_quotes_a_prompt_takes_no_parameter_away(
    quoting: str, server: EndpointServer, lm_at: Any
) -> None:
    def answer(body: Body) -> str | Reply:
        text = body["messages"][-1]["content"]
        return Reply(status=400, error={"message": quoting.format(text)}) if "bad" in text else said(body)

    server.answer = answer
    texts = ["a", "bad: the temperature at which to stop", "b"]
    assert ended(lm_at(server, concurrency=1), *texts) == ["eos", "refused", "eos"]
    assert {"temperature", "seed"} <= set(server.bodies[-1])


@pytest.mark.parametrize(
    "text",
    [
        "Unrecognized request argument supplied: seed",
        "property 'seed' is unsupported",
        "this model doesn't support seed",
        'Unknown name "seed": Cannot find field.',
        "[{'type': 'extra_forbidden', 'loc': ('body', 'seed'), 'msg': 'Extra inputs are not permitted'}]",
        "seed is not yet supported",
    ],
)
def test_a_parameter_that_is_said_not_to_be_taken_is_blamed(text: str) -> None:
    fault = TryError("", 400, text)
    assert fault.blames("seed")
    assert not fault.blames("temperature")


# Line breaks as stops

LINE = Field("answer", stops=("\n", "\nquestion:"))


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ((LINE,), "<think>\nIt is the capital.\n</think>\n\nParis\nThat is in France."),
        ((LINE,), "\n\nParis\nquestion: and of Spain?"),
        ((Field("reasoning"), Fixed("\n\nanswer:"), LINE), "It is\nthe capital.\n\nAnswer: Paris\nAnd so on."),
    ],
    ids=["thinking", "blank lines", "several fields"],
)
def test_a_line_break_ends_a_line_behind_where_it_begins(
    layout: Any, text: str, server: EndpointServer, lm_at: Any
) -> None:
    server.answer = lambda body: text[: min([len(text), *(text.find(s) for s in body.get("stop", []) if s in text)])]
    request = Request([{"role": "user", "content": "?"}], layout=layout)
    (one,) = lm_at(server, response_format="off").complete([request], Sampling())
    assert one.text.endswith("Paris")
    assert server.bodies[0]["stop"] == ["\nquestion:"]
