"""The curve of val scores over the schedule, with a band for each p and w step, as an SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_COLOURS = {"p": "#dbe9f6", "w": "#fde3c8"}
_TOP, _BOTTOM, _LEFT, _WIDTH = 24, 204, 44, 120  # pixels: y of score 1, y of score 0, x of the first boundary, a step
_NAMES = {"p": "prompt step", "w": "weight step"}


def score_curve(history: Sequence[Mapping[str, Any]]) -> str:
    """An SVG of the records of all boundaries so far: a point a boundary, a coloured band a step between two."""
    points = [(_LEFT + index * _WIDTH, record) for index, record in enumerate(history)]
    right = points[-1][0] + 40
    parts = [_band(x, record) for x, record in points[1:]]
    parts += [_line(_LEFT, _y(level), right - 40, _y(level), level) for level in (0.0, 0.5, 1.0)]
    course = " ".join(f"{x},{_y(record['val_score']):.1f}" for x, record in points)
    parts.append(f'<polyline points="{course}" fill="none" stroke="#1b4f8a" stroke-width="2"/>')
    parts += [_point(x, record) for x, record in points]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right} 240" width="{right}" role="img" '
        f'font-family="sans-serif" font-size="12"><title>score on val after each step</title>{"".join(parts)}</svg>'
    )


def _y(score: float) -> float:
    return _BOTTOM - score * (_BOTTOM - _TOP)


def _band(x: int, record: Mapping[str, Any]) -> str:
    step = record["step"]
    return (
        f'<rect class="{step}" x="{x - _WIDTH}" y="{_TOP}" width="{_WIDTH}" height="{_BOTTOM - _TOP}" '
        f'fill="{_COLOURS[step]}"/><text x="{x - _WIDTH / 2}" y="16" text-anchor="middle">{_NAMES[step]}</text>'
    )


def _line(x: int, y: float, right: int, y_right: float, level: float) -> str:
    return (
        f'<line x1="{x}" y1="{y}" x2="{right}" y2="{y_right}" stroke="#999" stroke-dasharray="2 4"/>'
        f'<text x="{x - 8}" y="{y + 4}" text-anchor="end">{level:g}</text>'
    )


def _point(x: int, record: Mapping[str, Any]) -> str:
    score, prefix = record["val_score"], escape(record["prefix"])
    return (
        f'<circle cx="{x}" cy="{_y(score):.1f}" r="4" fill="#1b4f8a"/>'
        f'<text x="{x}" y="{_y(score) - 8:.1f}" text-anchor="middle">{score:.3f}</text>'
        f'<text x="{x}" y="226" text-anchor="middle">{prefix}</text>'
    )
