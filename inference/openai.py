"""OpenAILM: any endpoint with chat completions as an LM, hosted or local. It loads no weights and no tokenizer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from cotune.errors import BadValueError
from cotune.inference.calls import is_known
from cotune.inference.endpoint import HOSTED, Answer, Endpoint, EndpointError
from cotune.inference.response_format import read_reply, response_format
from cotune.programs.calibration import is_calibrated
from cotune.programs.layout import Field, Fixed, Layout
from cotune.programs.lm import LM, Completion, Request, Sampling
from cotune.programs.usage import Usage

_MAX_STOPS = 4
"""Stop strings that hosted endpoints take. The text is cut at any others here."""
_THOUGHT = re.compile(r"\s*<think>.*?(</think>\s*|\Z)", re.DOTALL)


class OpenAILM(LM):
    """An LM behind an endpoint with chat completions: hosted, vLLM, SGLang, llama.cpp, Ollama, a proxy.

    Requests are under way side by side, and are sent again when the server is busy, slow or gone for a moment.
    Completions have no ids: prompts can be tuned for such an LM, weights cannot. `StoredLM` keeps them as they come.

    Args:
        model: its name at the endpoint.
        endpoint: URL of the API, up to and with its version.
        key_variable: name of the environment variable that holds the key. The key itself is never an option.
        concurrency: requests under way at once.
        timeout: seconds that one try may take.
        tries: of one request.
        response_format: "auto" asks for JSON of a schema where a stage has several outputs or typed ones; if the
            endpoint does not take that, and with "off", the text is read by the form, and asked for once more if it
            cannot be.
        prices: model -> dollars for a million tokens read and for a million written. An answer that says its cost is
            believed.
        extra: further parameters of each request, such as {"reasoning_effort": "low"}.
        max_calls: calls that a run may pay it for; null for as many as its budget allows.

    Attributes:
        usage: what the completions have cost so far.
        answered_by: answers by the model that gave them.
        unpriced: answers that did not say what they cost, while `prices` are not given either.

    Raises:
        ImportError: the openai client is not installed.
        ValueError: an option is out of its range, or the URL holds a secret.
    """

    def __init__(
        self,
        model: str,
        endpoint: str = HOSTED,
        key_variable: str = "OPENAI_API_KEY",
        concurrency: int = 16,
        timeout: float = 120.0,
        tries: int = 6,
        response_format: Literal["auto", "off"] = "auto",
        prices: Mapping[str, Sequence[float]] | None = None,
        extra: Mapping[str, Any] | None = None,
        max_calls: int | None = None,
    ) -> None:
        if response_format not in ("auto", "off"):
            raise BadValueError(f'response_format "{response_format}" is neither auto nor off.')
        if (extra or {}).get("stream"):
            raise BadValueError(
                f'extra has "stream": {(extra or {})["stream"]}, and answers are read as a whole; take it out of extra.'
            )
        self.price = _price(model, prices)
        self.model, self.response_format, self.extra = model, response_format, dict(extra or {})
        self._endpoint = Endpoint(
            endpoint, model, key_variable=key_variable, concurrency=concurrency, timeout=timeout, tries=tries
        )
        self.max_calls = max_calls
        self.usage, self.unpriced = Usage(), 0
        self.answered_by: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"OpenAILM({self.model!r}, {self._endpoint.url!r})"

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this LM from others, as plain values: the endpoint, the model, and how it is asked."""
        return {
            "endpoint": self._endpoint.url,
            "model": self.model,
            "response_format": self.response_format,
            "extra": self.extra,
        }

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion for each request, in their order; equal requests are asked once.

        A request that the endpoint refuses gives a completion "too_long" or "refused", while others are answered.

        Raises:
            EndpointError: the endpoint does not answer, or refuses all.
        """
        names = list(map(repr, requests))
        asked = dict(zip(names, requests, strict=True))
        found: dict[int, Completion] = {}
        for come in self.answers(list(asked.values()), sampling):
            found |= come
        at = {name: place for place, name in enumerate(asked)}
        return [found[at[name]] for name in names]

    def answers(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[dict[int, Completion]]:
        """The same by their places, as they come: each time, all that have come since."""
        retries = self._endpoint.retries
        refused: list[str] = []
        bodies = [self._body(request, sampling) for request in requests]
        try:
            for come in self._endpoint.answers(bodies, known=is_known()) if bodies else ():
                found: dict[int, Completion] = {}
                for at, said in come:
                    if isinstance(said, Answer):
                        found[at] = self._paid(requests[at], said)
                    else:
                        found[at] = Completion("", finished="too_long" if said.too_long else "refused")
                        refused += [] if said.too_long else [said.why]
                yield found
        finally:
            self.usage += Usage(retries=self._endpoint.retries - retries)
        self._check_refused(refused, len(requests))

    def close(self) -> None:
        """Ends the connection; the next request makes a new one."""
        self._endpoint.close()

    def _check_refused(self, refused: Sequence[str], total: int) -> None:
        if not refused:
            return
        if len(refused) == total and not self.usage.calls and not is_known():
            raise EndpointError(
                f'{self._endpoint.url} refuses every request to model "{self.model}": {refused[0]}. What to look at: '
                "the options of the LM (model, extra), and what this server takes."
            )
        if not self.usage.refused:
            print(f"{self._endpoint.url} refused a request, which therefore has no completion: {refused[0]}")
        self.usage += Usage(refused=len(refused))

    def _body(self, request: Request, sampling: Sampling) -> dict[str, Any]:
        """What is sent. A response format needs no stops: JSON says where it ends."""
        if is_calibrated(request.layout):
            raise BadValueError(
                "the prompts have a calibration, and an endpoint cannot add its offsets to the choices, so its answers "
                "would differ from the tuned ones. Run them on a LanguageModel (its rollouts may be on vLLM), or "
                'remove "calibration" from the prompts.'
            )
        form = response_format(request.layout) if self.response_format == "auto" else None
        # No bare line breaks: a server would stop at one in the LM's thinking, or before its first word.
        stops = [] if form else [stop for stop in _stops(request) if stop.strip()][:_MAX_STOPS]
        return {
            "model": self.model,
            "messages": [dict(message) for message in request.messages],
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "seed": request.seed % 2**31,  # some servers take no more
            **({"top_p": sampling.top_p} if sampling.top_p < 1 else {}),
            **({"stop": stops} if stops else {}),
            **({"response_format": form} if form else {}),
            **self.extra,
        }

    def _paid(self, request: Request, answer: Answer) -> Completion:
        """Reads and charges an answer."""
        guessed = answer.tokens_in is None or answer.tokens_out is None
        tokens_in = answer.tokens_in or (_guess(*(m["content"] for m in request.messages)) if guessed else 0)
        tokens_out = answer.tokens_out or (_guess(answer.text) if guessed else 0)
        dollars = answer.dollars
        if dollars is None and self.price is not None:
            dollars = (tokens_in * self.price[0] + tokens_out * self.price[1]) / 1e6
        self.unpriced += dollars is None
        if guessed and not self.usage.estimated:
            print(f"{self._endpoint.url} does not report how many tokens it used; they are estimated from the texts.")
        self._note_model(answer.model)
        self.usage += Usage(1, 0, tokens_in, tokens_out, dollars or 0.0, estimated=int(guessed))
        return _completion(request, answer, formatted=self.response_format == "auto")

    def _note_model(self, answering: str) -> None:
        """Counts the model that answered, and says so once if it is another than was asked."""
        if answering not in self.answered_by and not _same_model(self.model, answering):
            print(f'{self._endpoint.url}: "{answering}" answers in place of "{self.model}", so scores are its own.')
        self.answered_by[answering] += 1


def _completion(request: Request, answer: Answer, *, formatted: bool) -> Completion:
    cut: Literal["length", "eos"] = "length" if answer.finish == "length" else "eos"
    text = _THOUGHT.sub("", answer.text, count=1) if _THOUGHT.match(answer.text) else answer.text
    if answer.finish == "content_filter" and not text.strip():
        return Completion("", finished="refused")
    read = read_reply(request.layout, text) if formatted and response_format(request.layout) else None
    if read is not None:
        return Completion(read[0], finished=cut, fields=read[1])
    began = _began(request.layout, text)
    places = [at for stop in _stops(request) if stop and (at := text.find(stop, 0 if stop.strip() else began)) >= 0]
    return Completion(text[: min(places)], finished="stop") if places else Completion(text, finished=cut)


def _began(layout: Layout, text: str) -> int:
    """Where the last field's value begins, behind its name and blank lines: there a line break may end it."""
    began = 0
    if len(layout) > 1 and isinstance(name := layout[-2], Fixed):
        found = re.search(rf"^[ \t*#]*{re.escape(name.text.strip())}[ \t*]*", text, re.IGNORECASE | re.MULTILINE)
        began = found.end() if found else len(text)
    return len(text) - len(text[began:].lstrip())


def _stops(request: Request) -> list[str]:
    """What ends the completion: the stops of a field that nothing follows."""
    last = request.layout[-1]
    return list(last.stops) if isinstance(last, Field) else []


def _same_model(asked: str, answering: str) -> bool:
    """Whether a name is the asked model's, or that of its dated version.

    >>> _same_model("m-4o", "m-4o-2024-07-18"), _same_model("org/m", "m:latest"), _same_model("m-4", "m-4-turbo")
    (True, True, False)
    """
    short, said = asked.rsplit("/", 1)[-1], answering.rsplit("/", 1)[-1]
    return not answering or re.fullmatch(rf"{re.escape(short)}([-@:](\d[\d-]{{3,}}|latest))?", said) is not None


def _guess(*texts: str) -> int:
    """About how many tokens the texts are: four bytes are one in English."""
    return max(1, sum(len(text.encode(errors="replace")) for text in texts) // 4)


def _price(model: str, prices: Mapping[str, Sequence[float]] | None) -> tuple[float, float] | None:
    if not prices:
        return None
    if model not in prices:
        raise BadValueError(f'prices have no "{model}"; they have {", ".join(prices)}.')
    price = list(prices[model])
    if len(price) != 2 or not all(number >= 0 for number in price):
        raise BadValueError(
            f'the price {price} of "{model}" is not two numbers: dollars for a million tokens in and out.'
        )
    return price[0], price[1]
