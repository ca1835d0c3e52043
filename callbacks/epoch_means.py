"""Epoch means across an interruption: what Lightning has summed up of an epoch so far, to be added up further."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

Sums = dict[str, tuple[float, int, str]]
"""Key among Lightning's results -> sum of the values, sum of their weights, and the name that the mean is logged by."""


def epoch_sums(trainer: Trainer) -> Sums:
    """What the training epoch has summed up so far of what is logged as its mean. Lightning does not save it."""
    return {
        key: (float(metric.value), int(metric.cumulated_batch_size), metric.meta.forked_name(on_step=False))
        for key, metric in _means(trainer).items()
        if metric.cumulated_batch_size  # logged in an earlier epoch only
    }


def add_epoch_sums(trainer: Trainer, sums: Sums) -> None:
    """Adds the sums of the part before an interruption to those of the part after it."""
    for key, metric in _means(trainer).items():
        if key in sums:
            value, weight, _ = sums[key]
            metric.value = metric.value + value
            metric.cumulated_batch_size = metric.cumulated_batch_size + weight


def log_epoch_sums(module: LightningModule, sums: Sums) -> None:
    """Logs the means of an epoch that was interrupted behind its last batch. Call it in `on_train_epoch_end`."""
    for value, weight, name in sums.values():
        module.log(name, value / weight)


def _means(trainer: Trainer) -> dict[str, Any]:
    results = trainer.fit_loop.epoch_loop._results
    return {
        name: metric
        for name, metric in results.items()
        if metric.is_tensor and metric.meta.on_epoch and metric.meta.is_mean_reduction
    }
