"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import save_tiny_model

# bitsandbytes gives torch.compile functions of its own when it is imported, which imports all of Inductor: seconds in
# each process that the tests start. Nothing that is tested is compiled.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


LONG = ("test_your_own_program", "test_whole_table", "test_faults", "test_killed", "test_several_processes")
"""Files whose tests are few and long, because processes are what they are about."""


@pytest.hookimpl(optionalhook=True)  # the suite runs without xdist, too
def pytest_xdist_auto_num_workers() -> int:
    """A worker more than cores: tests of processes, threads and servers wait for one another."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first, so that at the end no worker waits for another's."""
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.path.stem in LONG}
    items.sort(key=lambda item: (item.path not in slow, item.path.stem not in LONG))  # stable


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # The tiny models are smaller than the cost of waking a second thread, and sums keep their order.
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """A run flushes to the disk a hundred times; only a power failure could show a difference, and no test has one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _no_run_left_open() -> Iterator[None]:
    """A W&B run that a test leaves open would be taken for its own by the next one in this process."""
    yield
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random model."""
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
