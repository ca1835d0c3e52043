"""Prompts: the parameters of a program that are words. One `Prompt` a stage, held in a mapping by stage name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Demo:
    """One worked example of a stage: the inputs it saw and the outputs it should give.

    A labelled demo may lack outputs for which there is no label (the reasoning, say); a bootstrapped one has them all.
    `source` is the id of the example it comes from, so that a demo is never shown to its own example.
    """

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    source: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {"inputs": dict(self.inputs), "outputs": dict(self.outputs), "source": self.source}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Demo:
        return cls(dict(data["inputs"]), dict(data["outputs"]), data.get("source", ""))


@dataclass(frozen=True)
class Prompt:
    """What a stage's LM call is told: an instruction and few-shot demos.

    Attributes:
        form: names the form in which it is said and answered, one of `cotune.programs.forms.names()`; "" is the run's.
        calibration: output field -> choice -> nats that are added to the choice's log-probability before one is
            chosen; see `cotune.programs.calibration`. Fields that are not named are left as the LM has them.
    """

    instruction: str
    demos: tuple[Demo, ...] = field(default=())
    form: str = ""
    calibration: Mapping[str, Mapping[str, float]] = field(default_factory=dict, hash=False)

    def to_dict(self) -> dict[str, Any]:
        own: dict[str, Any] = {"form": self.form} if self.form else {}
        if self.calibration:
            own["calibration"] = {name: dict(nats) for name, nats in self.calibration.items()}
        return {"instruction": self.instruction, "demos": [demo.to_dict() for demo in self.demos], **own}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Prompt:
        demos = tuple(Demo.from_dict(demo) for demo in data["demos"])
        return cls(data["instruction"], demos, data.get("form", ""), data.get("calibration", {}))


Prompts = Mapping[str, Prompt]
"""The prompts of a whole program: stage name -> Prompt."""


def prompts_to_dict(prompts: Prompts) -> dict[str, Any]:
    """Plain dicts, lists and strings: what JSON files and checkpoints hold."""
    return {stage: prompt.to_dict() for stage, prompt in prompts.items()}


def prompts_from_dict(data: Mapping[str, Any]) -> dict[str, Prompt]:
    """Prompts by stage, from plain types as JSON has them."""
    return {stage: Prompt.from_dict(prompt) for stage, prompt in data.items()}


def prompts_id(prompts: Prompts) -> str:
    """Twelve hex digits that name these prompts by content: equal prompts have equal ids, on every machine.

    >>> prompts_id({"answer": Prompt("Answer.")}) == prompts_id({"answer": Prompt("Answer.")})
    True
    """
    text = json.dumps(prompts_to_dict(prompts), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
