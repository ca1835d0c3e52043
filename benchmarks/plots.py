"""Pictures of the figures: rollouts beside each peer, and the cost of a prompt step against its sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Report


def plot(reports: Sequence[Report], folder: Path) -> list[Path]:
    """Writes a picture a kind of report, and returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    ratios = [report for report in reports if report.script == "rollouts"]
    made = [_ratios(ratios, folder / "rollouts.png")] if ratios else []
    return made + [_curves(report, folder / "scaling.png") for report in reports if report.script == "scaling"]


def _ratios(reports: Sequence[Report], path: Path) -> Path:
    """A bar a ratio, the spread of its rounds as a line, 1 marked: left of it the peer is faster."""
    import matplotlib.pyplot as plt

    figures = [figure for report in reports for figure in report.figures if figure.unit == "x"][::-1]
    drawing, axes = plt.subplots(figsize=(9, 0.6 + 0.32 * len(figures)), layout="constrained")
    for at, figure in enumerate(figures):
        axes.barh(at, figure.value, color="#4878a8" if figure.reached is not False else "#b05a4a")
        axes.plot([min(figure.rounds), max(figure.rounds)], [at, at], color="black", linewidth=1.5)
        axes.text(max(figure.rounds), at, f" {figure.value:.2f}", va="center")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(figures)), [figure.name.replace(": ratio to", ", to") for figure in figures])
    axes.set_xlabel("times as fast as the peer (median of rounds; line: lowest to highest)")
    return _saved(drawing, path)


def _curves(report: Report, path: Path) -> Path:
    """Seconds against demos, candidates and examples."""
    import matplotlib.pyplot as plt

    curves = report.details["curves"]
    drawing, panels = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.2), layout="constrained", squeeze=False)
    for axes, (name, curve) in zip(panels[0], curves.items(), strict=True):
        sizes = sorted(curve, key=int)
        for values in zip(*(curve[size] for size in sizes), strict=True):
            axes.plot([int(size) for size in sizes], values, marker="o", color="#4878a8", alpha=0.7)
        if name == "demos":
            axes.set_ylim(bottom=0)
        else:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
        axes.set_xlabel(name)
        axes.set_ylabel("seconds")
    return _saved(drawing, path)


def _saved(drawing: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=110)
    return path
