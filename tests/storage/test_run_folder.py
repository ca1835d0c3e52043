"""Claims about a run's folder: one process has it, also while an earlier run is archived."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
from cotune.storage.run_folder import RunFolder, RunFolderError


@pytest.fixture
def earlier(tmp_path: Path) -> RunFolder:
    """A folder with a run that has ended."""
    folder = RunFolder(str(tmp_path), "iris")
    folder.acquire()
    (folder.path / "run.json").write_text("old")
    folder.release()
    return folder


def test_no_other_process_gets_the_folder_while_a_fresh_run_archives_it(
    earlier: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh, other = RunFolder(str(tmp_path), "iris"), RunFolder(str(tmp_path), "iris")
    set_aside = fresh._set_aside

    def between() -> None:
        with pytest.raises(RunFolderError, match="is in use by process"):
            other.acquire()
        set_aside()

    monkeypatch.setattr(fresh, "_set_aside", between)
    fresh.acquire(fresh=True)
    assert (tmp_path / "iris.old-1" / "run.json").read_text() == "old"
    assert (tmp_path / "iris.old-1" / ".lock").read_text() == ""
    with pytest.raises(RunFolderError, match="is in use by process"):
        other.acquire()
    fresh.release()
    other.acquire()
    other.release()


def test_the_lock_of_a_folder_that_was_renamed_meanwhile_is_none(
    earlier: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a process that archives it between this one's opening of the file and its locking."""
    flock = fcntl.flock

    def late(file: Any, how: int) -> None:
        monkeypatch.undo()
        earlier.path.rename(tmp_path / "iris.old-1")
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    earlier.acquire()
    assert earlier._lock is not None
    assert os.path.samestat(os.fstat(earlier._lock.fileno()), (tmp_path / "iris" / ".lock").stat())
    assert not (tmp_path / "iris" / "run.json").exists()
    earlier.release()
