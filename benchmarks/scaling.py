"""What a prompt step costs against demos, candidates and examples: measured, and the slope that fits.

A prompt step scores candidates on made-up flowers, every candidate on all of dev: pruning and racing would make the
cost depend on how good the candidates are, so neither takes part.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from cotune.lightning_modules import LanguageModel
from cotune.programs import Demo, Example, Lines, Predict, Prompt, Prompts, Runner, Sampling, exact_match
from cotune.prompting import Proposal, SearchTask, score_candidate

from benchmarks import machine as rates
from benchmarks.models import language_model, speak
from benchmarks.report import RESULTS, Report

MEASURES = ("petal_length", "petal_width", "sepal_length", "sepal_width")
SPECIES = ("setosa", "versicolor", "virginica")
AXES = {
    "demos": (0, 1, 2, 4, 8, 16),
    "candidates": (1, 2, 4, 8, 16, 32),
    "examples": (32, 64, 128, 256, 512, 1024),
}
QUICK = {"demos": (0, 4, 16), "candidates": (1, 4), "examples": (16, 64)}


@dataclass(frozen=True)
class Point:
    """The size of one prompt step."""

    demos: int = 4
    candidates: int = 1
    examples: int = 64


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    report = Report("scaling")
    here = rates.measure(options.threads)
    print(here, flush=True)
    lm = language_model(LanguageModel, options.model)
    lm.load(seed=0)
    speak(lm)
    step_seconds(lm, Point(examples=8), salt="warm-up")
    curves: dict[str, dict[int, list[float]]] = {}
    for axis, sizes in (QUICK if options.quick else AXES).items():
        base = Point(examples=16) if options.quick else Point()
        curves[axis] = {size: [] for size in sizes}
        for number in range(options.rounds):
            for size in sizes:
                point = Point(**{**asdict(base), axis: size})
                curves[axis][size].append(step_seconds(lm, point, salt=f"{axis} {size} {number}"))
        _tell(report, axis, curves[axis])
    report.details = {"machine": asdict(here), "curves": curves, "base": asdict(Point())}
    report.write(Path(options.output))


def step_seconds(lm: LanguageModel, point: Point, *, salt: str) -> float:
    """Seconds that scoring the point's candidates takes. Another salt shares no prompt with it."""
    task = _task(lm, _flowers(point.examples, salt))
    proposals = [Proposal(_prompts(point.demos, f"{salt} {n}"), f"candidate {n}") for n in range(point.candidates)]
    began = time.perf_counter()
    for proposal in proposals:
        score_candidate(task, proposal)
    return time.perf_counter() - began


def slope(curve: Mapping[int, float]) -> float:
    """The exponent b of seconds = a size^b that fits best; 1 is linear.

    >>> round(slope({1: 2.0, 2: 4.0, 4: 8.0}), 6)
    1.0
    """
    points = [(math.log(size), math.log(seconds)) for size, seconds in curve.items()]
    middle_x, middle_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    above = sum((x - middle_x) * (y - middle_y) for x, y in points)
    return float(above / sum((x - middle_x) ** 2 for x, _ in points))


def _tell(report: Report, axis: str, curve: Mapping[int, Sequence[float]]) -> None:
    for size, seconds in curve.items():
        report.add(f"{size} {axis}", seconds, "s")
    rounds = [dict(zip(curve, values, strict=True)) for values in zip(*curve.values(), strict=True)]
    most = max(curve)
    if axis == "demos":
        growth = [one[most] / one[0] for one in rounds]
        report.add(f"{most} demos to none", growth, "times", target=1.5, better="less")
    else:
        fitted = [slope(one) for one in rounds]
        report.add(f"{axis}: exponent (1 is linear)", fitted, "", target=1.05, better="less")


def _task(lm: LanguageModel, dev: Sequence[Example]) -> SearchTask:
    program = Predict(
        f"{', '.join(MEASURES)} -> answer",
        instruction="Classify the iris flower by its measurements in centimetres.",
        descriptions={"answer": "setosa, versicolor or virginica"},
    )
    initial = program.initial_prompts()
    return SearchTask(
        runner=Runner(program, lm, Lines(), exact_match, Sampling(max_new_tokens=8)),
        initial=initial,
        incumbent=initial,
        train=[],
        dev=dev,
    )


def _prompts(demos: int, salt: str) -> Prompts:
    shown = [Demo(dict(one.inputs), dict(one.labels), source="") for one in _flowers(demos, f"demos of {salt}")]
    return {"predict": Prompt(f"{salt}: classify the iris flower by its measurements.", demos=tuple(shown))}


def _flowers(count: int, salt: str) -> list[Example]:
    rng = random.Random(salt)
    return [
        Example.of(
            {name: f"{rng.uniform(0.1, 7.9):.1f}" for name in MEASURES},
            {"answer": rng.choice(SPECIES)},
            id=f"{salt} {number}",
        )
        for number in range(count)
    ]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few and small sizes")
    parser.add_argument("--model", default="embedded", help="as in LanguageModel")
    parser.add_argument("--output", default=str(RESULTS / "scaling.json"), help="a JSON file for the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
