"""Damaged files: bits flipped and ends cut off in everything that a continued run reads. None may be believed.

A trial damages one file and reads it as a continuing run does. It ends "unharmed" (what was read equals what was
written), "fell back" (an older state, or work done again), or "refused" (an error of ours that names the file);
anything else is a silent load. A sample of the trials is a whole run that goes on from the damaged folder.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from crashes import arm

from faults.kills import Reference, resumed_equal
from faults.nursery import fresh, in_child, last_line, run_to_end
from faults.small_run import Job
from faults.trials import Trial

Verdict = tuple[str, str]
"""("unharmed" | "fell back" | "refused" | "silent", what was said)"""


def interrupted(job: Job, template: Path, point: str, k: int) -> Path:
    """A copy of the folder of a run that was killed at its k-th passing of a crash point (tests/crashes.py)."""
    fresh(job.folder)
    child = run_to_end(job, lambda: arm(point, k))
    if child.code != -9:
        raise RuntimeError(f"the run was to die at {point} {k}, and ended with {child.code}:\n{child.text[-2000:]}")
    shutil.rmtree(template, ignore_errors=True)
    shutil.copytree(job.folder, template)
    return template


def durable_files(folder: Path) -> list[str]:
    """What a continued run reads: paths relative to the job's folder."""
    kept = ("checkpoints/", "traces/", "completions.sqlite", "/run.json", "tiny/SHA256SUMS")
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return [name for name in names if any(part in name for part in kept) and not name.endswith(".partial")]


def damages(path: Path, *, flips: int, cuts: int, seed: str) -> Iterator[tuple[str, bytes]]:
    """(what was done, the damaged content): single flipped bits, and cuts at every record boundary and elsewhere."""
    data = path.read_bytes()
    rng = random.Random(seed)
    for _ in range(flips if data else 0):
        bit = rng.randrange(8 * len(data))
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit}", bytes(damaged)
    ends = _boundaries(path, data)
    ends |= {rng.randrange(len(data)) for _ in range(cuts)} if data else set()
    for end in sorted(ends - {len(data)}):
        yield f"cut at {end}", data[:end]


def quick_trials(template: Path, name: str, *, flips: int, cuts: int, seed: str) -> Trial:
    """Every damage of one file, read in one child process; counts by verdict."""
    return in_child(lambda: _read_all(template, name, flips=flips, cuts=cuts, seed=seed))


def whole_trial(job: Job, template: Path, name: str, expected: Reference, *, seed: str) -> Trial:
    """One damage, and the same command again in the damaged folder."""
    rng = random.Random(seed)
    made = list(damages(template / name, flips=8, cuts=8, seed=seed))
    what, content = rng.choice(made)
    shutil.rmtree(job.folder, ignore_errors=True)
    shutil.copytree(template, job.folder)
    (job.folder / name).write_bytes(content)
    equal, child = resumed_equal(job, expected)
    refused = child.code == 2 and "Traceback" not in child.text
    said = last_line(child.text) if refused else _damage_line(child.text)
    return {
        "ok": equal or refused,
        "damage": f"{name}: {what}",
        "verdict": "refused" if refused else "ended the same" if equal else "broken",
        "redone": 0,
        "silent": int(child.code == 0 and not equal),
        "said": said if equal or refused else child.text[-800:],
    }


def _read_all(template: Path, name: str, *, flips: int, cuts: int, seed: str) -> Trial:
    reader = reader_of(name)
    scratch = template.with_name(template.name + ".read")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(template, scratch)
    right = reader(scratch, name)
    verdicts: Counter[str] = Counter()
    said: dict[str, str] = {}
    silent: list[str] = []
    for what, content in damages(template / name, flips=flips, cuts=cuts, seed=seed):
        _restore(template, scratch, name)
        (scratch / name).write_bytes(content)
        verdict, message = judge(reader, scratch, name, right)
        verdicts[verdict] += 1
        said.setdefault(verdict, message.replace(str(scratch), "<folder>"))
        if verdict == "silent":
            silent.append(f"{what}: {message}"[:300])
    shutil.rmtree(scratch)
    return {
        "ok": not silent,
        "trials": sum(verdicts.values()),
        "verdicts": dict(verdicts),
        "bytes": (template / name).stat().st_size,
        "redone": 0,
        "silent": len(silent),
        "said": said.get("refused") or said.get("fell back", ""),
        "examples": said,
        "silently": silent[:5],
    }


def judge(reader: Callable[[Path, str], Any], folder: Path, name: str, right: Any) -> Verdict:
    """Reads a damaged folder, and compares with what was written."""
    from cotune.errors import CotuneError

    try:
        found = reader(folder, name)
    except Exception as error:
        # A traceback of a library tells nobody what to do.
        return (
            ("refused", str(error))
            if isinstance(error, CotuneError)
            else ("silent", f"{type(error).__name__}: {error}")
        )
    if found == right:
        return "unharmed", ""
    if isinstance(found, Mapping) and isinstance(right, Mapping):
        # Rows, states or traces that are there must be as they were; those that are not are done again.
        lost = [key for key in right if key not in found]
        if lost and all(right.get(key) == value for key, value in found.items()):
            return "fell back", str(found.get("said", f"{len(lost)} of {len(right)} are absent, and made again"))
    return "silent", f"read {str(found)[:200]}"


# How a continued run reads each kind of file


def reader_of(name: str) -> Callable[[Path, str], Any]:
    """The reader of the kind of file that a name is of."""
    if "completions.sqlite" in name:
        return _read_store
    if "checkpoints/" in name:
        return _read_checkpoint
    if "traces/" in name:
        return _read_traces
    if name.endswith(("/run.json", "/SHA256SUMS")):
        return _read_identity
    raise ValueError(f"nobody reads {name}")


def _read_store(folder: Path, name: str) -> dict[str, Any]:
    """Key -> completion, for the keys of the undamaged store."""
    from cotune.inference.stored import CompletionStore

    keys = [bytes.fromhex(line) for line in (folder / "keys.txt").read_text().split()]
    store = CompletionStore(folder / "completions.sqlite")
    try:
        return {key.hex(): vars(value) for key, value in store.find(keys).items()}
    finally:
        store.close()


def _read_checkpoint(folder: Path, name: str) -> dict[str, Any]:
    """The checkpoint that would be continued, by its content; older ones are keys that a newer one has too."""
    from cotune.callbacks.checkpoint import Checkpoints

    path, _ = Checkpoints((folder / name).parent).newest()
    if path is None:
        return {}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    known = json.loads((folder / "digests.json").read_text())  # of the whole ones, the oldest first
    if digest not in known:
        return {"believed": path.name}
    return {f"state {number}": True for number in range(known.index(digest) + 1)}


def _read_traces(folder: Path, name: str) -> dict[str, Any]:
    """Place -> trace, of the step that the file is in."""
    from cotune.datamodules.trace import load_traces
    from cotune.programs import Predict

    program = Predict("petal_length, petal_width, sepal_length, sepal_width -> answer")
    step = next(part for part in (folder / name).parents if part.name.startswith("step-"))
    return {str(place): repr(trace) for place, trace in enumerate(load_traces(step, program))}


def _read_identity(folder: Path, name: str) -> dict[str, Any]:
    from cotune.storage.run_identity import read_identity

    found = read_identity((folder / name).parent)
    return {} if found is None else {"identity": repr(found)}


def prepare(template: Path) -> None:
    """Notes beside the files what the readers look for: the store's keys, the checkpoints' digests."""
    import sqlite3

    with tempfile.TemporaryDirectory() as folder:  # opening the store would empty its log
        for path in template.glob("completions.sqlite*"):
            shutil.copy2(path, folder)
        connection = sqlite3.connect(Path(folder, "completions.sqlite"))
        keys = [row[0].hex() for row in connection.execute("SELECT key FROM entries WHERE length(value) != 32")]
        connection.close()
    (template / "keys.txt").write_text("\n".join(keys))
    folder = template / "runs" / "tiny" / "checkpoints"
    paths = [folder / name for name in ("previous.ckpt", "last.ckpt") if (folder / name).is_file()]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    (template / "digests.json").write_text(json.dumps(digests))


def _restore(template: Path, scratch: Path, name: str) -> None:
    """The files that reading may have changed, as they were."""
    if "completions.sqlite" in name:
        for path in scratch.glob("completions.sqlite*"):
            path.unlink()
        for path in template.glob("completions.sqlite*"):
            shutil.copy2(path, scratch / path.name)
    else:
        shutil.copy2(template / name, scratch / name)


def _boundaries(path: Path, data: bytes) -> set[int]:
    """Where records of a file begin and end: lines of text, pages, frames of a log, members of a zip file."""
    if path.name.endswith("-wal"):
        return {0, 32} | set(range(32, len(data), 24 + 4096))
    if path.suffix == ".sqlite":
        return set(range(0, len(data), 4096))
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            return {0, *(info.header_offset for info in packed.infolist()), packed.start_dir}
    ends = {0, max(len(data) - 1, 0)}
    if len(data) < 1 << 20:
        ends |= {at + 1 for at, byte in enumerate(data) if byte == 10}
    return ends


def _damage_line(text: str) -> str:
    return next((line for line in text.splitlines() if "damaged" in line or "SHA-256" in line), "")
