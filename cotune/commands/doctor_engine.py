"""cotune doctor --engine URL: what an endpoint with chat completions takes, each line asked of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from cotune.commands.doctor import Finding
from cotune.inference.endpoint import Endpoint

_PATIENCE = 60.0
"""Seconds for one request."""

_SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"answer": {"type": "integer"}},
            "required": ["answer"],
            "additionalProperties": False,
        },
    },
}
_SHOWN = 5
"""Models that are named."""


def engine_findings(url: str, model: str = "", key_variable: str = "OPENAI_API_KEY") -> Iterator[Finding]:
    """Reaches it, lists its models, asks for one token, and tries what runs use where it is there.

    Five requests of a few tokens each, and one more of a vLLM server. The key is read from the environment variable,
    and not shown.
    """
    try:
        Endpoint(url, model, key_variable=key_variable)
        import openai
    except (ImportError, ValueError) as error:
        yield Finding("engine", "options", "problem", str(error))
        return
    key = os.environ.get(key_variable, "")
    client = openai.OpenAI(base_url=url, api_key=key or "none", timeout=_PATIENCE, max_retries=0)
    try:
        names = [one.id for one in client.models.list()]
    except openai.APIConnectionError as error:
        fix = "is it running, and is the address right, up to and with its version (/v1)?"
        yield Finding(
            "engine", "reached", "problem", f"{url} does not answer: {_clean(error.__cause__ or error, key)}", fix
        )
        return
    except openai.APIStatusError as error:
        if error.status_code in (401, 403):
            yield Finding("engine", "reached", "problem", _status(error, key), f"set {key_variable} to its key")
            return
        names = []
        yield Finding("engine", "models", "note", f"not listed ({_status(error, key)})", "name one: --model NAME")
    else:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        yield Finding("engine", "models", "ok", (", ".join(names[:_SHOWN]) or "none") + more)
    asked = model or next(iter(names), "")
    if not asked:
        yield Finding("engine", "a request", "problem", "there is no model to ask", "--model NAME")
        return
    yield from _requests(client, asked, key)
    yield from rollout_findings(url.rstrip("/").removesuffix("/v1"), asked, key)


def rollout_findings(root: str, model: str, key: str) -> Iterator[Finding]:
    """Of a vLLM server, whether `VLLMServer` can have completions from it: ids both ways, adapters at any time."""
    import httpx2

    with httpx2.Client(timeout=_PATIENCE, headers={"authorization": f"Bearer {key}"} if key else {}) as http:
        try:
            version = http.get(f"{root}/version").json()["version"]
            asked = {"model": model, "prompt": [1], "max_tokens": 1, "return_token_ids": True}
            ids = bool(http.post(f"{root}/v1/completions", json=asked).json()["choices"][0].get("token_ids"))
            loads = http.post(f"{root}/v1/load_lora_adapter", json={}).status_code != 404
        except (httpx2.HTTPError, ValueError, KeyError, TypeError, IndexError):
            return
    lacks = ["it gives no token ids"] * (not ids)
    lacks += ["it loads no adapters (VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora)"] * (not loads)
    said = "; ".join(lacks) or "ids both ways, adapters at any time"
    yield Finding("engine", "rollouts", "note" if lacks else "ok", f"vLLM {version}: {said}")


def _requests(client: Any, model: str, key: str) -> Iterator[Finding]:
    import openai

    began = time.perf_counter()
    try:
        answered = _ask(client, model, max_tokens=1)
    except openai.APIError as error:
        yield Finding("engine", "a request", "problem", f'"{model}": {_status(error, key)}', "is that a model there?")
        return
    took, usage = time.perf_counter() - began, answered.usage
    counted = f"{usage.prompt_tokens} tokens read, {usage.completion_tokens} written" if usage else "no usage said"
    other = f'; "{answered.model}" answers' if answered.model != model else ""
    yield Finding("engine", "a request", "ok" if usage else "note", f'"{model}" in {took:.2f} s, {counted}{other}')
    for name, extra, without in (
        ("seed", {"seed": 1}, "it is left out"),
        ("logprobs", {"logprobs": True, "top_logprobs": 1}, "nothing in cotune asks an endpoint for them yet"),
        ("response_format", {"response_format": _SCHEMA, "max_tokens": 64}, "fields are read from the text"),
    ):
        why = _refused(client, model, name, extra, key)
        yield Finding("engine", name, "note" if why else "ok", f"not taken: {why}; {without}" if why else "taken")


def _refused(client: Any, model: str, name: str, extra: Mapping[str, Any], key: str) -> str:
    """Why an endpoint does not take a parameter; "" where it does, and does what it is asked."""
    import openai

    try:
        (choice, *_) = _ask(client, model, **{"max_tokens": 1, **extra}).choices
    except openai.APIError as error:
        return _status(error, key)
    if name == "logprobs" and not (choice.logprobs and choice.logprobs.content):
        return "it answers without them"
    if name == "response_format":
        try:
            json.loads(choice.message.content or "")["answer"]
        except (ValueError, KeyError, TypeError):
            return f"it answers {choice.message.content!r:.60}"
    return ""


def _ask(client: Any, model: str, **more: Any) -> Any:
    said = [{"role": "user", "content": "What is 2 + 3? Answer with the number."}]
    return client.chat.completions.create(model=model, messages=said, temperature=0, **more)


def _status(error: Any, key: str) -> str:
    status = getattr(error, "status_code", None)
    return _clean(f"status {status}, {error.message}" if status else error, key)


def _clean(said: Any, key: str) -> str:
    text = " ".join(str(said).split())
    return (text.replace(key, "***") if key else text)[:200]
