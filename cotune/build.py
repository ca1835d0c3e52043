"""Building again: the modules that a recorded config describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from cotune.callbacks.schedule import WeightStep, parse_schedule, weight_steps
from cotune.datamodules import TraceDataModule
from cotune.errors import CotuneError
from cotune.fit.parse_errors import explain
from cotune.lightning_modules import ProgramModule


class BuildError(CotuneError, ValueError):
    """A recorded config names something that is not here any more, or is not here yet."""


_NOT_FOR_ANSWERING = {"optimizer", "learning_rate"}


def build_module(config: Mapping[str, Any], *, where: str) -> ProgramModule:
    """The program module of a config's "model" part, for anything but training; weights are not loaded.

    Args:
        where: what errors call the config.

    Raises:
        BuildError: a class cannot be imported or does not take what it is given.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ProgramModule, "model", skip=set(_NOT_FOR_ANSWERING))
    kept = {name: value for name, value in config.items() if name not in _NOT_FOR_ANSWERING}
    module = _built(parser, {"model": kept}, where).model
    assert isinstance(module, ProgramModule)
    return module


def build_data(config: Mapping[str, Any], *, where: str) -> TraceDataModule:
    """The data module of a config's "data" part; no data is read.

    Raises:
        BuildError: as `build_module`.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TraceDataModule, "data", required=True)
    data = _built(parser, {"data": dict(config)}, where).data
    assert isinstance(data, TraceDataModule)
    return data


def build_steps(config: Mapping[str, Any], *, where: str) -> list[WeightStep]:
    """The settings of each step of the schedule of a config's "alternate" part; a prompt step's mean nothing.

    Raises:
        BuildError: as `build_module`.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--steps", type=dict[str, WeightStep | None] | None)
    steps = weight_steps(_built(parser, {"steps": config.get("steps")}, where).steps, epochs=config["epochs"])
    return [steps.get(letter) or WeightStep() for letter in parse_schedule(config["schedule"], steps)]


def _built(parser: ArgumentParser, config: dict[str, Any], where: str) -> Any:
    try:
        parsed = parser.parse_object(config)
    except ArgumentError as error:
        raise BuildError(
            f"{where}: {explain(str(error), {})} Your own classes must be importable as they were in the run: "
            "start in the folder where it was started."
        ) from error
    return parser.instantiate(parsed)
