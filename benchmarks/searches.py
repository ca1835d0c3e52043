"""How many LM calls does a reflective prompt search take beside gepa? On a scripted task: only the search counts.

Three stages, 8 hidden rules of 40, noisy scores, a proposer that obeys feedback 7 times of 10 (`workers.hidden_rules`).
Both sides have the same task, proposer, examples, minibatch and budget; what is counted is what each asks for until
prompts with all eight rules are scored on dev. A second scripted task has instructions and demos of hidden quality, and
shows what racing and the joint choice do. No model runs, so it takes minutes and any machine will do.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cotune.programs import (
    Call,
    Completion,
    Example,
    Lines,
    Predict,
    Program,
    Prompt,
    Prompts,
    Request,
    Runner,
    Sampling,
    Score,
    Signature,
    Stage,
    exact_match,
)
from cotune.prompting import JointSearch, PromptSearch, RandomDemoSearch, ReflectiveSearch, SearchTask

from benchmarks.environments import interpreter
from benchmarks.peers import Worker
from benchmarks.report import RESULTS, Report
from benchmarks.workers import hidden_rules

TRAIN, DEV, MAX_RUNS = 30, 20, 4000
ENOUGH = 1000
"""Runs of a search of cotune's with feedback, which does not stop when it has all rules; all seeds have them before."""
PLAIN: Mapping[str, Any] = {"feedback": True, "objectives": False, "stages": 3}


@dataclass(frozen=True)
class Variant:
    """One way of searching.

    Attributes:
        peer: gepa's settings; None is cotune's side.
        options: of `ReflectiveSearch`.
        setting: of the task, both sides' alike.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    peer: Mapping[str, Any] | None = None
    setting: Mapping[str, Any] = field(default_factory=lambda: PLAIN)


_NO_FEEDBACK = {**PLAIN, "feedback": False}
_TWO = {**PLAIN, "objectives": True}
_ONE_STAGE = {**PLAIN, "stages": 1}
VARIANTS = (
    Variant("gepa", peer={"proposals": 1, "merge": False}),
    Variant("gepa with merges", peer={"proposals": 1, "merge": True}),
    Variant("gepa, 4 proposals", peer={"proposals": 4, "merge": False}),
    Variant("by turns", {"choose_stage": "turns"}),
    Variant("by turns, 1 proposal", {"choose_stage": "turns", "proposals": 1}),
    Variant("by blame"),
    Variant("by blame, 1 proposal", {"proposals": 1}),
    Variant("gepa, no feedback", peer={"proposals": 1, "merge": False}, setting=_NO_FEEDBACK),
    Variant("no feedback", setting=_NO_FEEDBACK),
    Variant("gepa, two objectives", peer={"proposals": 1, "merge": False}, setting=_TWO),
    Variant("two objectives", setting=_TWO),
    Variant("gepa, one stage", peer={"proposals": 1, "merge": False}, setting=_ONE_STAGE),
    Variant("one stage", setting=_ONE_STAGE),
    Variant("one stage, 1 proposal", {"proposals": 1}, setting=_ONE_STAGE),
)


class Steps(Program):
    """The stages, one after another. The fake LM repeats each stage's instruction, so the metric can see it."""

    def __init__(self, stages: int) -> None:
        self.names = hidden_rules.STAGES[:stages]
        for name in self.names:
            instruction = hidden_rules.instruction_of(name)
            setattr(self, name, Stage(Signature.parse("text -> done", instruction=instruction), name))

    def run(self, text: str) -> Generator[Call, Mapping[str, Any], Mapping[str, Any]]:
        found = {}
        for name in self.names:
            found[name] = (yield getattr(self, name)(text=text))["done"]
        return found


class Scripted:
    """The LM of both roles: as the program's it repeats the instruction, as the proposer it obeys feedback."""

    def __init__(self, task: hidden_rules.Task) -> None:
        self.task = task

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        return [Completion(self._proposal(r) if r.messages[0]["role"] == "user" else _echo(r)) for r in requests]

    def _proposal(self, request: Request) -> str:
        text = request.messages[0]["content"]
        stage = text.split('the stage "')[1].split('"')[0]
        current = text.split("```\n")[1].removesuffix("\n")
        told = "\n".join(line for line in text.splitlines() if line.startswith("Feedback: "))
        return f"```\n{self.task.propose(stage, current, told, str(request.seed))}\n```"


def _echo(request: Request) -> str:
    instruction = request.messages[0]["content"].rpartition("\nReply with")[0]
    return json.dumps(instruction)


def search(variant: Variant, seed: int) -> dict[str, Any]:
    """One search of cotune's side; see `gepa_rules.optimize` for the figures."""
    task = hidden_rules.Task(seed, variant.setting["feedback"], variant.setting["stages"])

    def metric(example: Example, prediction: Mapping[str, Any]) -> Score:
        instructions = {stage: json.loads(text) for stage, text in prediction.items()}
        value, feedback, stage, halves = task.run(instructions, example.inputs["text"])
        blamed = {stage: feedback} if stage else {}
        return Score(value, feedback, halves if variant.setting["objectives"] else {}, blamed)

    program = Steps(variant.setting["stages"])
    initial = program.initial_prompts()
    budget = ENOUGH if variant.setting["feedback"] else MAX_RUNS
    found = ReflectiveSearch(max_runs=budget, **variant.options).search(
        SearchTask(
            Runner(program, Scripted(task), Lines(), metric, Sampling()),
            initial=initial,
            incumbent=initial,
            train=[Example.of({"text": f"train {n}"}, {}, id=f"train {n}") for n in range(TRAIN)],
            dev=[Example.of({"text": f"dev {n}"}, {}, id=f"dev {n}") for n in range(DEV)],
            seed=seed,
        )
    )

    def instructions(prompts: Prompts) -> dict[str, str]:
        return {stage: prompt.instruction for stage, prompt in prompts.items()}

    whole = [c for c in found.candidates if len(task.obeyed(instructions(c.prompts))) == hidden_rules.HIDDEN]
    rounds = whole[0].lineage["round"] if whole else 0
    # One proposal for each rejected text, and one for each stage that was rewritten in a candidate.
    asked = [c.lineage["round"] for c in (*found.candidates, *found.rejected) for _ in c.lineage.get("rewritten", ())]
    return {
        "stages": task.stages,
        "solved_at": task.solved_at,
        "runs": task.runs,
        "proposer_calls": sum(1 for number in asked if not whole or number <= rounds),
        "rounds": rounds,
        "share": len(task.obeyed(instructions(found.prompts))) / hidden_rules.HIDDEN,
    }


def peer_search(worker: Worker, variant: Variant, seed: int) -> dict[str, Any]:
    assert variant.peer is not None
    found: dict[str, Any] = worker.call(
        "optimize", seed=seed, **variant.setting, **variant.peer, train=TRAIN, dev=DEV, max_runs=MAX_RUNS
    )
    return found


def calls(one: Mapping[str, Any]) -> float:
    """LM calls until all rules were found; those of the largest budget where they were not."""
    return float(one["stages"] * (one["solved_at"] or MAX_RUNS) + one["proposer_calls"])


# Instructions and demos of hidden quality

QUALITY_DEV = 100


def quality(instruction: str, demos: Sequence[str]) -> float:
    """The chance of a right answer: 0.2, and up to 0.3 each for the instruction and for the demos."""
    return 0.2 + 0.3 * _share(instruction) + (0.3 * _share(" ".join(demos)) if demos else 0.0)


def _share(text: str) -> float:
    return random.Random(f"quality of {text}").random()


class Graded:
    """An LM whose answers are right as often as the quality of its prompt says, and a proposer of new wordings."""

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        return [Completion(self._write(request)) for request in requests]

    def _write(self, request: Request) -> str:
        if request.adapter == "":
            return f"Wording {request.seed}."
        chats = [message["content"] for message in request.messages]
        text, asked = chats[0].partition("\n")[0], chats[-1].removeprefix("number: ")
        demos = [m["content"] for m in request.messages if m["role"] == "assistant"]
        right = random.Random(f"{text} {demos} {asked}").random() < quality(text, demos)
        return asked if right else "no"


QUALITY_SEARCHES: Mapping[str, PromptSearch] = {
    "demos": RandomDemoSearch(num_candidates=6),
    "joint, no racing": JointSearch(racing=None),
    "joint": JointSearch(),
}


def quality_search(search: PromptSearch, seed: int) -> dict[str, float]:
    """One search: its LM calls, and the true quality of what it found."""
    program = Predict("number -> answer", instruction=f"Task {seed}.")
    initial = program.initial_prompts()

    def examples(first: int, count: int) -> list[Example]:
        return [Example.of({"number": n}, {"answer": str(n)}, id=str(n)) for n in range(first, first + count)]

    lm = _Counted(Graded())
    found = search.search(
        SearchTask(
            Runner(program, lm, Lines(), exact_match, Sampling()),
            initial=initial,
            incumbent=initial,
            train=examples(1, 40),
            dev=examples(1000 * (seed + 1), QUALITY_DEV),
            seed=seed,
        )
    )
    prompt: Prompt = found.prompts["predict"]
    return {
        "calls": lm.calls,
        "quality": quality(prompt.instruction, [demo.outputs["answer"] for demo in prompt.demos]),
    }


class _Counted:
    def __init__(self, lm: Graded) -> None:
        self.lm, self.calls = lm, 0

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.calls += len(requests)
        return self.lm.complete(requests, sampling)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    report = Report("searches")
    rows: dict[str, list[dict[str, Any]]] = {}
    chosen = [variant for variant in VARIANTS if not options.only or variant.name in options.only]
    with Worker("gepa_rules", python=interpreter("gepa")) as worker:
        report.details = {"seeds": options.seeds, "versions": worker.call("versions"), "train": TRAIN, "dev": DEV}
        for variant in chosen:
            seeds = range(options.seeds)
            ran = [peer_search(worker, variant, s) if variant.peer is not None else search(variant, s) for s in seeds]
            rows[variant.name] = ran
            _tell(report, variant.name, ran)
    for name, beside in PAIRS:
        if name in rows and beside in rows:
            _compare(report, name, rows[name], beside, rows[beside])
    for name, one in QUALITY_SEARCHES.items():
        if not options.only or name in options.only:
            graded = [quality_search(one, seed) for seed in range(options.seeds)]
            report.add(f"quality task, {name}: LM calls", [row["calls"] for row in graded], "calls")
            report.add(f"quality task, {name}: true quality found", [row["quality"] for row in graded], "of 0.8")
    report.details["rows"] = rows
    report.write(Path(options.output))


PAIRS = (
    ("by turns", "gepa"),
    ("by turns, 1 proposal", "gepa"),
    ("by blame", "gepa"),
    ("by blame, 1 proposal", "gepa"),
    ("by turns", "gepa, 4 proposals"),
    ("no feedback", "gepa, no feedback"),
    ("two objectives", "gepa, two objectives"),
    ("one stage", "gepa, one stage"),
    ("one stage, 1 proposal", "gepa, one stage"),
)
"""Whose calls and rounds are divided by whose."""


def _tell(report: Report, name: str, ran: Sequence[Mapping[str, Any]]) -> None:
    report.add(f"{name}: LM calls to a full score", [calls(one) for one in ran], "calls", better="less")
    report.add(f"{name}: rounds", [float(one["rounds"]) for one in ran if one["solved_at"]] or [0.0], "rounds")
    report.add(f"{name}: solved", [float(bool(one["solved_at"])) for one in ran], "of the seeds")
    report.add(f"{name}: share of rules in the result", [one["share"] for one in ran], "share")


def _compare(
    report: Report, name: str, ours: Sequence[Mapping[str, Any]], beside: str, theirs: Sequence[Mapping[str, Any]]
) -> None:
    """Ratios of means over the seeds; of rounds, over those that were solved."""
    ratio = statistics.mean(map(calls, ours)) / statistics.mean(map(calls, theirs))
    solved = [[one["rounds"] for one in rows if one["solved_at"]] for rows in (ours, theirs)]
    rounds = statistics.mean(solved[0]) / statistics.mean(solved[1])
    report.add(f"{name} to {beside}: mean LM calls", [ratio], "times", target=1.5, better="less")
    report.add(f"{name} to {beside}: mean rounds", [rounds], "times", target=1.0, better="less")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = [*(variant.name for variant in VARIANTS), *QUALITY_SEARCHES]
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--output", default=str(RESULTS / "searches.json"), help="a JSON file for the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
