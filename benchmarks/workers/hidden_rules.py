"""A scripted task for prompt searches: find 8 rules of 40 from noisy scores. Standard library only, for all sides.

A program of up to three stages is right to the degree that its instructions hold the hidden rules. Each rule belongs to
one stage and counts only there. Feedback names one rule that is broken. A fake proposer reads it and obeys, mostly.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

STAGES = ("plan", "work", "check")
RULES, HIDDEN = 40, 8
NOISE = 0.1
"""Standard deviation of what is added to a score."""

OBEYS = 0.7
"""Chance that the proposer does what feedback asks for."""

_RULE = re.compile(r"Rule (\d+):")


@dataclass
class Task:
    """The hidden rules of one seed, and what has been asked of it.

    Attributes:
        feedback: whether runs say which rule is broken.
        stages: how many the program has.
        runs: of the program so far.
        solved_at: `runs` when prompts with all rules first ran on an example of dev; 0 before.
    """

    seed: int
    feedback: bool = True
    stages: int = len(STAGES)
    runs: int = 0
    solved_at: int = 0
    hidden: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.hidden = tuple(random.Random(f"rules {self.seed}").sample(range(RULES), HIDDEN))

    def obeyed(self, instructions: Mapping[str, str]) -> list[int]:
        """The hidden rules that these instructions hold, each in its own stage."""
        return [rule for rule in self.hidden if rule in rules_in(instructions[self.stage_of(rule)])]

    def run(self, instructions: Mapping[str, str], example: str) -> tuple[float, str, str, dict[str, float]]:
        """One run of the program: score, feedback, the stage that it is about, and two objectives.

        The noise is drawn from the instructions and the example, as of an LM without sampling: the same prompts on the
        same example give the same score.
        """
        self.runs += 1
        obeyed = self.obeyed(instructions)
        if len(obeyed) == HIDDEN and not self.solved_at and example.startswith("dev"):
            self.solved_at = self.runs
        rng = random.Random(f"run {self.seed} {example} {sorted(instructions.items())}")
        score = min(1.0, max(0.0, len(obeyed) / HIDDEN + rng.gauss(0, NOISE)))
        broken = [rule for rule in self.hidden if rule not in obeyed]
        halves = {
            name: sum(rule in obeyed for rule in half) / len(half)
            for name, half in (("first", self.hidden[: HIDDEN // 2]), ("second", self.hidden[HIDDEN // 2 :]))
        }
        if not broken or not self.feedback:
            return score, "", "", halves
        rule = rng.choice(broken)
        stage = self.stage_of(rule)
        return score, f'"{stage}" breaks Rule {rule}: {text_of(rule)}', stage, halves

    def stage_of(self, rule: int) -> str:
        return STAGES[rule % self.stages]

    def propose(self, stage: str, current: str, feedback: str, draw: str) -> str:
        """What the fake proposer writes: the current instruction, with each rule added that the feedback names for this
        stage, with the chance `OBEYS`; where it names none, with one of the stage's rules at random. `draw` seeds it.
        """
        rng = random.Random(f"propose {draw}")
        named = sorted(rule for rule in rules_in(feedback) - rules_in(current) if self.stage_of(rule) == stage)
        if named:
            added = [rule for rule in named if rng.random() < OBEYS]
        else:
            others = [r for r in range(RULES) if self.stage_of(r) == stage and r not in rules_in(current)]
            added = [rng.choice(others)] if others else []
        told = [f"Rule {rule}: {text_of(rule)}" for rule in added] or [f"Take care ({rng.randrange(10**6)})."]
        return "\n".join([current, *told])


def text_of(rule: int) -> str:
    return f"mind matter {rule}."


def rules_in(text: str) -> set[int]:
    return {int(number) for number in _RULE.findall(text)}


def instruction_of(stage: str) -> str:
    """Where a search begins."""
    return f"Do the {stage} step."
