"""Charts: where lines, points and bands lie in an SVG; the templates draw them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cotune.reporting.run_record import RunRecord
from cotune.reporting.statistics import interval

_MAX_POINTS = 300
_LETTER = 6.2
"""Mean width of a letter at the charts' font size, in pixels."""

_Place = Callable[[float], float]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where it is, in pixels, and what it says."""

    at: float
    label: str


@dataclass(frozen=True)
class Band:
    """A step of the schedule from `x` to `x + width`; `done` is false for one that is still to come."""

    step: str
    x: float
    width: float
    label: str
    done: bool


@dataclass(frozen=True)
class Dot:
    """A prefix: its score and the ends of its interval, all in pixels from the top; `rises` if the next is higher."""

    x: float
    y: float
    low: float
    high: float
    label: str
    name: str
    best: bool
    rises: bool


@dataclass(frozen=True)
class Timeline:
    """Scores over the schedule's steps.

    Attributes:
        head: the bands' upper end, somewhat above a score of 1.
        epochs: for each weight step the line of its epochs' val scores, as SVG points.
    """

    width: int
    height: int
    left: float
    right: float
    head: float
    bottom: float
    bands: Sequence[Band]
    dots: Sequence[Dot]
    grid: Sequence[Tick]
    epochs: Sequence[str]

    @property
    def line(self) -> str:
        return " ".join(f"{dot.x:.1f},{dot.y:.1f}" for dot in self.dots)


@dataclass(frozen=True)
class Curve:
    """One quantity over optimiser steps: `line` its points, `smooth` its running mean, as SVG points."""

    title: str
    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    line: str
    smooth: str
    across: Sequence[Tick]
    up: Sequence[Tick]
    dots: Sequence[tuple[float, float]] = field(default=())
    last: str = ""


def timeline(run: RunRecord, *, width: int) -> Timeline:
    """The run's scores by prefix, the steps between them as bands."""
    height, left, right, head, top, bottom = 270, 38.0, width - 4.0, 26.0, 50.0, 228.0
    slot = (right - left) / (len(run.schedule) + 1)
    n = run.size("val") or 0

    def x(index: float) -> float:
        return left + slot * (index + 0.5)

    def y(score: float) -> float:
        return bottom - (bottom - top) * score

    names = [prefix.name.replace("->", "→") for prefix in run.prefixes]
    fits = all(len(name) * _LETTER < slot for name in names)
    dots = []
    following = [prefix.val_score for prefix in run.prefixes[1:]] + [-1.0]
    for prefix, name, after in zip(run.prefixes, names, following, strict=True):
        low, high = interval(prefix.val_score, n, run.noise)
        shown = name if fits or not prefix.index else f"+{run.schedule[prefix.index - 1]}"
        ends = (y(low), y(high)) if n else (y(prefix.val_score),) * 2
        label = f"{prefix.val_score:.2f}"
        rises = after > prefix.val_score
        dots.append(Dot(x(prefix.index), y(prefix.val_score), *ends, label, shown, prefix is run.best, rises))
    bands = []
    for place, letter in enumerate(run.schedule):
        words = {"p": "prompts", "w": "weights"}.get(letter, f"weights ({letter})")
        title = words if len(words) * _LETTER < slot else letter
        bands.append(Band("p" if letter == "p" else "w", x(place), slot, title, place + 1 < len(dots)))
    grid = [Tick(y(score), f"{score:g}") for score in (0, 0.25, 0.5, 0.75, 1)]
    return Timeline(width, height, left, right, head, bottom, bands, dots, grid, _epoch_lines(run, x, y))


def curves(run: RunRecord, *, width: int) -> list[Curve]:
    """Training loss, learning rate and val score over optimiser steps, as far as they were logged."""
    loss = _series(run.metrics, "train/loss_step") or _series(run.metrics, "train/loss")
    rate, score = _series(run.metrics, "train/lr"), _series(run.metrics, "val/score")
    at = [step for step, _ in [*loss, *rate, *score]]
    span = (min(at, default=0.0), max(at, default=1.0))
    found = []
    if len(loss) > 1:
        found.append(_curve("training loss, nats a token", loss, span, width=width, height=190, smooth=True))
    if len(rate) > 1:
        found.append(_curve("learning rate", rate, span, width=width, height=120))
    if len(score) > 1:
        found.append(_curve("val score by epoch", score, span, width=width, height=140, top_value=1.0, dots=True))
    return found


def _epoch_lines(run: RunRecord, x: _Place, y: _Place) -> list[str]:
    """The val scores of a weight step's epochs, drawn inside its band."""
    scores = [(row["epoch"], row["val/score"]) for row in run.metrics if {"epoch", "val/score"} <= row.keys()]
    lines, done = [], 0
    for prefix in run.prefixes:
        count = run.epochs(prefix)
        own = [(epoch - done, score) for epoch, score in scores if done <= epoch < done + count]
        points = [(prefix.index - 1 + (epoch + 1) / (count + 1), score) for epoch, score in own]
        lines.append(" ".join(f"{x(at):.1f},{y(score):.1f}" for at, score in points))
        done += count
    return list(filter(None, lines))


def _curve(
    title: str,
    points: Sequence[tuple[float, float]],
    span: tuple[float, float],
    *,
    width: int,
    height: int,
    smooth: bool = False,
    dots: bool = False,
    top_value: float | None = None,
) -> Curve:
    left, right, top, bottom = 52.0, width - 14.0, 26.0, height - 24.0
    first, last = span[0], max(span[1], span[0] + 1)
    finite = [value for _, value in points if math.isfinite(value)]
    highest = top_value or max(finite, default=1.0) or 1.0

    def place(point: tuple[float, float]) -> tuple[float, float]:
        step, value = point
        share = (min(max(value, 0.0), highest) if math.isfinite(value) else highest) / highest
        return left + (right - left) * (step - first) / (last - first), bottom - (bottom - top) * share

    thin = _thinned(points)
    across = [Tick(place((step, 0))[0], f"{step:,.0f}") for step in _ticks(first, last) if step == round(step)]
    up = [Tick(place((first, value))[1], f"{value:.3g}") for value in _ticks(0, highest)]
    drawn = [place(point) for point in thin]
    return Curve(
        title,
        *(width, height, left, right, top, bottom),
        line=_path(drawn),
        smooth=_path([place(point) for point in _thinned(_running_mean(points))]) if smooth else "",
        across=across,
        up=up,
        dots=drawn if dots and len(drawn) <= 60 else (),
        last=f"{points[-1][1]:.3g}",
    )


def _series(rows: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    found = [(row["step"], row[name]) for row in rows if name in row and "step" in row]
    return [point for point in found if math.isfinite(point[0])]


def _running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential mean over about a twentieth of the points, corrected for its start."""
    keep = 1 - 1 / max(len(points) / 20, 2)
    total, weight, means = 0.0, 0.0, []
    for step, value in points:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        means.append((step, total / weight))
    return means


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about `_MAX_POINTS` points: of each stretch its lowest and its highest, so that no spike is lost."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    stretch = math.ceil(len(points) / (_MAX_POINTS / 2))
    kept = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers in [low, high].

    >>> _ticks(0, 1.9)
    [0.0, 0.5, 1.0, 1.5]
    """
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
