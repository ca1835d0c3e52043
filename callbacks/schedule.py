"""Schedules: the order of steps, read from a string such as "p -> w -> p", and the settings of each letter in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from cotune.callbacks.alternation import Step
from cotune.datamodules import Bootstrapping
from cotune.errors import BadValueError
from cotune.lightning_modules.objectives import GRPO, KTO, Distil, Objective, Rejection
from cotune.storage.schedule_text import steps_of

PROMPTS = "p"
"""The letter of a prompt step. Every other letter is a weight step's."""

WEIGHTS = "w"
"""The kind of all weight steps, and the letter of the plain one."""


@dataclass(frozen=True)
class WeightStep:
    """The settings of one letter of the schedule; null takes what the run has for all weight steps.

    Attributes:
        objective: what the training rows are and what a token of them adds to the gradient. Null is `Rejection`:
            completion loss on what passing runs wrote.
        lr: the full learning rate, in place of the optimiser's own.
        epochs: over the rows of one collection, made at the step's start.
        rounds: epochs that each begin with a collection by the weights as they then are, in place of `epochs`. With
            neither there are `alternate.epochs` of them: rounds where the objective learns from runs of its own
            (`Objective.runs`), epochs of one collection where it does not.
    """

    objective: Objective | None = None
    lr: float | None = None
    epochs: int | None = None
    rounds: int | None = None

    def __post_init__(self) -> None:
        if self.epochs is not None and self.rounds is not None:
            raise BadValueError(
                f"a step has epochs {self.epochs} and rounds {self.rounds}; give one: epochs collect once at the "
                "start, rounds collect in each."
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
    def learns(self) -> Objective:
        """The objective, the default one where none is set."""
        return self.objective or Rejection()

    def most_runs(self, options: Bootstrapping) -> tuple[int, int]:
        """Fewest and most runs of a train example in one collection."""
        wanted = self.learns.runs
        return (1, options.attempts + options.hints) if wanted is None else (wanted.each, wanted.each)

    @property
    def epochs_or_rounds(self) -> int:
        """Training epochs of the step, each a round of the alternation. For settings that `weight_steps` made whole."""
        return self.rounds or self.epochs or 1


PRESETS = {
    WEIGHTS: WeightStep(),
    "d": WeightStep(Distil()),
    "k": WeightStep(KTO()),
    "g": WeightStep(GRPO()),
}
"""The weight steps that there are without settings. Settings of their letters change what they say and nothing else."""


def weight_steps(settings: Mapping[str, WeightStep | None] | None, *, epochs: int) -> dict[str, WeightStep]:
    """Letter -> its settings, those of `PRESETS` included, with the number of epochs filled in.

    >>> made = weight_steps({"d": WeightStep(lr=1e-4)}, epochs=5)
    >>> made["w"].epochs, made["d"].rounds, type(made["d"].objective).__name__
    (5, 5, 'Distil')

    Raises:
        ValueError: a letter is "p", or nothing that can stand in a schedule.
    """
    made = {}
    for letter, given in {**PRESETS, **(settings or {})}.items():
        if letter == PROMPTS:
            raise BadValueError('steps: "p" is the prompt step, which alternate.search sets; give it no settings here.')
        if not letter.isidentifier() or letter != letter.lower():
            raise BadValueError(f'steps: "{letter}" is not a letter of a schedule; use lower-case letters, e.g. "d".')
        step = given or WeightStep()
        if step.objective is None and letter in PRESETS:
            step = replace(step, objective=PRESETS[letter].objective)
        if not (step.rounds or step.epochs):
            step = replace(step, epochs=epochs) if step.learns.runs is None else replace(step, rounds=epochs)
        made[letter] = step
    return made


def planned(letters: Iterable[str], steps: Mapping[str, WeightStep]) -> list[Step]:
    """The steps of a schedule, as an alternation takes them."""
    settings = [(letter, steps.get(letter)) for letter in letters]
    return [Step(name, own.epochs_or_rounds, bool(own.rounds)) if own else Step(name) for name, own in settings]


def parse_schedule(text: str, letters: Iterable[str] = tuple(PRESETS)) -> tuple[str, ...]:
    """Steps in order. Spacing, letter case and the kind of arrow do not matter.

    Args:
        letters: of the weight steps that there are.

    >>> parse_schedule("p->w ->P")
    ('p', 'w', 'p')

    Raises:
        ValueError: a step is unknown, or there is none.
    """
    names = (PROMPTS, *letters)
    weights = ", ".join(f'"{letter}"' for letter in letters)
    help_ = f'Steps are "{PROMPTS}" (prompts) and {weights} (weights), e.g. "p -> w -> p".'
    parts = steps_of(text)
    if not parts:
        raise BadValueError(f"the schedule is empty. {help_}")
    for part in parts:
        if part not in names:
            raise BadValueError(f'schedule "{text}": unknown step "{part}". {help_}')
    return parts
