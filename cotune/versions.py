"""What is installed, in one line: two builds of one version are told apart by it."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path

_LIBRARIES = ("torch", "lightning", "transformers", "peft")


def version_line() -> str:
    """E.g. "cotune 0.1.0 (git 75bef5b), Python 3.11.9, torch 2.13.0, …". Nothing heavy is imported for it."""
    from cotune import __version__

    libraries = [f"{name} {_version(name)}" for name in _LIBRARIES]
    own = build(Path(__file__).resolve().parents[1])
    return ", ".join(
        [
            f"cotune {__version__} ({own})",
            f"Python {platform.python_version()}",
            *libraries,
        ]
    )


def build(clone: Path) -> str:
    """The commit of a clone or of an install from git; else a digest of the files that the wheel brought."""
    if (clone / ".git").exists():
        commit = _git(clone, "rev-parse", "--short", "HEAD")
        changed = ", with changes" if _git(clone, "status", "--porcelain", "--untracked-files=no") else ""
        return f"git {commit}{changed}" if commit else "a clone without git"
    try:
        installed = metadata.distribution("cotune")
    except metadata.PackageNotFoundError:
        return "not installed"
    source = json.loads(installed.read_text("direct_url.json") or "{}")
    if commit := source.get("vcs_info", {}).get("commit_id"):
        return f"git {commit[:7]}"
    record = (installed.read_text("RECORD") or "").splitlines()
    files = sorted(line for line in record if line.startswith("cotune/") and "sha256=" in line)
    return f"build {hashlib.sha256(' '.join(files).encode()).hexdigest()[:7]}"


def _git(clone: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(clone), *words], capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"
