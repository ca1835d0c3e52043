"""Are right answers read? One LM, the same GSM8K problems, greedy: the bare question, cotune's forms, DSPy's format.

The bare question is the yardstick: no system prompt and no form, and the last number that the LM writes counts. Every
completion goes into a store in --folder as it is made, so a repeated command goes on where it was.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import torch
from cotune.datamodules.tasks.gsm8k import gsm8k_examples
from cotune.lightning_modules import LanguageModel
from cotune.programs import Example, Predict, Request, Sampling, first_line_number
from cotune.programs.form import Form, Lines, Markers, ReasonThenFill, Tags
from cotune.programs.json_form import Json
from cotune.programs.layout import Field
from cotune.programs.metrics import last_number
from cotune.programs.runner import Runner
from cotune.reporting.statistics import paired_difference

from benchmarks.environments import interpreter
from benchmarks.peers import Worker
from benchmarks.report import RESULTS, Report
from benchmarks.templates import OWN as OWN_TEMPLATE
from benchmarks.templates import TEMPLATES, spoken_to_as

FORMS: dict[str, type[Form]] = {
    "reason_then_fill": ReasonThenFill,
    "lines": Lines,
    "tags": Tags,
    "markers": Markers,
    "json": Json,
}
OWN = 0.95  # of the problems whose last number is right in the LM's reasoning to the bare question
AGREE = 0.90  # of the field values equal the last number of their own reasoning


@dataclass(frozen=True)
class Side:
    """What one way of asking gave: for each problem 1 if it was right, and whether an answer was read at all."""

    name: str
    right: list[float]
    read: list[bool]
    tokens: float
    cut: int

    def line(self) -> str:
        n = len(self.right)
        return (
            f"{self.name}: {sum(self.right):.0f} of {n} right, {sum(self.read)} read, {self.cut} cut at the limit, "
            f"{self.tokens:.0f} tokens an answer"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    problems = _problems(options.data, options.part, options.problems)
    lm = LanguageModel(
        spoken_to_as(options.template, options.model, Path(options.folder)),
        device=options.device,
        dtype=options.dtype,
        cache_tokens=options.cache_tokens,
        completions=str(Path(options.folder) / "completions.sqlite"),
    )
    lm.load(seed=0)
    report = Report("answers")
    report.details = {key: str(value) for key, value in vars(options).items() if key not in ("model", "data", "folder")}
    bare: Side | None = None
    for side in _sides(lm, problems, options, report):
        print(side.line(), flush=True)
        report.details[side.name] = {
            "right": side.right,
            "read": sum(side.read),
            "tokens": side.tokens,
            "cut": side.cut,
        }
        report.add(f"{side.name}: right", [sum(side.right) / len(problems)], "of the problems")
        if side.name == "bare question":
            bare = side
        elif bare is not None:
            report.add(f"{side.name}: right beside the bare question", [_share(side, bare)], "x", target=OWN)
        report.write(Path(options.output))
    _compare(report, options.forms[0], "DSPy")
    report.write(Path(options.output))


def _sides(lm: LanguageModel, problems: list[Example], options: argparse.Namespace, report: Report) -> Iterator[Side]:
    yield _bare(lm, problems, options)
    for form in options.forms:
        yield _form(lm, problems, form, options, report)
    if "dspy" not in options.skip:
        yield _dspy(lm, problems, options)


def _bare(lm: LanguageModel, problems: list[Example], options: argparse.Namespace) -> Side:
    requests = [Request([{"role": "user", "content": str(p.inputs["question"])}], adapter="") for p in problems]
    completions = lm.complete(requests, Sampling(max_new_tokens=options.new))
    found = [last_number(c.text) for c in completions]
    return Side(
        "bare question",
        [float(number == _gold(p)) for number, p in zip(found, problems, strict=True)],
        [number is not None for number in found],
        sum(len(c.completion_ids) for c in completions) / len(problems),
        sum(c.finished == "length" for c in completions),
    )


def _form(lm: LanguageModel, problems: list[Example], form: str, options: argparse.Namespace, report: Report) -> Side:
    """The shipped GSM8K program through the Runner, as `cotune fit` scores it."""
    program = Predict("question -> answer: float", instruction="Solve the problem.", reasoning=True)
    runner = Runner(program, lm, FORMS[form](), first_line_number, Sampling(max_new_tokens=options.new), 1.0)
    rollouts = runner.run(problems, program.initial_prompts())
    agree: dict[bool, list[bool]] = {True: [], False: []}  # by whether the LM ended its reasoning itself
    tokens = cut = 0
    for rollout in rollouts:
        for step in rollout.steps:
            fields = {field.name: field for field in step.completion.fields}
            tokens += len(step.completion.completion_ids)
            cut += any(field.ended == "length" for field in fields.values())
            own = last_number(fields["reasoning"].text) if "reasoning" in fields else None
            if own is not None:
                ended = fields["reasoning"].ended != "length"
                agree[ended].append(last_number(fields["answer"].text) == own)
    if equal := [same for part in agree.values() for same in part]:
        report.add(
            f"{form}: answers that equal their reasoning's last number", [sum(equal) / len(equal)], "", target=AGREE
        )
    for ended, same in agree.items():
        report.details[f"{form}: reasoning {'ended' if ended else 'cut'}, equal, of"] = [sum(same), len(same)]
    return Side(
        form,
        [rollout.score for rollout in rollouts],
        [rollout.error is None for rollout in rollouts],
        tokens / len(problems),
        cut,
    )


def _dspy(lm: LanguageModel, problems: list[Example], options: argparse.Namespace) -> Side:
    """DSPy renders and reads; the same LM completes, so that nothing but the format differs."""
    with Worker("dspy_format", python=interpreter("dspy")) as dspy:
        asked = dspy.call("render", questions=[str(p.inputs["question"]) for p in problems])
        layout = (Field("text", stops=(asked["stop"],)),)
        completions = lm.complete(
            [Request(messages, layout=layout, adapter="") for messages in asked["messages"]],
            Sampling(max_new_tokens=options.new),
        )
        ended = [c.text + (asked["stop"] if c.finished == "stop" else "") for c in completions]
        answers = dspy.call("read", texts=ended)
    return Side(
        "DSPy",
        [float(a is not None and last_number(a) == _gold(p)) for a, p in zip(answers, problems, strict=True)],
        [a is not None for a in answers],
        sum(len(c.completion_ids) for c in completions) / len(problems),
        sum(c.finished == "length" for c in completions),
    )


def _compare(report: Report, ours: str, theirs: str) -> None:
    if theirs not in report.details:
        return
    first, second = ({0: dict(enumerate(report.details[side]["right"]))} for side in (theirs, ours))
    gap = paired_difference(first, second)
    assert gap is not None
    report.details[f"{ours} less {theirs}"] = [gap.mean, gap.low, gap.high]
    print(f"{ours} less {theirs}: {gap.mean:+.3f}, paired 95 % interval {gap.low:+.3f} to {gap.high:+.3f}", flush=True)
    report.add(f"{ours} less {theirs}: low end of the interval", [gap.low], "of the problems", target=0.0)


def _problems(data: str, part: str, count: int) -> list[Example]:
    found = gsm8k_examples(data, part)
    return random.Random(0).sample(found, min(count, len(found)))


def _gold(problem: Example) -> Decimal:
    return Decimal(str(problem.labels["answer"]))


def _share(side: Side, bare: Side) -> float:
    return sum(side.right) / max(1.0, sum(bare.right))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="embedded", help="as in LanguageModel; a folder, an id or a GGUF file")
    parser.add_argument("--data", default="openai/gsm8k", help="as GSM8K's path")
    parser.add_argument("--part", default="test", choices=["train", "test"])
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--forms", nargs="+", default=["reason_then_fill"], choices=list(FORMS))
    parser.add_argument(
        "--template", default=OWN_TEMPLATE, choices=[OWN_TEMPLATE, *TEMPLATES], help="in place of the LM's own"
    )
    parser.add_argument("--skip", nargs="*", default=[], choices=["dspy"])
    parser.add_argument("--new", type=int, default=400, help="most free tokens an answer, on every side")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache-tokens", type=int, default=32768, help="as in LanguageModel")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", default="runs/answers", help="where the completions are kept")
    parser.add_argument("--output", default=str(RESULTS / "answers.json"), help="a JSON file for the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
