"""The parts of the suite, each a loop over trials."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from tiny import save_tiny_model

from faults import canary, corruption, crash_points, disk, inputs, kills, numerics, processes, stops, two_runs
from faults.kills import Reference
from faults.nursery import imported, in_child
from faults.small_run import Job, embedded_job, tiny_job
from faults.trials import Trial, Trials

EACH_STEP = ("--alternate.save_every", "1")
"""Saves after every optimiser step: what the bound of one unit lost a kill is measured with."""


STORE_OFF = ("--model.lm.completions", "off")

SHAPES: dict[str, tuple[tuple[str, ...], str]] = {
    "4 batches a step": (("--trainer.accumulate_grad_batches", "4"), "p -> w -> p"),
    "one batch an epoch": (("--data.batch_size", "64"), "w -> p -> w"),
    "prompt steps alone": ((), "p -> p"),
    "no store": (STORE_OFF, "p -> w -> p"),
    "no store, 4 batches a step, saved by time": ((*STORE_OFF, "--trainer.accumulate_grad_batches", "4"), "w -> p"),
}
"""Runs of other shapes: options and schedule."""


class Suite:
    """The suite with its folders.

    Args:
        results: file of the trials.
        work: folder of the runs.
        scale: share of the trials.
        fresh: forget a part's earlier trials before it is run.
    """

    def __init__(self, results: Path, work: Path, *, scale: float = 1.0, fresh: bool = False) -> None:
        imported()
        self.trials, self.work, self.scale, self.fresh = Trials(results), work, scale, fresh
        work.mkdir(parents=True, exist_ok=True)
        (work / ".gitignore").write_text("*\n")

    # References

    @cached_property
    def model(self) -> Path:
        folder = self.work / "model"
        return folder if (folder / "config.json").is_file() else save_tiny_model(folder)

    @cached_property
    def tiny(self) -> tuple[Job, Reference]:
        """p -> w -> p of the tiny model."""
        job = tiny_job(self.model, self.work / "tiny", *EACH_STEP)
        return job, kills.reference(job)

    @cached_property
    def short(self) -> tuple[Job, Reference]:
        """p -> w with one epoch: fewer calls, for trials of each of them."""
        job = tiny_job(self.model, self.work / "short", "--alternate.epochs", "1", schedule="p -> w")
        return job, kills.reference(job)

    @cached_property
    def embedded(self) -> tuple[Job, Reference]:
        """p -> w of SmolLM2-135M-Instruct."""
        job = embedded_job(self.work / "embedded", *EACH_STEP)
        return job, kills.reference(job)

    # Parts

    def kills(self) -> None:
        """SIGKILL at random times; every fifth run is killed three times."""
        job, expected = self.tiny
        self._begin("SIGKILL")
        for i in range(self._some(200)):
            often = 3 if i % 5 == 4 else 1
            self.trials.run(
                "SIGKILL", f"{i}", lambda i=i, n=often: kills.kill_trial(job, expected, seed=f"k{i}", kills=n)
            )

    def kills_shapes(self) -> None:
        """SIGKILL at random times of runs of other shapes; every third is killed twice."""
        self._begin("SIGKILL, other shapes")
        for name, (words, schedule) in SHAPES.items():
            pace = () if "by time" in name else EACH_STEP
            job = tiny_job(self.model, self.work / "shapes", *words, *pace, schedule=schedule)
            expected = kills.reference(job)
            for i in range(self._some(20)):
                self.trials.run(
                    "SIGKILL, other shapes",
                    f"{name} {i}",
                    lambda i=i, job=job, expected=expected, name=name: kills.kill_trial(
                        job,
                        expected,
                        seed=f"{name}{i}",
                        kills=1 + (i % 3 == 2),
                        stored="no store" not in name,
                        each_step="by time" not in name,
                    ),
                )

    def kills_embedded(self) -> None:
        job, expected = self.embedded
        self._begin("SIGKILL, SmolLM2")
        for i in range(self._some(20)):
            self.trials.run("SIGKILL, SmolLM2", f"{i}", lambda i=i: kills.kill_trial(job, expected, seed=f"e{i}"))

    def crash_points(self) -> None:
        job, expected = self.tiny
        self._begin("crash points")
        crash_points.every_crash_point(self.trials, job, expected, most=self._some(1000))

    def stops(self) -> None:
        job, expected = self.tiny
        for kind in stops.KINDS:
            self._begin(kind)
            for i in range(self._some(25)):
                self.trials.run(
                    kind, f"{i}", lambda k=kind, i=i: stops.stop_trial(job, expected, kind=k, seed=f"{k}{i}")
                )

    def two_runs(self) -> None:
        job, expected = self.tiny
        self._begin("two runs in one directory")
        for i in range(self._some(20)):
            self.trials.run(
                "two runs in one directory", f"{i}", lambda i=i: two_runs.two_runs_trial(job, expected, seed=f"{i}")
            )

    def corruption(self) -> None:
        """Damage of every durable file of two interrupted runs: read at once, and by whole runs."""
        job, expected = self.tiny
        for part in ("damaged files", "damaged files, whole runs"):
            self._begin(part)
        for point, k in (("after step", 7), ("after commit", 19)):
            template = corruption.interrupted(job, self.work / "template", point, k)
            corruption.prepare(template)
            for name in corruption.durable_files(template):
                self._damage(job, expected, template, f"{point} {k} {name.removeprefix('runs/tiny/')}", name)

    def _damage(self, job: Job, expected: Reference, template: Path, key: str, name: str) -> None:
        flips, cuts, whole = self._some(1000), self._some(200), int(6 * self.scale)
        self.trials.run(
            "damaged files",
            key,
            lambda: corruption.quick_trials(template, name, flips=flips, cuts=cuts, seed=key),
        )
        for i in range(whole):
            self.trials.run(
                "damaged files, whole runs",
                f"{key} {i}",
                lambda i=i: corruption.whole_trial(job, template, name, expected, seed=f"{key}{i}"),
            )

    def disk(self) -> None:
        """Failing system calls, small disks, and writes cut short."""
        job, expected = self.short
        for kind in disk.CALLS:
            for error in disk.ERRORS:
                self._begin(f"{error} on {kind}")
        if disk.have_strace():
            disk.every_call(self.trials, job, expected, step=max(1, round(1 / self.scale)), most=100_000)
        else:
            print("strace is not here, or may not trace: no failing calls are injected. apt-get install strace")
        self._begin("a disk that fills")
        if disk.may_mount(self.work / "mount"):
            for kilobytes in range(16, 4096, max(16, round(16 / self.scale))):
                if self._ends(
                    "a disk that fills", kilobytes, lambda n=kilobytes: disk.small_disk_trial(job, expected, n)
                ):
                    break
        else:
            print("no small disk can be mounted (that takes root): no disk is filled.")
        self._begin("writes cut short")
        for limit in range(512, 1 << 21, max(2048, round(2048 / self.scale))):
            if self._ends("writes cut short", limit, lambda n=limit: disk.short_write_trial(job, expected, n)):
                break

    def numerics(self) -> None:
        job, _ = self.tiny
        for value in numerics.BAD:
            part = f"{value} loss"
            self._begin(part)
            for k in range(1, 200, max(1, round(1 / self.scale))):
                if self._ends(part, k, lambda v=value, k=k: numerics.not_a_number_trial(job, v, k)):
                    break

    def memory(self) -> None:
        job, expected = self.tiny
        step = max(1, round(1 / self.scale))
        self._begin("out of memory in training")
        for k in range(1, 200, step):
            if self._ends("out of memory in training", k, lambda k=k: numerics.training_memory_trial(job, expected, k)):
                break
        self._begin("out of memory in generation")
        for k in range(1, 2000, 5 * step):
            if self._ends(
                "out of memory in generation", k, lambda k=k: numerics.generation_memory_trial(job, expected, k)
            ):
                break
        self._begin("little memory (RLIMIT_AS)")
        for megabytes in range(2, 1024, 8 * step):
            if self._ends(
                "little memory (RLIMIT_AS)",
                megabytes,
                lambda n=megabytes: numerics.address_space_trial(job, expected, n),
            ):
                break

    def processes(self) -> None:
        job = tiny_job(self.model, self.work / "processes", *EACH_STEP, "--model.gradient_slices", "8")
        expected = kills.reference(job)
        self._begin("several processes")
        for k in range(int(50 * self.scale) or 1):
            self.trials.run(
                "several processes", f"{k}", lambda k=k: processes.processes_trial(job, expected, seed=f"{k}")
            )

    def canary(self) -> None:
        self._begin("a key in the environment")
        job = tiny_job(self.model, self.work / "canary")
        for wandb in (False, True):
            self.trials.run(
                "a key in the environment",
                "with W&B, offline" if wandb else "files only",
                lambda w=wandb: canary.canary_trial(job, wandb=w),
            )

    def inputs(self) -> None:
        """Each target on inputs that Hypothesis makes up, a thousand a trial, each with a seed of its own."""
        for target in inputs.STRATEGIES:
            part = f"nonsense: {target.__name__}"
            self._begin(part)
            for i in range(10):
                count = self._some(1000)
                self.trials.run(part, f"{i}", lambda t=target, n=count, i=i: self._nonsense(t, n, i))

    def _nonsense(self, target: object, count: int, seed: int) -> Trial:
        ran = in_child(lambda: inputs.check(target, count, seed=seed))  # type: ignore[arg-type]
        return {"ok": ran >= count // 2, "trials": ran, "redone": 0, "silent": 0, "said": ""}

    # Small parts

    def _begin(self, part: str) -> None:
        if self.fresh:
            self.trials.forget(part)

    def _some(self, count: int) -> int:
        return max(1, round(count * self.scale))

    def _ends(self, part: str, key: int, trial: object) -> bool:
        return bool(self.trials.run(part, f"{key}", trial).get("end"))  # type: ignore[arg-type]
