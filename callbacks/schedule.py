"""Schedules: the order of steps, read from a string such as "p -> w -> p", and the settings of each letter in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from cotune.callbacks.alternation import Step
from cotune.errors import BadValueError
from cotune.lightning_modules.objectives import Objective
from cotune.storage.schedule_text import steps_of

PROMPTS = "p"
"""The letter of a prompt step. Every other letter is a weight step's."""

WEIGHTS = "w"
"""The letter of the weight step that needs no settings of its own."""


@dataclass(frozen=True)
class WeightStep:
    """The settings of one letter of the schedule; null takes what the run has for all weight steps.

    Attributes:
        objective: what the training rows are and what a token of them adds to the gradient. Null is `Rejection`:
            completion loss on what passing runs wrote.
        lr: the full learning rate, in place of the optimiser's own.
        epochs: over the rows of one collection, made at the step's start. Null, without `rounds`: `alternate.epochs`.
        rounds: epochs that each begin with a collection by the weights as they then are, for objectives that learn
            from their own latest rollouts; in place of `epochs`.
    """

    objective: Objective | None = None
    lr: float | None = None
    epochs: int | None = None
    rounds: int | None = None

    def __post_init__(self) -> None:
        if self.epochs is not None and self.rounds is not None:
            raise BadValueError(
                f"epochs {self.epochs} and rounds {self.rounds} of one step: give epochs for one collection at the "
                "start, or rounds for one in each."
            )
        for name in ("epochs", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadValueError(
                    f"{name} {value} of a weight step is below 1; leave its letter out of the schedule."
                )
        if self.lr is not None and not self.lr > 0:
            raise BadValueError(f"lr {self.lr:g} of a weight step must be above 0.")

    @property
    def epochs_or_rounds(self) -> int:
        """Training epochs of the step, each a round of the alternation. For settings that `weight_steps` made whole."""
        return self.rounds or self.epochs or 1


def weight_steps(settings: Mapping[str, WeightStep | None] | None, *, epochs: int) -> dict[str, WeightStep]:
    """Letter -> its settings, those of "w" included, with the number of epochs filled in.

    >>> weight_steps({"d": WeightStep(rounds=3)}, epochs=5)["w"].epochs
    5

    Raises:
        ValueError: a letter is "p", or nothing that can stand in a schedule.
    """
    made = {}
    for letter, given in {WEIGHTS: WeightStep(), **(settings or {})}.items():
        if letter == PROMPTS:
            raise BadValueError('steps: "p" is the prompt step, which alternate.search sets; give it no settings here.')
        if not letter.isidentifier() or letter != letter.lower():
            raise BadValueError(f'steps: "{letter}" is no letter of a schedule; take small letters, e.g. "d".')
        step = given or WeightStep()
        made[letter] = step if step.rounds or step.epochs else replace(step, epochs=epochs)
    return made


def planned(letters: Iterable[str], steps: Mapping[str, WeightStep]) -> list[Step]:
    """The steps of a schedule, as an alternation takes them."""
    settings = [(letter, steps.get(letter)) for letter in letters]
    return [Step(name, own.epochs_or_rounds, bool(own.rounds)) if own else Step(name) for name, own in settings]


def parse_schedule(text: str, letters: Iterable[str] = (WEIGHTS,)) -> tuple[str, ...]:
    """Steps in order. Spacing, letter case and the kind of arrow do not matter.

    Args:
        letters: of the weight steps that there are.

    >>> parse_schedule("p->w ->P")
    ('p', 'w', 'p')

    Raises:
        ValueError: a step is unknown, or there is none.
    """
    names = {PROMPTS: "prompts", **dict.fromkeys(letters, "weights")}
    known = [f'"{letter}" ({what})' for letter, what in names.items()]
    help_ = f'Steps are {", ".join(known[:-1])} and {known[-1]}, e.g. "p -> w -> p".'
    parts = steps_of(text)
    if not parts:
        raise BadValueError(f"the schedule is empty. {help_}")
    for part in parts:
        if part not in names:
            raise BadValueError(f'schedule "{text}": unknown step "{part}". {help_}')
    return parts
