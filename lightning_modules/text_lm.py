"""TextLM: an LM that only gives text, such as an endpoint, where a fit expects one with weights."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cotune.datamodules.encode import Vocabulary
from cotune.errors import BadValueError
from cotune.inference.calls import StoredLM
from cotune.lightning_modules.usage import Usage
from cotune.programs import LM, BudgetedLM, Completion, Ledger, Request, Sampling
from cotune.programs.usage import Usage as Cost


class NoWeightsError(BadValueError):
    """An LM whose weights are elsewhere, where weights are asked for."""


def no_weights(name: str) -> str:
    """What to say there, and where a device or an engine is given for them."""
    return (
        f"{name} has no weights here, so w is missing what it trains, and a device or an engine has nothing to hold. "
        "To tune it, take p only (--alternate.schedule p), or a LanguageModel as model.lm and this LM as its teacher: "
        "data.bootstrapping.teacher. To serve or load it, leave device and engine out: it answers at its endpoint."
    )


class Keeper(Protocol):
    """What keeps completions, as far as runs ask."""

    @property
    def seconds(self) -> float:
        """Wall time that keeping has taken."""
        ...

    def close(self) -> None:
        """Closes its file; the next use opens it again."""
        ...


class TextLM:
    """Gives any LM what a fit asks of a `LanguageModel`. There is nothing to load, to train or to save.

    Args:
        lm: what is asked. One without an `identity` is known by its class name.

    Attributes:
        usage: what it has been asked so far, as of a `LanguageModel`.
        ledger: what its calls are charged to.
        store: what keeps its completions; None where nothing does.
    """

    window = 1 << 20
    attached = ""  # no adapter
    adapter: str | None = None
    vocabulary = Vocabulary()

    def __init__(self, lm: LM) -> None:
        self.lm, self.usage = lm, Usage()
        self.name = str(getattr(lm, "model", type(lm).__name__))
        self.identity: dict[str, Any] = dict(getattr(lm, "identity", {})) or {"lm": self.name}
        self.ledger = Ledger()
        self.store: Keeper | None = None
        self._asked: LM = lm

    def meter(self, ledger: Ledger, completions: str | Path | None, *, role: str = "program") -> LM:
        """Charges calls to this ledger from now on, and keeps completions in this file, where one is given."""
        self.ledger = ledger
        self._asked, self.store = metered(self.lm, ledger, completions, role=role)
        return self._asked

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """The LM's completions; counts them."""
        began, before = time.perf_counter(), self._cost()
        self.ledger.between()
        try:
            done = self._asked.complete(requests, sampling)
        finally:
            spent, usage = self._cost() - before, self.usage
            usage.prompt_tokens += spent.tokens_in
            usage.completion_tokens += spent.tokens_out
            usage.seconds += time.perf_counter() - began
        self.usage.calls += len(requests)
        self.usage.cached += max(0, len(requests) - spent.calls - spent.refused)
        self.usage.too_long += sum(one.finished == "too_long" for one in done)
        return done

    @property
    def before_wave(self) -> Callable[[], None]:
        """Called between answers; what it raises stops there."""
        return self.ledger.between

    @before_wave.setter
    def before_wave(self, call: Callable[[], None]) -> None:
        self.ledger.between = call

    def described(self, *, seed: int) -> list[str]:
        """What it is, in lines for people."""
        where = self.identity.get("endpoint", type(self.lm).__name__)
        return [f"{self.name} at {where}: its prompts are tuned, it has no weights here"]

    def base_identity(self) -> str:
        """SHA-256 of the LM's identity."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True, default=str).encode()).hexdigest()

    def adapter_state(self) -> dict[str, Any]:
        return {}

    def load_adapter_state(self, state: Mapping[str, Any]) -> None:
        """Takes nothing.

        Raises:
            BadValueError: there is something to take.
        """
        if state:
            raise BadValueError(
                f"the state holds trained weights, but {self.name} is an LM without weights in this process. Set "
                "model.lm.model to the LM that they belong to."
            )

    def close(self) -> None:
        """Ends the connection and closes the store; the next request opens both again."""
        getattr(self._asked, "close", lambda: None)()

    def _cost(self) -> Cost:
        found = getattr(self._asked, "usage", None)
        return found if isinstance(found, Cost) else Cost()


def metered(lm: LM, ledger: Ledger, completions: str | Path | None, *, role: str) -> tuple[LM, Keeper | None]:
    """The LM with its calls charged to a ledger and its answers kept in a file; what it answered before is free.

    An LM that comes with a store, `StoredLM`, keeps that, and one in this process keeps completions as it always does.
    """
    asked = lm.lm if isinstance(lm, StoredLM) else lm
    most = getattr(asked, "max_calls", None)
    if isinstance(lm, StoredLM):
        lm.lm = asked if isinstance(asked, BudgetedLM) else BudgetedLM(asked, ledger, role=role, max_calls=most)
        return lm, lm
    charged = BudgetedLM(lm, ledger, role=role, max_calls=most)
    if completions is None or str(completions) in ("", "off") or not charged.identity:
        return charged, None
    stored = StoredLM(charged, str(completions))
    return stored, stored
