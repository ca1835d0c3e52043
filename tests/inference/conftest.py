"""What the tests of endpoints share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cotune.inference import StoredLM
from cotune.inference.openai import OpenAILM
from endpoint_server import EndpointServer


@pytest.fixture
def lm_at() -> Iterator[Callable[..., Any]]:
    """Makes an LM that waits for milliseconds where a real one waits for seconds; `completions` stores what it says."""
    made: list[OpenAILM] = []

    def make(
        server: EndpointServer | str, completions: str | None = None, model: str = "m", **options: Any
    ) -> OpenAILM | StoredLM:
        lm = OpenAILM(model, server if isinstance(server, str) else server.url, **options)
        lm._endpoint.first_wait = 0.001
        made.append(lm)
        return lm if completions is None else StoredLM(lm, completions)

    yield make
    for lm in made:
        lm.close()
