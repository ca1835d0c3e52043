"""Plot: a table as an SVG, a panel for each task and LM, a colour for each preset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#475569")
_LEFT, _TOP, _HEIGHT, _SLOT, _GAP = 46, 56, 210, 78, 92


def plot(record: Mapping[str, Any]) -> str:
    """The record of `table_record` as an SVG: means with standard errors, each seed's score beside them."""
    panels: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in record["cells"]:
        panels.setdefault((cell["task"], cell["lm"]), []).append(cell)
    presets = list(dict.fromkeys(cell["preset"] for cell in record["cells"]))
    colours = {preset: _COLOURS[n % len(_COLOURS)] for n, preset in enumerate(presets)}
    width = _LEFT + 20 + _SLOT * max((len(cell["rows"]) for cell in record["cells"]), default=1)
    height = _TOP + len(panels) * (_HEIGHT + _GAP)
    parts = [_legend(record["name"], colours)]
    for n, ((task, lm), cells) in enumerate(panels.items()):
        parts += _panel(f"{task}, {lm}", cells, colours, top=_TOP + n * (_HEIGHT + _GAP) + 22, width=width)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, sans-serif" font-size="11">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _legend(name: str, colours: Mapping[str, str]) -> str:
    parts, x = [_text(_LEFT, 20, f"{name}: test score in per cent", size=14)], float(_LEFT)
    for preset, colour in colours.items():
        parts.append(f'<circle cx="{x + 4:.0f}" cy="36" r="4" fill="{colour}"/>' + _text(x + 13, 40, preset))
        x += 30 + 7 * len(preset)
    return "\n".join(parts)


def _panel(
    title: str, cells: Sequence[Mapping[str, Any]], colours: Mapping[str, str], *, top: float, width: float
) -> list[str]:
    names = list(dict.fromkeys(row["strategy"] for cell in cells for row in cell["rows"]))

    def y(score: float) -> float:
        return top + _HEIGHT * (1 - min(max(score, 0.0), 1.0))

    parts = [_text(_LEFT, top - 8, title, size=12)]
    for percent in (0, 25, 50, 75, 100):
        at = y(percent / 100)
        parts.append(f'<line x1="{_LEFT}" x2="{width - 10:.0f}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e2e8f0"/>')
        parts.append(_text(_LEFT - 6, at + 4, str(percent), anchor="end"))
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
    parts = [
        f'<circle cx="{x + 6:.1f}" cy="{y(attempt["score"]):.1f}" r="1.6" fill="{colour}" fill-opacity="0.5"/>'
        for attempt in row["by_seed"].values()
    ]
    error = row["standard_error"] or 0.0
    low, high = y(row["mean"] - error), y(row["mean"] + error)
    parts.append(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}" stroke-width="1.5"/>'
    )
    parts.append(f'<circle cx="{x:.1f}" cy="{y(row["mean"]):.1f}" r="4" fill="{colour}"/>')
    return parts


def _text(x: float, y: float, text: str, *, size: int = 11, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="#0f172a">{escape(text)}</text>'
    )
