"""cotune's training step against TRL's `SFTTrainer` and a plain loop of Hugging Face and PEFT, all sides by turns.

Same model, adapter, rows, learning rate and clipping on every side. The losses of the same steps must be equal to
1e-4 before a ratio is printed: from the second step on they also tell whether the gradients were the same.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from cotune.lightning_modules import LanguageModel

from benchmarks import machine as rates
from benchmarks.environments import interpreter
from benchmarks.machine import Machine, Shape, Work
from benchmarks.models import make_sides
from benchmarks.peers import Worker, runtime
from benchmarks.report import RESULTS, Report

OURS, TRL, HF = "cotune", "trl", "hf-peft"
WORKERS = {OURS: "cotune_steps", TRL: "trl_steps", HF: "hf_steps"}
TARGETS = {TRL: 3.0}
EQUAL = 1e-4
"""How far the losses of a step may be apart, in nats a token."""

Row = tuple[list[int], list[int]]
"""Ids of a prompt, ids of its completion."""


class UnequalLossError(RuntimeError):
    """Two sides did not train the same: their times are of different work, and no ratio is printed."""


@dataclass(frozen=True)
class Job:
    """A batch's sizes in tokens: what its prompts share, what each has of its own, its completion."""

    shared: int = 600
    own: int = 100
    completion: int = 40
    rows: int = 8

    def batches(self, lm: LanguageModel, count: int) -> list[list[Row]]:
        """Batches of rows that all share one prefix, of plain English with numbers in it."""
        text = " ".join(f"Country {i} lies {i * 7 % 90} degrees north and has {i % 13} rivers." for i in range(20_000))
        ids = lm.tokenizer.encode(text)
        prefix, at, made = ids[: self.shared], self.shared, []
        for _ in range(count):
            rows = []
            for _ in range(self.rows):
                own, completion = ids[at : at + self.own], ids[at + self.own : at + self.own + self.completion]
                rows.append(([*prefix, *own], completion))
                at += self.own + self.completion
            made.append(rows)
        return made

    def limit(self, shape: Shape, rank_parameters: int) -> Work:
        """What a step cannot avoid: each distinct token once, the adapter's three products, attention's seven."""
        tokens = self.shared + self.rows * (self.own + self.completion)
        work = rates.lora_step(shape, tokens=tokens, completion_tokens=self.rows * self.completion)
        row = self.own + self.completion
        seen = self.shared * (self.shared + 1) / 2 + self.rows * row * (self.shared + (row + 1) / 2)
        # Forward two products of 2 FLOPs a pair and value, backward five: the scores are made again.
        return work + Work(6.0 * rank_parameters * tokens + 14.0 * shape.attention * seen, 0)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    report = Report("training")
    job = Job(options.shared, options.own, options.completion, options.rows)
    lm = LanguageModel(options.model)
    lm.load_tokenizer()
    batches = job.batches(lm, options.steps)
    with tempfile.TemporaryDirectory(prefix="cotune-benchmark-") as folder, ExitStack() as running:
        sides = make_sides(options.model, dtype="float32", folder=Path(folder))
        base = base_folder(options.model, Path(folder))
        workers = {}
        for name in (OURS, *options.peers):
            python = interpreter(TRL) if name == TRL else None
            worker = Worker(WORKERS[name], python=python, environment=runtime(options.threads))
            workers[name] = running.enter_context(worker)
            model = options.model if name == OURS else str(base)
            said = worker.call("start", model=model, adapter=str(sides.adapter), threads=options.threads)
            report.details.setdefault("versions", {})[name] = said
        asked = {name: {} if name == OURS else {"rows_at_once": options.peer_rows or job.rows} for name in workers}
        seconds, gemms = measure(workers, asked, batches, rounds=options.rounds, threads=options.threads, report=report)
    _tell(report, job, Shape.of(lm.config), seconds, gemms, _adapter_size(lm))
    report.details["job"] = {
        **asdict(job),
        "steps": options.steps,
        "peer_rows": options.peer_rows,
        "threads": options.threads,
    }
    report.write(Path(options.output))


def measure(
    workers: dict[str, Worker],
    asked: dict[str, dict[str, int]],
    batches: Sequence[Sequence[Row]],
    *,
    rounds: int,
    threads: int,
    report: Report,
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of a step, by side and round, and the machine's GEMM rate before each round.

    A round is all steps on every side, the sides in another order each round. Its first step warms up and is not timed.

    Raises:
        UnequalLossError: losses differ.
    """
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    gemms: list[float] = []
    for number in range(rounds):
        here: Machine = rates.measure(threads)
        print(f"\n{here}", flush=True)
        report.details.setdefault("machines", []).append(asdict(here))
        gemms.append(here.gemm["float32"])
        names = [*workers][number % len(workers) :] + [*workers][: number % len(workers)]
        found = {name: workers[name].call("run", batches=batches, rate=5e-4, **asked[name]) for name in names}
        for name, one in found.items():
            print(f"{name:<8} {one['seconds']} s, losses {one['losses']}", flush=True)
            seconds[name].append(statistics.median(one["seconds"][1:]))
        report.details.setdefault("losses", []).append({name: one["losses"] for name, one in found.items()})
        _check_equal({name: one["losses"] for name, one in found.items()})
    return seconds, gemms


def _check_equal(losses: dict[str, list[float]]) -> None:
    for name, found in losses.items():
        for step, (theirs, ours) in enumerate(zip(found, losses[OURS], strict=True)):
            if not abs(theirs - ours) <= EQUAL:
                raise UnequalLossError(
                    f"step {step}: the loss is {ours:.6f} with cotune and {theirs:.6f} with {name}; they may be "
                    f"{EQUAL:g} apart. No ratio is printed."
                )


def _tell(
    report: Report,
    job: Job,
    shape: Shape,
    seconds: dict[str, list[float]],
    gemms: Sequence[float],
    adapter: int,
) -> None:
    for name, found in seconds.items():
        report.add(f"step, {name}", found, "s", better="less")
    for name in seconds.keys() - {OURS}:
        ratios = [theirs / ours for theirs, ours in zip(seconds[name], seconds[OURS], strict=True)]
        report.add(f"step: ratio to {name}", ratios, "x", target=TARGETS.get(name))
    limit = job.limit(shape, adapter)
    for name, found in seconds.items():
        shares = [limit.flops / rate / one for rate, one in zip(gemms, found, strict=True)]
        report.add(f"step, {name}: least FLOPs at the GEMM rate", shares, "of the time")


def base_folder(model: str, folder: Path) -> Path:
    """The base model and its tokenizer as Hugging Face loads them."""
    lm = LanguageModel(model, device="cpu")
    lm.load(seed=0)
    plain = type(lm.model.get_base_model())(lm.config).eval()
    state = lm.model.unload().state_dict()
    plain.load_state_dict(state)
    plain.save_pretrained(folder / "base")
    lm.tokenizer.save_pretrained(folder / "base")
    return folder / "base"


def _adapter_size(lm: LanguageModel) -> int:
    """Parameters of the adapter, from the shapes of the layers that it adapts."""
    config, rank = lm.config, lm.lora.r
    width, size = (
        config.hidden_size,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
    query, kv = config.num_attention_heads * size, config.num_key_value_heads * size
    each = 2 * (width + query) + 2 * (width + kv) + 3 * (width + config.intermediate_size)
    return int(config.num_hidden_layers * rank * each)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shared", type=int, default=600, help="tokens that all prompts share")
    parser.add_argument("--own", type=int, default=100, help="tokens of a prompt's own")
    parser.add_argument("--completion", type=int, default=40, help="tokens of a completion")
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch")
    parser.add_argument("--peer-rows", type=int, help="rows that the peers compute at once; whole batches take 14 GB")
    parser.add_argument("--steps", type=int, default=2, help="of a round; the first is not timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", nargs="*", choices=[TRL, HF], default=[TRL, HF])
    parser.add_argument("--model", default="embedded", help="as in LanguageModel")
    parser.add_argument("--output", default=str(RESULTS / "training.json"))
    options = parser.parse_args(arguments)
    if options.peer_rows is not None and (options.peer_rows < 1 or options.rows % options.peer_rows):
        parser.error(f"--peer-rows {options.peer_rows} does not divide --rows {options.rows}")
    for name, least in (("rows", 1), ("own", 1), ("completion", 1), ("steps", 2), ("rounds", 1), ("threads", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)} is below {least}")
    return options


if __name__ == "__main__":
    main()
