"""DSPy's optimisers and TRL beside cotune: the same LM, data and number of LM calls, the same greedy test.

DSPy (random search, MIPROv2, GEPA) asks an OpenAI-compatible server of the very weights and engine that cotune runs on,
so nothing but the optimiser and its format differs; the LM proposes for itself. Its signature has the labels as a
`Literal` type, and the server holds outputs to the schema that DSPy's JSON adapter sends. A search ends when its calls
are used up; then val (counted as well) decides between its program and the plain one, as it does in cotune. TRL trains
on the traces that cotune's w trained on, by cotune's settings and by its own. Each result is written as it ends, and a
repeated command goes on behind it; completions are kept in --folder, so that it goes on within a search, too.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from cotune.datamodules import GSM8K, Banking77, Sizes
from cotune.datamodules.splits import Splits
from cotune.lightning_modules import LanguageModel
from cotune.programs import Example, Predict, Sampling
from cotune.programs.form import ReasonThenFill
from cotune.programs.runner import Runner
from cotune.reporting.closing_table import rank_of
from cotune.reporting.statistics import paired_difference

from benchmarks.environments import interpreter
from benchmarks.local_server import LocalServer
from benchmarks.peers import Worker, runtime
from benchmarks.report import RESULTS, Report

DSPY = ("random search", "MIPROv2", "GEPA")
TRL = ("TRL SFT, cotune's settings", "TRL SFT, its own settings")
PLAIN = "DSPy, plain"
OURS = {
    "vanilla": ("w", 0),
    "p": ("p-w-p", 1),
    "p -> p, equal calls": ("p-p-equal", 2),
    "w": ("w", 1),
    "p -> w -> p": ("p-w-p", 3),
}
"""Strategy -> the run of the table that has it, and how many of its steps."""


@dataclass(frozen=True)
class Task:
    """What is tuned, on the splits of configs/table/proof.yaml.

    Attributes:
        inputs: of the program; its one output is "answer".
        typed: whether the answer is one of the labels seen in train; a number where it is not.
        new: most tokens of an answer.
        reasoning: whether the LM reasons before it.
    """

    kind: type[Banking77] | type[GSM8K]
    sizes: Sizes
    inputs: tuple[str, ...]
    instruction: str
    typed: bool
    new: int
    reasoning: bool

    def load(self, path: str, seed: int) -> Splits:
        data = self.kind(path=path, sizes=self.sizes)
        data.seed = seed
        return data.load()

    def labels(self, sets: Splits) -> list[str] | None:
        return sorted({str(example.labels["answer"]) for example in sets.train}) if self.typed else None


TASKS = {
    "banking77": Task(
        Banking77, Sizes(60, 40, 40, 200), ("query",), "Say what the bank's customer wants.", True, 40, False
    ),
    "gsm8k": Task(GSM8K, Sizes(60, 40, 40, 120), ("question",), "Solve the problem.", False, 320, True),
}


class Tuners:
    """The cells that are done, and how one is made."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.task, self.output = options, TASKS[options.task], Path(options.output)
        self.settings = {
            name: getattr(options, name) for name in ("task", "calls", "demos", "adapter", "epochs", "batch_size")
        }
        self.cells: dict[str, dict[str, Any]] = {}
        if self.output.is_file():
            kept = json.loads(self.output.read_text(encoding="utf-8"))["details"]
            if kept["settings"] != self.settings:
                raise SystemExit(
                    f"{self.output} holds results of other settings: {kept['settings']}. Name another --output."
                )
            self.cells = kept["cells"]
        Path(options.folder).mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        for seed in self.options.seeds:
            sets = self.task.load(self.options.data, seed)
            self._ours(sets, seed)
            for how in self.options.peers:
                if f"{how}, {seed}" in self.cells:
                    continue
                began = time.perf_counter()
                cell = self._trl(how, sets, seed) if how in TRL else self._dspy(how, sets, seed)
                cell["seconds"] = round(time.perf_counter() - began)
                self.cells[f"{how}, {seed}"] = cell
                self.write()

    def write(self) -> None:
        report = Report("tuners", details={"settings": self.settings, "cells": self.cells})
        for how in (*OURS, PLAIN, *DSPY, *TRL):
            if found := self._of(how):
                tests = [statistics.fmean(map(int, cell["test"])) for cell in found.values()]
                report.add(f"{how}: test", tests, "of the examples")
        report.write(self.output)
        ours = self._scores(self._of("p -> w -> p"))
        for how in (PLAIN, *DSPY, *TRL):
            gap = paired_difference(self._scores(self._of(how)), ours)
            if gap is not None:
                print(f"p -> w -> p less {how}: {gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}], {gap.seeds} seeds")

    def _of(self, how: str) -> dict[int, dict[str, Any]]:
        named = {
            int(name.rpartition(", ")[2]): cell for name, cell in self.cells.items() if name.rpartition(", ")[0] == how
        }
        return dict(sorted(named.items()))

    def _scores(self, cells: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, float]]:
        return {seed: dict(zip(cell["ids"], map(float, cell["test"]), strict=True)) for seed, cell in cells.items()}

    def _ours(self, sets: Splits, seed: int) -> None:
        """cotune's own test scores, out of the folder that `cotune table` left."""
        if self.options.table is None:
            return
        ids = [example.id for example in sets.test]
        for strategy, (name, steps) in OURS.items():
            (run,) = Path(self.options.table).glob(f"runs/{self.options.task}_*_default_{name}_{seed}")
            history = [json.loads(line) for line in (run / "history.jsonl").read_text(encoding="utf-8").splitlines()]
            taken = history[: steps + 1]
            best = max(range(len(taken)), key=lambda at: rank_of(taken[at]))
            lines = (run / "rollouts" / f"test-{best}.jsonl").read_text(encoding="utf-8").splitlines()
            scores = {row["example"]: row["score"] for row in map(json.loads, lines)}
            self.cells[f"{strategy}, {seed}"] = {
                "calls": sum(step["lm_calls"] for step in taken),
                "ids": ids,
                "test": "".join(str(int(scores[id_])) for id_ in ids),
            }

    def _lm(self, model: str, dtype: str = "float32") -> LanguageModel:
        store = Path(self.options.folder) / "completions.sqlite" if model == self.options.model else None
        kept: dict[str, Any] = {"completions": store and str(store), "cache_tokens": 16384}
        lm = LanguageModel(model, dtype=dtype, device=self.options.device, **kept)  # type: ignore[arg-type]
        lm.load(seed=0)
        return lm

    def _dspy(self, how: str, sets: Splits, seed: int) -> dict[str, Any]:
        train, dev, val, test = (_rows(part) for part in (sets.train, sets.dev, sets.val, sets.test))
        named: dict[str, Any] = {
            "inputs": self.task.inputs,
            "labels": self.task.labels(sets),
            "instruction": self.task.instruction,
            "reasoning": self.task.reasoning,
            "adapter": self.options.adapter,
            "new": self.task.new,
            "proposal": 512,
            "threads": 32,
        }
        with (
            LocalServer(self._lm(self.options.model)) as server,
            Worker("dspy_tuners", python=interpreter("dspy"), environment=runtime(self.options.threads)) as dspy,
        ):
            cell: dict[str, Any] = dspy.call("start", **named, url=server.url, model=server.name)
            if how != PLAIN:
                # What val costs is a part of the calls, as it is in cotune.
                calls = self.options.calls - 2 * len(val)
                cell |= dspy.call(
                    "tune", how=how, train=train, dev=dev, calls=calls, seed=seed, demos=self.options.demos
                )
                scored = [sum(dspy.call("score", rows=val, tuned=tuned)["right"]) / len(val) for tuned in (False, True)]
                cell |= {"val": scored, "kept": scored[1] > scored[0], "calls": cell["calls"] + 2 * len(val)}
            else:
                cell["calls"] = 0
            said = dspy.call("score", rows=test, tuned=how != PLAIN)
        cell["ids"] = [example.id for example in sets.test]
        return cell | {"test": "".join(map(str, said["right"])), "unreadable": said["unreadable"]}

    def _trl(self, how: str, sets: Splits, seed: int) -> dict[str, Any]:
        """Trains on the traces of cotune's w in --table, and tests the weights in cotune's program, greedily.

        The weights are held as that run held them, and "cotune's settings" have its rate.
        """
        (run,) = Path(self.options.table).glob(f"runs/{self.options.task}_*_default_w_{seed}")
        rows = datasets.load_from_disk(str(run / "traces" / "step-1"))
        chats = [{"messages": [*row["messages"], {"role": "assistant", "content": row["completion"]}]} for row in rows]
        out = Path(self.options.folder) / f"trl-{how.partition(', ')[2].split()[0]}-{seed}"
        own = how.endswith("its own settings")
        epochs = 3 if own else self.options.epochs
        with Worker("trl_lora", python=interpreter("trl"), environment=runtime(self.options.threads)) as trl:
            cell: dict[str, Any] = trl.call("start")["versions"]
            cell |= trl.call(
                "train",
                model=str(_folder(self.options.model)),
                chats=chats,
                out=str(out),
                steps=epochs * -(-len(chats) // self.options.batch_size),
                batch_size=self.options.batch_size,
                rows_at_once=self.options.rows_at_once,
                rank=32,
                alpha=64,
                rate=2e-5 if own else _rate(run),
                threads=self.options.threads,
                device=self.options.device,
            )
        held = json.loads((run / "run.json").read_text(encoding="utf-8"))["options"]["model.lm.init_args.dtype"]
        lm = self._lm(str(out), held)
        program = Predict(
            f"{self.task.inputs[0]} -> answer{'' if self.task.typed else ': float'}",
            instruction=self.task.instruction,
            reasoning=self.task.reasoning,
            types={"answer": self.task.labels(sets)} if self.task.typed else None,
        )
        metric = self.task.kind(path=self.options.data, sizes=self.task.sizes).metric
        runner = Runner(program, lm, ReasonThenFill(), metric, Sampling(max_new_tokens=self.task.new), 1.0)
        scores = {
            part: [rollout.score for rollout in runner.run(getattr(sets, part), program.initial_prompts())]
            for part in ("val", "test")
        }
        cell["val"] = statistics.fmean(scores["val"])
        cell["ids"] = [example.id for example in sets.test]
        return cell | {"test": "".join(str(int(score)) for score in scores["test"]), "pairs": len(chats)}


def _rows(examples: Sequence[Example]) -> list[dict[str, Any]]:
    return [{**example.inputs, **example.labels} for example in examples]


def _rate(run: Path) -> float:
    """The full learning rate of a run's weight step, as its log has it."""
    with (run / "metrics.csv").open(encoding="utf-8") as lines:
        return float(f"{max(float(row['train/lr']) for row in csv.DictReader(lines) if row['train/lr']):.3g}")


def _folder(model: str) -> Path:
    from cotune.lightning_modules.embedded import embedded_model

    return embedded_model() if model == "embedded" else Path(model)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    tuners = Tuners(options)
    tuners.run()
    tuners.write()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--task", choices=list(TASKS), default="banking77")
    parser.add_argument("--data", default="PolyAI/banking77", help="as the data module's path: a folder or an id")
    parser.add_argument("--model", default="embedded", help="as in LanguageModel")
    parser.add_argument("--calls", type=int, default=1766, help="LM calls of a search, val included and test not")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--peers", nargs="*", choices=[PLAIN, *DSPY, *TRL], default=[*DSPY, PLAIN])
    parser.add_argument("--table", help="a folder of cotune table with the task's runs: cotune's scores, w's traces")
    parser.add_argument("--demos", type=int, default=3, help="most demos of a prompt, of either kind")
    parser.add_argument("--adapter", choices=["json", "chat"], default="json", help="DSPy's")
    parser.add_argument("--epochs", type=int, default=10, help="of TRL by cotune's settings")
    parser.add_argument("--batch_size", type=int, default=8, help="TRL's")
    parser.add_argument("--rows_at_once", type=int, help="of TRL's batch; fewer take less memory (default: all)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", default="runs/tuners", help="where completions and TRL's weights are kept")
    parser.add_argument("--output", default=str(RESULTS / "tuners.json"), help="a JSON file for the figures")
    options = parser.parse_args(arguments)
    if options.table is None and (missing := [peer for peer in options.peers if peer in TRL]):
        parser.error(f"{missing[0]} trains on cotune's traces: name the folder that has them by --table")
    return options


if __name__ == "__main__":
    main()
