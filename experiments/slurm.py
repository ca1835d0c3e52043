"""Tables on a SLURM cluster: each run is a task of an array job, and the same command again puts together what came."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cotune.experiments.runs import Run
from cotune.experiments.table_config import TableError
from cotune.storage.durable import write_whole
from cotune.storage.row_store import RowStore

_JOBS = "submitted.txt"
_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name} --array=1-{count} --output={logs}/slurm-%A_%a.txt --open-mode=append
#SBATCH --requeue --signal=SIGUSR1@180
{options}
run=$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {names})
srun {command} --run "$run"
code=$?
[ $code = 138 ] && exec scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
exit $code
"""


def submit(
    runs: Sequence[Run], folder: Path, words: Sequence[str], *, name: str, options: Sequence[str] = ()
) -> list[str]:
    """Submits the runs as one array job, and those that need another's figures as a second one after it.

    Args:
        folder: of the table; script and names go there.
        words: that stand behind `cotune`, for this table.
        options: of sbatch, beside the script's own, e.g. "--gres=gpu:1".

    Returns:
        The numbers of the jobs.

    Raises:
        TableError: there is no sbatch, or it refuses.
    """
    if shutil.which("sbatch") is None:
        raise TableError("--submit slurm needs sbatch, which was not found: start this on a machine that has it.")
    jobs: list[str] = []
    for wave in ([run for run in runs if not run.equal], [run for run in runs if run.equal]):
        if not wave:
            continue
        base = folder.resolve() / f"submit-{len(jobs) + 1}"
        names, logs = base.with_suffix(".txt"), folder.resolve() / "runs" / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        write_whole(names, "".join(f"{run.name}\n" for run in wave))
        script = _SCRIPT.format(
            name=f"cotune-{name}",
            count=len(wave),
            logs=logs,
            options="\n".join(f"#SBATCH {option}" for option in options),
            names=shlex.quote(str(names)),
            command=shlex.join([sys.executable, "-m", "cotune", *words]),
        )
        write_whole(base.with_suffix(".sbatch"), script)
        after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        made = subprocess.run(
            ["sbatch", "--parsable", *after, str(base.with_suffix(".sbatch"))], capture_output=True, text=True
        )
        if made.returncode:
            raise TableError(f"sbatch refuses {base}.sbatch: {made.stderr.strip() or made.stdout.strip()}")
        jobs.append(made.stdout.strip().split(";")[0])
        write_whole(folder / _JOBS, "".join(f"{job}\n" for job in jobs))
    return jobs


def under_way(folder: Path) -> list[str]:
    """The tasks of the jobs submitted last that wait or run."""
    file = folder / _JOBS
    if not file.is_file():
        return []
    jobs = ",".join(file.read_text(encoding="utf-8").split())
    asked = subprocess.run(["squeue", "--noheader", "--format=%i", "--jobs", jobs], capture_output=True, text=True)
    return asked.stdout.split() if asked.returncode == 0 else []  # it knows nothing of jobs that have long ended


def own_store(folder: Path) -> Path:
    """The completion store of a run that is a task of an array: only one process writes it, on any file system."""
    return folder / "completions.sqlite"


def merge_stores(runs: Sequence[Path], into: Path) -> int:
    """Moves what these runs' own stores hold into the one that all runs share; returns how many were there.

    The runs must have ended: nobody writes there any more.
    """
    stores = [own_store(run) for run in runs if own_store(run).is_file()]
    store = RowStore(into)
    try:
        for path in stores:
            store.take(path)
            for file in path.parent.glob(f"{path.name}*"):
                file.unlink()
    finally:
        store.close()
    return len(stores)
