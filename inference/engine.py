"""The engine: ids in, ids out. What completes prompts once messages have become tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from cotune.inference.codec import Codec
from cotune.programs.layout import FREE, Layout
from cotune.programs.lm import Filled, Sampling

WAVE = 128
"""Most prompts generated as one unit: enough to keep a batch full, few enough to lose little to a kill."""


@dataclass(frozen=True)
class Prompted:
    """A prompt to complete, as ids, and what its completion is made of."""

    ids: Sequence[int]
    layout: Layout = FREE
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """Ids written (end-of-turn token included, a stop string not), their text, and why they end; the rest as in
    `Completion`."""

    ids: list[int]
    text: str
    finished: Literal["eos", "stop", "length", "too_long"]
    fields: tuple[Filled, ...] = ()
    forced: tuple[bool, ...] = ()
    log_probs: tuple[float, ...] = ()


class Weights(Protocol):
    """What an engine may know of the LM whose prompts it completes. `LanguageModel` is one."""

    @property
    def model(self) -> Any:
        """The transformers model with its adapters, as they are trained."""
        ...

    @property
    def codec(self) -> Codec:
        """Its tokenizer."""
        ...

    @property
    def source(self) -> str:
        """What the base is read from: a folder or a Hub id."""
        ...

    @property
    def window(self) -> int:
        """Longest prompt plus completion, in tokens."""
        ...

    @property
    def version(self) -> Hashable:
        """A value that changes when the weights do."""
        ...

    def fingerprint(self) -> str:
        """Equal for adapters of equal tensors, whenever and wherever they were trained."""
        ...

    def save_adapter(self, folder: Path) -> None:
        """Writes the adapter as PEFT does."""
        ...

    def decodes_together(self, tokens: int) -> bool:
        """Whether texts of so many tokens come out right where prompts share keys and values (`cascade`)."""
        ...


class Engine(ABC):
    """Completes prompts that are given as ids, filling in their layouts.

    An engine of your own has one method to write. `Plan` and `Filling` do the rest: the first says which ids a prompt
    needs room for, the second takes the tokens that your LM chooses and says what comes after them.
    """

    def start(self, weights: Weights) -> None:  # noqa: B027 (one that needs no weights has nothing to do)
        """Told once which weights it is to complete with, when they are loaded."""

    def rest(self) -> None:  # noqa: B027 (most hold nothing that training needs)
        """Told before weights are trained: gives back the memory that training is to have, until the next prompts."""

    @abstractmethod
    def generate(self, prompts: Sequence[Prompted], sampling: Sampling, *, adapter: str) -> list[Generated]:
        """One result a prompt, in order. A prompt without room for its layout gives an empty one, "too_long".

        Args:
            adapter: which adapter of the LM answers; "" for the base alone.
        """

    def waves(self, prompts: Sequence[Prompted]) -> list[list[int]]:
        """Indices of the prompts in the parts that are completed, and stored, as a unit each. It follows from the
        prompts alone, so that a run that is continued makes the same parts again."""
        places = list(range(len(prompts)))
        return [places[start : start + WAVE] for start in range(0, len(places), WAVE)]

    def identity(self) -> Mapping[str, Any]:
        """Plain values that decide what it writes, down to the last bits; completions are stored under them."""
        return {"engine": type(self).__qualname__}
