"""For tests of your own programs, searches and metrics: an LM and an engine that write what a function says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from cotune.inference import Filling, Plan
from cotune.inference.engine import Engine, Generated, Prompted, Weights
from cotune.programs import Completion, Field, Fixed, Request, Sampling
from cotune.programs.layout import Layout

_CPU = torch.device("cpu")

EOS = 256
"""The id after the 256 byte values, as FakeLM writes it."""


class FakeLM:
    """An LM whose completions are a function of the request; its tokens are the bytes of the text.

    It stops at stop strings, cuts at `max_new_tokens` and refuses prompts over its window, as a real one does.

    Args:
        answer: request -> the text it would write, or a whole Completion.
        window: longest prompt in tokens (bytes); None for any length.

    Attributes:
        batches: the requests of every `complete` call.
        samplings: its sampling, call by call.
    """

    def __init__(self, answer: Callable[[Request], str | Completion], window: int | None = None) -> None:
        self.answer, self.window = answer, window
        self.batches: list[list[Request]] = []
        self.samplings: list[Sampling] = []

    @property
    def requests(self) -> list[Request]:
        return [request for batch in self.batches for request in batch]

    @property
    def calls(self) -> int:
        """Completions asked for."""
        return len(self.requests)

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.batches.append(list(requests))
        self.samplings.append(sampling)
        return [self._complete(request, sampling) for request in requests]

    def _complete(self, request: Request, sampling: Sampling) -> Completion:
        prompt = tuple("\n".join(f"{m['role']}\n{m['content']}" for m in request.messages).encode())
        if self.window is not None and len(prompt) > self.window:
            return Completion("", prompt, (), "too_long")
        written = self.answer(request)
        if isinstance(written, Completion):
            return written
        stops = [stop for part in request.layout[-1:] if isinstance(part, Field) for stop in part.stops]
        marks = [part.text.strip() for part in request.layout if isinstance(part, Fixed)]
        last = max(written.find(marks[-1]), 0) if marks else 0  # stops end the last field, not those before it
        cut = min((at for stop in stops if (at := written.find(stop, last)) >= 0), default=-1)
        text = written if cut < 0 else written[:cut]
        ids = tuple(text.encode())
        if len(ids) > sampling.max_new_tokens:
            ids = ids[: sampling.max_new_tokens]
            return Completion(bytes(ids).decode(errors="ignore"), prompt, ids, "length")
        return Completion(text, prompt, ids, "stop") if cut >= 0 else Completion(text, prompt, (*ids, EOS), "eos")


class FakeEngine(Engine):
    """An engine that writes the fields a function says, as ids of the LM's own tokenizer.

    Forms are filled in and constraints hold as with any engine; the weights are not run.

    Args:
        answer: the prompt's text -> what to write, by the name of the field. A field that it leaves out is empty, or
            what its constraint allows first.
    """

    def __init__(self, answer: Callable[[str], Mapping[str, str]]) -> None:
        self.answer = answer

    def start(self, weights: Weights) -> None:
        self.codec, self.window = weights.codec, weights.window

    def generate(self, prompts: Sequence[Prompted], sampling: Sampling, *, adapter: str) -> list[Generated]:
        return [self._one(prompt, sampling) for prompt in prompts]

    def _one(self, prompt: Prompted, sampling: Sampling) -> Generated:
        plan, room = Plan(prompt.layout, self.codec), self.window - len(prompt.ids)
        if room < plan.least:
            return Generated([], "", "too_long")
        filling = Filling(plan, max_new_tokens=sampling.max_new_tokens, room=room)
        message, width = self.answer(self.codec.decode(prompt.ids)), len(self.codec.vocabulary.tokens)
        while filling.finished is None:
            token, forbidden_V = self._next(filling, prompt.layout, message), filling.forbidden(width, _CPU)
            if forbidden_V is not None and forbidden_V[token]:
                token = int((~forbidden_V).nonzero()[0])
            filling.take(token)
        return Generated(filling.written, filling.text, filling.finished, tuple(filling.fields), tuple(filling.forced))

    def _next(self, filling: Filling, layout: Layout, said: Mapping[str, str]) -> int:
        """The first token of what is not written yet of the open field; where all is, the end of the turn."""
        context, target, filled = self.codec.decode(filling.written), "", iter(filling.fields)
        for part in layout:
            if isinstance(part, Fixed):
                target += part.text
            elif (done := next(filled, None)) is not None:
                target += done.text
            else:
                target += part.lead + said.get(part.name, "")
                break
        rest = target[len(context) :] if target.startswith(context) else ""
        return self.codec.continues(context, rest)[0][0] if rest else self.codec.end_ids[0]


def instruction(request: Request) -> str:
    """First line of the system message: the prompt's instruction, if it is one line."""
    return request.messages[0]["content"].splitlines()[0]


def asked(request: Request, name: str) -> str:
    """An input field of the call itself (not of a demo), if its value is one line."""
    lines = request.messages[-1]["content"].splitlines()
    return next(line.removeprefix(f"{name}: ") for line in lines if line.startswith(f"{name}: "))


def shown(request: Request) -> int:
    """How many demos the request shows."""
    return sum(message["role"] == "assistant" for message in request.messages)
