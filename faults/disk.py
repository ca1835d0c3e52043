"""A disk that is full, broken or slow to say so: injected into every write, flush and rename of a run's files."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from faults.kills import Reference, resumed_equal
from faults.nursery import Child, fork, fresh, last_line, run_to_end
from faults.small_run import Job
from faults.trials import Trial, Trials

CALLS = {
    "write": "write,pwrite64,writev,pwritev",
    "fsync": "fsync,fdatasync",
    "rename": "rename,renameat,renameat2",
}
ERRORS = ("ENOSPC", "EIO")
_WAIT = 120.0


def have_strace() -> bool:
    """Whether strace is there and may trace."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, check=False).returncode == 0


def every_call(trials: Trials, job: Job, expected: Reference, *, step: int, most: int) -> None:
    """Each k-th call of each kind fails with each error, until a run makes fewer calls than that.

    Args:
        step: try every k-th, k + step-th … call; 1 tries all.
    """
    paths = written_paths(job)
    for kind, calls in CALLS.items():
        for error in ERRORS:
            for k in count(1, step):
                done = trials.run(
                    f"{error} on {kind}",
                    f"{k}",
                    lambda c=calls, e=error, n=k: injected_trial(job, expected, paths, c, e, n),
                )
                if done.get("end") or k >= most:
                    break


def written_paths(job: Job) -> list[Path]:
    """All files below the job's folder that an undisturbed run opens for writing, renames or makes, in order."""
    fresh(job.folder)
    trace = job.folder.with_name(job.folder.name + ".trace")
    _traced(job, ["-e", f"trace={','.join(CALLS.values())},openat", "-y", "-s", "0", "-o", str(trace)])
    found: dict[Path, None] = {}
    for line in trace.read_text(errors="replace").splitlines():
        for name in re.findall(r'[<"](/[^<>"]*)[>"]', line):
            path = Path(name.removesuffix(" (deleted)"))
            reading = "openat(" in line and "O_CREAT" not in line
            if path.is_relative_to(job.folder) and not reading and path.suffix != ".txt":
                found[path] = None
    return list(found)


def injected_trial(job: Job, expected: Reference, paths: Sequence[Path], calls: str, error: str, k: int) -> Trial:
    """One failing call, and then the same command on a mended disk. `end`: the run made fewer calls."""
    fresh(job.folder)
    trace = job.folder.with_name(job.folder.name + ".trace")
    options = [word for path in paths for word in ("-P", str(path))]
    options += ["-e", f"trace={calls}", "-e", f"inject={calls}:error={error}:when={k}", "-o", str(trace)]
    child = _traced(job, options)
    if "(INJECTED)" not in trace.read_text(errors="replace"):
        return {"ok": child.code == 0, "end": True, "redone": 0, "silent": 0, "said": ""}
    return _after(job, expected, child)


def small_disk_trial(job: Job, expected: Reference, kilobytes: int) -> Trial:
    """The run's folder on a disk of so many kilobytes, which fills wherever it fills; then with room."""
    fresh(job.folder)
    with _mounted(job.folder / "runs", kilobytes):
        child = run_to_end(job)
        if child.code == 0:
            return {"ok": True, "end": True, "redone": 0, "silent": 0, "said": ""}
        first = _told(child)
        subprocess.run(["mount", "-o", "remount,size=200m", str(job.folder / "runs")], check=True)
        equal, second = resumed_equal(job, expected)
    return _judged(first, child, equal, second)


def short_write_trial(job: Job, expected: Reference, limit: int) -> Trial:
    """No file may grow past `limit` bytes: the write that would is cut short, and the next one fails (RLIMIT_FSIZE)."""
    fresh(job.folder)
    child = run_to_end(job, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)))
    if child.code == 0:
        return {"ok": True, "end": True, "redone": 0, "silent": 0, "said": ""}
    if child.log.stat().st_size >= limit:
        return {"ok": True, "redone": 0, "silent": 0, "said": "(its own log was what grew too long)"}
    return _after(job, expected, child)


def _after(job: Job, expected: Reference, child: Child) -> Trial:
    first = _told(child)
    equal, second = resumed_equal(job, expected)
    return _judged(first, child, equal, second)


def _judged(first: bool, child: Child, equal: bool, second: Child) -> Trial:
    # A call that fails and is made up for (SQLite rolls back and tries again) may also end well.
    said = last_line(child.text) if child.code else "(it went on, and ended the same)"
    return {
        "ok": equal and first,
        "exit code": child.code,
        "redone": 0,
        "silent": int(second.code == 0 and not equal),
        "said": said if first else child.text[-800:],
        "after": "" if equal else last_line(second.text),
    }


def _told(child: Child) -> bool:
    """Whether the run went on, or ended with one message that names a path and the cause."""
    said = last_line(child.text)
    causes = [os.strerror(getattr(errno, name)) for name in (*ERRORS, "EFBIG")] + ["disk I/O error", "disk is full"]
    named = "/" in said and any(cause in said for cause in causes)
    return child.code == 0 or (child.code == 2 and named and "Traceback" not in child.text)


def _traced(job: Job, options: Sequence[str]) -> Child:
    child = fork(job, stopped=True)
    command = ["strace", "-f", "-p", str(child.pid), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as strace:
        assert strace.stderr is not None
        strace.stderr.readline()  # "strace: Process … attached"
        os.kill(child.pid, 18)  # SIGCONT
        child.wait(_WAIT)
        strace.wait(_WAIT)
    return child


@contextmanager
def _mounted(folder: Path, kilobytes: int) -> Iterator[None]:
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def may_mount(folder: Path) -> bool:
    """Whether this process may mount a small disk."""
    try:
        with _mounted(fresh(folder) / "probe", 64):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def sizes_until(end: Callable[[int], Trial], start: int, step: int) -> Iterator[tuple[int, Trial]]:
    """Trials of growing size, until one is enough for the whole run."""
    for size in count(start, step):
        done = end(size)
        yield size, done
        if done.get("end"):
            return
