"""Alternation: which step comes next, as a pure state machine. It knows of no Trainer, no LM and no file.

A schedule is walked boundary by boundary. Boundary 0 is the program as it came, scored; each step leads to the next
boundary: a prompt step is a search and a score, a weight step is a collection, rounds of training, and a score. A round
is one training epoch; steps that collect each round do so between two of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from cotune.errors import CotuneError
from cotune.storage.formats import check_format

FORMAT = 2
"""Of a state's record in a checkpoint."""

Phase = Literal["search", "collect", "train", "score", "finish"]


class StateError(CotuneError, ValueError):
    """A state that cannot be gone on from here."""


@dataclass(frozen=True)
class Step:
    """One step of a schedule.

    Attributes:
        letter: its name in the schedule.
        rounds: of training; 0 for a prompt step.
        collects_each_round: collect before every round, not before the first alone.
    """

    letter: str
    rounds: int = 0
    collects_each_round: bool = False


@dataclass(frozen=True)
class State:
    """Where a run is.

    Attributes:
        boundaries: reached so far; 0 before the program as it came has been scored.
        phase: what is to be done next.
        rounds: of the weight step under way that are done.
    """

    boundaries: int = 0
    phase: Phase = "score"
    rounds: int = 0

    @property
    def position(self) -> int:
        """Steps of the schedule that are done."""
        return max(self.boundaries - 1, 0)

    @property
    def finished(self) -> bool:
        return self.phase == "finish"


@dataclass(frozen=True)
class Search:
    """Search for prompts."""


@dataclass(frozen=True)
class Collect:
    """Collect what the coming rounds of the weight step train on."""


@dataclass(frozen=True)
class Train:
    """Train for one epoch."""


@dataclass(frozen=True)
class Score:
    """Score what the step has led to; that makes a boundary."""


@dataclass(frozen=True)
class Finish:
    """The schedule is over."""


Action = Search | Collect | Train | Score | Finish


@dataclass(frozen=True)
class Searched:
    """A search has ended."""


@dataclass(frozen=True)
class CollectionEnded:
    """There is something to train on."""


@dataclass(frozen=True)
class RoundEnded:
    """An epoch of training has ended; `stop`: the weight step is to end with it, whatever rounds were planned."""

    stop: bool = False


@dataclass(frozen=True)
class Scored:
    """A boundary has been reached."""


Event = Searched | CollectionEnded | RoundEnded | Scored

_ACTIONS: dict[Phase, Action] = {
    "search": Search(),
    "collect": Collect(),
    "train": Train(),
    "score": Score(),
    "finish": Finish(),
}
_ENDS: dict[type[Event], Phase] = {Searched: "search", CollectionEnded: "collect", RoundEnded: "train", Scored: "score"}


class Alternation:
    """The steps of a schedule in order, and what follows what.

    >>> one = Alternation([Step("w", rounds=2)])
    >>> state = one.after(State(), Scored())
    >>> events = (CollectionEnded(), RoundEnded(), RoundEnded(), Scored())
    >>> [one.wanted(state := one.after(state, event)) for event in events]
    [Train(), Train(), Score(), Finish()]
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)

    def wanted(self, state: State) -> Action:
        """What is to be done in this state."""
        return _ACTIONS[state.phase]

    def after(self, state: State, event: Event) -> State:
        """The state that an event leads to.

        Raises:
            StateError: the event ends nothing that is under way.
        """
        if _ENDS[type(event)] != state.phase:
            raise StateError(f"{type(event).__name__} cannot happen in {state}. Please report this.")
        if isinstance(event, RoundEnded):
            return self._after_round(state, event)
        if isinstance(event, Scored):
            return self._at_boundary(state.boundaries + 1)
        return replace(state, phase="score" if isinstance(event, Searched) else "train")

    def step(self, state: State) -> Step:
        """The step under way, or the one that is next.

        Raises:
            StateError: none is.
        """
        if not state.boundaries or state.position >= len(self.steps):
            raise StateError(f"no step of {len(self.steps)} is under way in {state}.")
        return self.steps[state.position]

    def saved(self, state: State) -> dict[str, Any]:
        """The record of a state, for a checkpoint: plain types, and the schedule that it is a place in."""
        return {"format": FORMAT, **self._described(), "state": asdict(state)}

    def resumed(self, record: Mapping[str, Any], where: str = "the checkpoint") -> State:
        """The state of a record. A search whose result was not yet scored begins anew, as it is not kept.

        Raises:
            FormatError: the record, which stands in `where`, is of another format.
            StateError: it is of another schedule.
        """
        fix = (
            "Finish the run with the version that made it, or start over with --fresh; completions that are stored are "
            "not generated again."
        )
        check_format(where, record.get("format", "none"), FORMAT, oldest=FORMAT, fix=fix)
        for name, value in self._described().items():
            if record[name] != value:
                raise StateError(
                    f"the checkpoint was made with alternate.{name} {record[name]}, but this run has {value}. "
                    "Set it back to resume, or start a new run."
                )
        state = State(**record["state"])
        unscored = state.phase == "score" and state.boundaries > 0 and not self.step(state).rounds
        return replace(state, phase="search") if unscored else state

    def _described(self) -> dict[str, str]:
        rounds = [str(step.rounds) for step in self.steps if step.rounds]
        epochs = rounds[0] if len(set(rounds)) == 1 else ", ".join(rounds)
        return {"schedule": " -> ".join(step.letter for step in self.steps), "epochs": epochs}

    def _after_round(self, state: State, event: RoundEnded) -> State:
        step, rounds = self.step(state), state.rounds + 1
        if event.stop or rounds >= step.rounds:
            return replace(state, phase="score", rounds=rounds)
        return replace(state, phase="collect" if step.collects_each_round else "train", rounds=rounds)

    def _at_boundary(self, boundaries: int) -> State:
        state = State(boundaries=boundaries, phase="finish")
        if state.position == len(self.steps):
            return state
        return replace(state, phase="collect" if self.step(state).rounds else "search")
