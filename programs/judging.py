"""Judging: what a metric gives for predictions, looked at; the metric is the user's code, and may do anything."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from cotune.programs.example import Example
from cotune.programs.faults import quoted, raised
from cotune.programs.lm import LMUnavailableError
from cotune.programs.metrics import BatchMetric, Metric
from cotune.programs.program import Program
from cotune.programs.rollout import Failure
from cotune.programs.score import Score

Pair = tuple[Example, Mapping[str, Any]]
"""An example and the prediction for it."""


def judged(pairs: Sequence[Pair], metric: Metric | None, program: Program) -> list[Score | Failure]:
    """What the metric says of each pair, or what went wrong with it; without a metric every score is 0."""
    given = [(own_copy(example), own_copy(prediction)) for example, prediction in pairs]
    found = _batch(metric, given, program) if isinstance(metric, BatchMetric) and given else None
    if found is None:
        found = [Score(0.0) if metric is None else _score(metric, pair, program) for pair in given]
    return found


def own_copy(value: Any) -> Any:
    """A copy: a metric that sorts a list in place must change no record. What cannot be copied is shared."""
    try:
        return copy.deepcopy(value)
    except MemoryError:
        raise
    except Exception:  # the user's values
        return value


def _batch(metric: BatchMetric, pairs: Sequence[Pair], program: Program) -> list[Score | Failure] | None:
    """All scores at once; None where that raised: one by one, the fault is the one example's that caused it."""
    try:
        found = list(metric.scores(pairs))
    except (MemoryError, KeyboardInterrupt, LMUnavailableError):
        raise
    except (Exception, SystemExit):
        return None
    if len(found) != len(pairs):
        wrong = Failure("metric", f"the metric returned {len(found)} scores for {len(pairs)} predictions")
        return [wrong] * len(pairs)
    return [Failure("metric", str(one.message)) if isinstance(one, Failure) else _judged(one, program) for one in found]


def _score(metric: Metric, pair: Pair, program: Program) -> Score | Failure:
    try:
        given = metric(*pair)
    except (MemoryError, KeyboardInterrupt, LMUnavailableError):
        raise
    except (Exception, SystemExit) as caught:  # the user's code: what it raises is recorded, counted and shown
        return Failure("metric", f"the metric raised {raised(caught)}")
    return _judged(given, program)


def _judged(given: Any, program: Program) -> Score | Failure:
    """What a metric gave, looked at."""
    try:
        return _valid_score(given, program)
    except _BadScoreError as bad:
        return Failure("metric", str(bad))
    except Exception as caught:  # its parts are the user's too
        return Failure("metric", f"the metric raised {raised(caught)}")


class _BadScoreError(ValueError):
    """A metric gave what is no score."""


def _valid_score(given: Any, program: Program) -> Score:
    """What a metric gave, as a Score. Python's and numpy's numbers and booleans will do, and tensors of one element."""
    if not isinstance(given, Score):
        return Score(_unit(given, "the metric returned {}, which is not a number in [0, 1]"))
    if not _is_text(given.feedback):
        raise _BadScoreError(f"the metric's feedback is {quoted(given.feedback)}, which is not text")
    objectives = {
        str(name): _unit(value, f'the metric\'s objective "{name}" is {{}}, which is not a number in [0, 1]')
        for name, value in given.objectives.items()
    }
    for stage, feedback in given.stages.items():
        if stage not in program.stages or not _is_text(feedback):
            known = f"it must be text for a stage of the program ({', '.join(program.stages)})"
            raise _BadScoreError(f"the metric's feedback for {quoted(stage)} is {quoted(feedback)}; {known}")
    value = _unit(given.value, "the metric returned a Score of {}, which is not a number in [0, 1]")
    return Score(value, given.feedback, objectives, given.stages)


def _is_text(value: Any) -> bool:
    """Whether it is text that a file can hold: half a surrogate pair is not."""
    return isinstance(value, str) and value == value.encode(errors="replace").decode()


def _unit(given: Any, message: str) -> float:
    bad = _BadScoreError(message.format(quoted(given)))
    if isinstance(given, (str, bytes)) or given is None:
        raise bad
    try:
        value = float(given)
    except (TypeError, ValueError, OverflowError) as error:
        raise bad from error
    if not 0 <= value <= 1:  # NaN fails this too
        raise bad
    return value
