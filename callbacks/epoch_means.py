"""Epoch means across an interruption: what Lightning has summed up of an epoch so far, to be added up further."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

Sums = dict[str, tuple[float, int]]
"""Logged name -> sum of the values, and of their weights."""


def epoch_sums(trainer: Trainer) -> Sums:
    """What the training epoch has summed up so far of what is logged as its mean. Lightning does not save it."""
    return {name: (float(metric.value), int(metric.cumulated_batch_size)) for name, metric in _means(trainer).items()}


def add_epoch_sums(trainer: Trainer, sums: Mapping[str, tuple[float, int]]) -> None:
    """Adds the sums of the part before an interruption to those of the part after it."""
    for name, metric in _means(trainer).items():
        if name in sums:
            value, weight = sums[name]
            metric.value = metric.value + value
            metric.cumulated_batch_size = metric.cumulated_batch_size + weight


def _means(trainer: Trainer) -> dict[str, Any]:
    results = trainer.fit_loop.epoch_loop._results
    return {
        name: metric
        for name, metric in results.items()
        if metric.is_tensor and metric.meta.on_epoch and metric.meta.is_mean_reduction
    }
