"""Plots: a run's val scores over its schedule, and a table's test scores, each an SVG that stands alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#475569")
_LEFT, _TOP, _HEIGHT, _SLOT, _GAP = 46, 56, 210, 78, 92  # pixels, of a table's panels

_CURVE_TOP, _CURVE_BOTTOM, _CURVE_LEFT, _STEP = 24, 204, 44, 120  # pixels: y of scores 1 and 0, first x, a step's width
_BANDS = {"p": ("prompt step", "#dbe9f6"), "w": ("weight step", "#fde3c8")}


def score_curve(history: Sequence[Mapping[str, Any]]) -> str:
    """The records of all boundaries so far: a point a boundary, a coloured band a step between two."""

    def y(score: float) -> float:
        return _CURVE_BOTTOM - score * (_CURVE_BOTTOM - _CURVE_TOP)

    places = [_CURVE_LEFT + index * _STEP for index in range(len(history))]
    right, parts = places[-1] + 40, []
    for x, record in zip(places[1:], history[1:], strict=True):
        name, colour = _BANDS.get(record["step"], (f"step {record['step']}", "#e2e8f0"))
        parts.append(
            f'<rect class="{record["step"]}" x="{x - _STEP}" y="{_CURVE_TOP}" width="{_STEP}" '
            f'height="{_CURVE_BOTTOM - _CURVE_TOP}" fill="{colour}"/>' + _text(x - _STEP / 2, 16, name, anchor="middle")
        )
    for level in (0.0, 0.5, 1.0):
        parts.append(_line(_CURVE_LEFT, y(level), right - 40, y(level), "#999"))
        parts.append(_text(_CURVE_LEFT - 8, y(level) + 4, f"{level:g}", anchor="end"))
    course = " ".join(f"{x},{y(record['val_score']):.1f}" for x, record in zip(places, history, strict=True))
    parts.append(f'<polyline points="{course}" fill="none" stroke="#1b4f8a" stroke-width="2"/>')
    for x, record in zip(places, history, strict=True):
        at = y(record["val_score"])
        parts += [_dot(x, at, 4, "#1b4f8a"), _text(x, at - 8, f"{record['val_score']:.3f}", anchor="middle")]
        parts.append(_text(x, 226, record["prefix"], anchor="middle"))
    return _svg(right, 240, ["<title>score on val after each step</title>", *parts])


def table_plot(record: Mapping[str, Any]) -> str:
    """The record of a table: means with standard errors, each seed's score beside them; a panel for each task and LM,
    a colour for each preset."""
    panels: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in record["cells"]:
        panels.setdefault((cell["task"], cell["lm"]), []).append(cell)
    presets = list(dict.fromkeys(cell["preset"] for cell in record["cells"]))
    colours = {preset: _COLOURS[n % len(_COLOURS)] for n, preset in enumerate(presets)}
    width = _LEFT + 20 + _SLOT * max((len(cell["rows"]) for cell in record["cells"]), default=1)
    height = _TOP + len(panels) * (_HEIGHT + _GAP)
    parts = [f'<rect width="{width}" height="{height}" fill="white"/>', *_legend(record["name"], colours)]
    for n, ((task, lm), cells) in enumerate(panels.items()):
        parts += _panel(f"{task}, {lm}", cells, colours, top=_TOP + n * (_HEIGHT + _GAP) + 22, width=width)
    return _svg(width, height, parts) + "\n"


def _legend(name: str, colours: Mapping[str, str]) -> list[str]:
    parts, x = [_text(_LEFT, 20, f"{name}: test score in per cent", size=14)], float(_LEFT)
    for preset, colour in colours.items():
        parts += [_dot(x + 4, 36, 4, colour), _text(x + 13, 40, preset)]
        x += 30 + 7 * len(preset)
    return parts


def _panel(
    title: str, cells: Sequence[Mapping[str, Any]], colours: Mapping[str, str], *, top: float, width: float
) -> list[str]:
    names = list(dict.fromkeys(row["strategy"] for cell in cells for row in cell["rows"]))

    def y(score: float) -> float:
        return top + _HEIGHT * (1 - min(max(score, 0.0), 1.0))

    parts = [_text(_LEFT, top - 8, title, size=12)]
    for percent in (0, 25, 50, 75, 100):
        at = y(percent / 100)
        parts += [_line(_LEFT, at, width - 10, at, "#e2e8f0"), _text(_LEFT - 6, at + 4, str(percent), anchor="end")]
    for place, name in enumerate(names):
        middle = _LEFT + _SLOT * (place + 0.5)
        label = name.replace("->", "→").split(", ")
        parts += [_text(middle, top + _HEIGHT + 16 + 13 * n, line, anchor="middle") for n, line in enumerate(label)]
        for n, cell in enumerate(cells):
            row = next((row for row in cell["rows"] if row["strategy"] == name), None)
            x = middle + (n - (len(cells) - 1) / 2) * 18
            parts += _mark(row, x, y, colours[cell["preset"]]) if row else []
    return parts


def _mark(row: Mapping[str, Any], x: float, y: Any, colour: str) -> list[str]:
    if row["mean"] is None:
        return [_text(x, y(0) - 4, "–", anchor="middle")]
    error = row["standard_error"] or 0.0
    seeds = [_dot(x + 6, y(attempt["score"]), 1.6, colour, opacity=0.5) for attempt in row["by_seed"].values()]
    bar = _line(x, y(row["mean"] - error), x, y(row["mean"] + error), colour, width=1.5)
    return [*seeds, bar, _dot(x, y(row["mean"]), 4, colour)]


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" font-family="system-ui, sans-serif" font-size="11">\n' + "\n".join(parts) + "\n</svg>"
    )


def _text(x: float, y: float, text: str, *, size: int = 11, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="#0f172a">{escape(text)}</text>'
    )


def _line(x: float, y: float, to_x: float, to_y: float, colour: str, *, width: float = 1) -> str:
    ends = f'x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"/>'


def _dot(x: float, y: float, radius: float, colour: str, *, opacity: float = 1) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}" fill-opacity="{opacity}"/>'
