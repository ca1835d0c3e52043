"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_tiny_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # The tiny models are smaller than the cost of waking a second thread, and sums keep their order.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random model."""
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
