"""The alternation without a Trainer: what follows what, and which records it goes on from."""

from __future__ import annotations

import json

import pytest
from cotune.callbacks.alternation import (
    FORMAT,
    Action,
    Alternation,
    Collect,
    CollectionEnded,
    Event,
    Finish,
    RoundEnded,
    Score,
    Scored,
    Search,
    Searched,
    State,
    StateError,
    Step,
    Train,
)
from cotune.storage.formats import FormatError

P, W, EACH = Step("p"), Step("w", rounds=2), Step("d", rounds=2, collects_each_round=True)
ENDS: dict[type[Action], Event] = {  # type: ignore[valid-type]
    Search: Searched(),
    Collect: CollectionEnded(),
    Train: RoundEnded(),
    Score: Scored(),
}


def walked(alternation: Alternation, state: State) -> tuple[list[str], State]:
    """The names of all that is wanted from a state on, each done as soon as it is."""
    names = []
    while not isinstance(wanted := alternation.wanted(state), Finish):
        names.append(type(wanted).__name__)
        state = alternation.after(state, ENDS[type(wanted)])
    return names, state


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [
        ([P], "Score Search Score"),
        ([W], "Score Collect Train Train Score"),
        ([EACH], "Score Collect Train Collect Train Score"),
        ([P, W, P], "Score Search Score Collect Train Train Score Search Score"),
    ],
)
def test_a_schedule_is_walked_to_its_end(steps: list[Step], wanted: str) -> None:
    names, end = walked(Alternation(steps), State())
    assert " ".join(names) == wanted
    assert end.finished
    assert end.boundaries == len(steps) + 1


def test_a_stop_ends_the_weight_step_and_not_the_schedule() -> None:
    one = Alternation([W, W])
    state = one.after(one.after(State(), Scored()), CollectionEnded())
    stopped = one.after(state, RoundEnded(stop=True))
    assert (one.wanted(stopped), stopped.rounds) == (Score(), 1)
    names, _ = walked(one, stopped)
    assert " ".join(names) == "Score Collect Train Train Score"


@pytest.mark.parametrize("steps", [[P, W, P], [EACH, P]])
def test_from_every_record_a_run_goes_on_to_the_same_end(steps: list[Step]) -> None:
    one, state = Alternation(steps), State()
    names, _ = walked(one, state)
    for done in range(len(names)):
        resumed = Alternation(steps).resumed(json.loads(json.dumps(one.saved(state))))
        rest, end = walked(one, resumed)
        # A search whose result was not yet scored is searched again: its result is in no record.
        again = ["Search"] if rest[0] == "Search" and names[done] == "Score" else []
        assert (rest, end.finished) == ([*again, *names[done:]], True)
        state = one.after(state, ENDS[type(one.wanted(state))])


def test_an_event_that_ends_nothing_is_refused() -> None:
    with pytest.raises(StateError, match="RoundEnded cannot happen in"):
        Alternation([W]).after(State(), RoundEnded())


@pytest.mark.parametrize("found", [None, 0, FORMAT + 1])
def test_a_record_of_another_format_is_refused_with_the_way_out(found: int | None) -> None:
    record = {**Alternation([P]).saved(State()), "format": found}
    if found is None:
        del record["format"]
    said = rf'^"last.ckpt" has format {"none" if found is None else found}, .*reads {FORMAT}\. .*--fresh'
    with pytest.raises(FormatError, match=said):
        Alternation([P]).resumed(record, "last.ckpt")


def test_a_record_of_another_schedule_is_refused() -> None:
    record = Alternation([P, W]).saved(State())
    with pytest.raises(StateError, match=r"alternate.schedule p -> w, but this run has p -> w -> p"):
        Alternation([P, W, P]).resumed(record)
    with pytest.raises(StateError, match=r"alternate.epochs 2, but this run has 3"):
        Alternation([P, Step("w", rounds=3)]).resumed(record)
