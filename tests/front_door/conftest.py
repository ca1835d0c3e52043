"""One finished run, which all tests of what comes after a fit look at.

The folder is not called cotune: `tests` is on the import path, and a folder of that name there would hide the package
from a pytest that is not started with `python -m`.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import fit
from cotune.lightning_modules import ProgramModule

from cotune.fit.cli import CotuneCLI


@dataclass(frozen=True)
class Finished:
    """A run's folder, and the module as the fit left it."""

    folder: Path
    module: ProgramModule

    @property
    def export(self) -> Path:
        return self.folder / "export"


@pytest.fixture(scope="session")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run of p -> w -> p that ended with trained weights (`keep` is "last") and demos in half of its batches."""
    runs = str(tmp_path_factory.mktemp("runs"))
    options = ["--runs_dir", runs, "--alternate.keep", "last", "--data.bootstrapping.demo_share", "0.5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["cotune"])  # Lightning warns of a command line beside its `args`
        cli = CotuneCLI(fit(tiny_model, *options))
    return Finished(Path(runs, "tiny"), cli.model)


@pytest.fixture
def export(finished: Finished, tmp_path: Path) -> Path:
    """A copy of a run's folder, so that no test writes into the one that others read."""
    shutil.copytree(finished.folder, tmp_path / "runs" / "tiny")
    return tmp_path / "runs" / "tiny" / "export"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Runs are written below the working folder, and its modules become importable.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
