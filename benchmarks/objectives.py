"""What a step of each objective costs beside completion loss, and TRL's GRPO step on the same rows; and how far the
sampler's log-probabilities lie from the trainer's.

Steps: one model, adapter and batch of rows with a shared prefix for all; sides take turns. Times are CPU seconds of one
thread, which neighbours change little; memory is the process's peak over the steps. TRL gets the log-probabilities that
the rows were drawn with, as cotune does. The losses of the policy gradient's steps must be equal before a ratio is
printed; they are nought until the adapter has moved, and those of later steps tell whether gradients were the same.

Spread: completions drawn at temperature 1, all tokens free, in fp32 and bf16, by merged weights and by unmerged ones.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from cotune.datamodules import Pair, collate
from cotune.lightning_modules import LanguageModel
from cotune.lightning_modules.training.gradients import BatchGradients
from cotune.programs import Request, Sampling

from benchmarks.environments import interpreter
from benchmarks.models import language_model, make_sides, speak
from benchmarks.peers import Worker, runtime
from benchmarks.report import RESULTS, Report
from benchmarks.training import EQUAL, TRL, Job, UnequalLossError, base_folder
from benchmarks.workers.cotune_objectives import OBJECTIVES

BASE = "completion loss"
PEER = "TRL, grpo"
CLIPPED = 0.2
"""How far from 1 the ratio of two probabilities of a token counts, in grpo."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    report = Report("objectives", details={"options": {k: v for k, v in vars(options).items() if k != "output"}})
    if "spread" in options.parts:
        for dtype in ("float32", "bfloat16"):
            for merged in (True, False):
                spread(options, dtype, merged, report)
                report.write(Path(options.output))
    if "steps" in options.parts:
        steps(options, report)
        report.write(Path(options.output))


def steps(options: argparse.Namespace, report: Report) -> None:
    """Ratios of CPU seconds and of memory, by objective."""
    job = Job(options.shared, options.own, options.completion, options.rows)
    report.details["job"] = asdict(job)
    lm = LanguageModel(options.model)
    lm.load_tokenizer()
    (rows,) = job.batches(lm, 1)
    given = {"rows": rows, "advantages": [(-1.0) ** at for at in range(job.rows)], "steps": options.steps, "rate": 5e-4}
    with tempfile.TemporaryDirectory(prefix="cotune-benchmark-") as folder, ExitStack() as running:
        sides = make_sides(options.model, dtype="float32", folder=Path(folder))
        started = {"adapter": str(sides.adapter), "threads": options.threads}
        ours = running.enter_context(Worker("cotune_objectives", environment=runtime(options.threads)))
        report.details["versions"] = {"cotune": ours.call("start", model=options.model, **started)}
        known = ours.call("likeliest", rows=rows)
        theirs = None
        if options.peers:
            theirs = Worker("trl_grpo", python=interpreter(TRL), environment=runtime(options.threads))
            running.enter_context(theirs)
            folder_of_base = str(base_folder(options.model, Path(folder)))
            report.details["versions"][TRL] = theirs.call("start", model=folder_of_base, **started)
        names = [*OBJECTIVES, *([PEER] if theirs else [])]
        seconds: dict[str, list[float]] = {name: [] for name in names}
        peaks: dict[str, list[float]] = {name: [] for name in names}
        for number in range(options.rounds):
            losses = {}
            for name in names[number % len(names) :] + names[: number % len(names)]:
                if name == PEER and theirs:
                    done = theirs.call("run", **given, sampled=known["log_probs"], rows_at_once=options.peer_rows)
                else:
                    done = ours.call("run", objective=name, **given)
                losses[name] = done["losses"]
                seconds[name].append(statistics.median(done["seconds"][1:]))
                peaks[name].append(done["peak"] / 2**20)
                print(
                    f"{name:<16} {done['seconds']} s, losses {done['losses']}, {done['peak'] / 2**20:.0f} MiB",
                    flush=True,
                )
            report.details.setdefault("losses", []).append(losses)
            if theirs:
                _check_equal(losses["grpo"], losses[PEER])
    for what, found, unit in (("CPU seconds", seconds, "s"), ("peak memory", peaks, "MiB")):
        report.add(f"{what}, {BASE}", found[BASE], unit, better="less")
        for name in names[1:]:
            shares = [one / base for one, base in zip(found[name], found[BASE], strict=True)]
            report.add(f"{what}, {name}: of {BASE}", shares, "of it", better="less")
        if theirs:
            ratios = [one / own for one, own in zip(found[PEER], found["grpo"], strict=True)]
            report.add(f"{what}: TRL's grpo by cotune's", ratios, "x")
    report.add("CPU seconds, scoring by a reference, once a collection", [known["seconds"]], "s", better="less")


def spread(options: argparse.Namespace, dtype: str, merged: bool, report: Report) -> None:
    """How far apart sampler and trainer are on the ids that the sampler drew, in nats."""
    lm = language_model(LanguageModel, options.model, dtype=dtype, merge_while_generating=merged)
    lm.load(seed=0)
    speak(lm)
    chats = [
        [{"role": "user", "content": f"Tell me about country number {n} of the atlas, in a few sentences."}]
        for n in range(options.completions)
    ]
    drawn = lm.complete(
        [Request(chat, seed=seed) for seed, chat in enumerate(chats)],
        Sampling(temperature=1.0, max_new_tokens=options.new, log_probs=True),
    )
    batch = collate([[Pair(one.prompt_ids, one.completion_ids) for one in drawn]])
    lm.model.train()
    _, values = BatchGradients(8).likeliest(lm.model, batch, 0)
    trained = torch.tensor([float(value) for value in values[:, 0]], dtype=torch.float64)
    sampled = torch.tensor([value for one in drawn for value in one.log_probs], dtype=torch.float64)
    apart, ratio = (trained - sampled).abs(), (trained - sampled).exp()
    outside = int(((ratio - 1).abs() > CLIPPED).sum())
    name = f"{dtype}, {'merged' if merged else 'unmerged'}"
    report.details.setdefault("spread", {})[name] = {"tokens": len(apart), "outside": outside}
    for what, value in (("mean", apart.mean()), ("95th", apart.quantile(0.95)), ("most", apart.max())):
        report.add(f"sampler and trainer apart, {name}: {what}", [float(value)], "nats", better="less")
    print(f"{name}: {outside} of {len(apart)} tokens have a ratio outside 1 +- {CLIPPED:g}", flush=True)


def _check_equal(ours: Sequence[float], theirs: Sequence[float]) -> None:
    for step, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        if not abs(own - other) <= EQUAL:
            raise UnequalLossError(
                f"step {step}: grpo's loss is {own:.6f} with cotune and {other:.6f} with TRL; they may be {EQUAL:g} "
                "apart. No ratio is printed."
            )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=["spread", "steps"], default=["spread", "steps"])
    parser.add_argument("--shared", type=int, default=200, help="tokens that all prompts share")
    parser.add_argument("--own", type=int, default=40, help="tokens of a prompt's own")
    parser.add_argument("--completion", type=int, default=24, help="tokens of a completion")
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch, an even number")
    parser.add_argument("--peer-rows", type=int, default=2, help="rows that TRL computes at once")
    parser.add_argument("--steps", type=int, default=3, help="of a round; the first is not timed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--completions", type=int, default=24, help="of the spread")
    parser.add_argument("--new", type=int, default=32, help="most tokens of each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", nargs="*", choices=[TRL], default=[TRL])
    parser.add_argument("--model", default="embedded", help="as in LanguageModel")
    parser.add_argument("--output", default=str(RESULTS / "objectives.json"))
    options = parser.parse_args(arguments)
    if options.rows % 2 or options.rows % options.peer_rows:
        parser.error(f"--rows {options.rows} must be even, and a multiple of --peer-rows {options.peer_rows}")
    if options.steps < 2:
        parser.error(f"--steps {options.steps} is below 2")
    return options


if __name__ == "__main__":
    main()
