"""Collecting traces: the program's own successful runs on the train set, each stage call a row to learn from."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cotune.datamodules.durable import DamagedFileError, damaged_file, new_folder
from cotune.programs import (
    LM,
    Demo,
    Example,
    Metric,
    Program,
    Prompt,
    Prompts,
    Rollout,
    Sampling,
    Template,
    draw_demos,
    faults_of,
    hide_own_demos,
    labelled_demos,
    prompts_id,
    rollouts,
)
from cotune.programs.demos import label_text
from cotune.programs.faults import KINDS, faults_from_dict, faults_to_dict, merged
from cotune.programs.values import gold_text

_Written = tuple[str, ...]
"""The completions of a run, which tell it from others of its example."""

_DRAW_SHARED_BY = 8
"""Examples that share one draw of demos: sharing saves prefill, more draws find more traces."""


@dataclass(frozen=True)
class Bootstrapping:
    """How traces are collected from the train set, and what training pairs are made of them.

    Attributes:
        threshold: score from which a run counts as a success (lambda in the paper; 1 for a binary metric).
        attempts: runs of an example until enough succeed. The first is with the current prompts, as in the paper.
        traces_per_example: successes that are enough. All examples have the same cap, so easy ones do not dominate; a
            success whose completions are those of an earlier one of its example does not count.
        hints: further attempts for examples without any success, which are shown the gold answer as a hint (STaR,
            Zelikman et al., 2022). Training pairs never hold the hint. Such successes are counted apart.
        gold_answers: examples still without a success give one pair all the same: the last call of the first of their
            runs that ended with a prediction, with the labels as what it wrote. Only where the labels give every output
            of that call's stage, so none where it also reasons. Counted apart; no call before it is learnt from.
        temperature: of the attempts after the first.
        fresh_demos: later attempts show this many freshly drawn demos a stage, never one of the example's own: labelled
            examples where a stage's inputs and output have labels, and earlier successes. 0 keeps the current prompts.
        pairs: prompts that stand in the training pairs: "initial" (zero-shot, as in the paper) or "current".
        balance_stages: train on as many pairs of each stage, those of rarer stages repeated within an epoch.
        demo_share: share of the batches whose pairs carry 1 to `fresh_demos` demos of other rows, so that the tuned
            weights still know what to do with demos. 0 in the paper.
    """

    threshold: float = 1.0
    attempts: int = 10
    traces_per_example: int = 1
    hints: int = 0
    gold_answers: bool = False
    temperature: float = 0.7
    fresh_demos: int = 3
    pairs: Literal["initial", "current"] = "initial"
    balance_stages: bool = False
    demo_share: float = 0.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts {self.attempts} is below 1.")
        if not 1 <= self.traces_per_example <= self.attempts:
            raise ValueError(
                f"traces_per_example {self.traces_per_example} is outside 1 to attempts ({self.attempts}): an attempt "
                "gives one trace at most."
            )
        if self.hints < 0:
            raise ValueError(f"hints {self.hints} is below 0; it is a number of attempts, 0 gives none.")
        if self.fresh_demos < 0:
            raise ValueError(f"fresh_demos {self.fresh_demos} is below 0.")
        if not 0 < self.threshold <= 1:
            raise ValueError(
                f"threshold {self.threshold} is outside (0, 1]; at 0 a failed run would count as a success."
            )
        if not 0 <= self.demo_share <= 1:
            raise ValueError(f"demo_share {self.demo_share} is outside [0, 1].")
        if self.demo_share and not self.fresh_demos:
            raise ValueError(f"demo_share {self.demo_share} needs fresh_demos above 0: it draws up to that many.")


@dataclass(frozen=True)
class Trace:
    """One stage call of a successful run.

    `call` is its place among the run's calls; `messages` are those it was generated from, `completion_ids` the very
    ids that were written, `complete` whether the last of them ends the turn; `hinted` whether the run was shown the
    gold answer. With `gold` the run failed (`score` is its own), and outputs and completion are the labels instead.
    """

    example: str
    attempt: int
    score: float
    stage: str
    call: int
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    messages: Sequence[Mapping[str, str]]
    completion: str
    completion_ids: Sequence[int]
    complete: bool
    prompts: str
    hinted: bool = False
    gold: bool = False

    @property
    def demo(self) -> Demo:
        return Demo(self.inputs, self.outputs, self.example)


@dataclass
class Report:
    """What came of collecting: counts of examples, and of runs by outcome."""

    examples: int = 0
    solved_at_attempt: list[int] = field(default_factory=list)
    runs: int = 0
    wrong: int = 0
    format: int = 0
    program: int = 0
    retriever: int = 0
    metric: int = 0
    cut: int = 0
    """runs that succeeded with a completion cut at max_new_tokens: not learnt from, or the LM would never end."""
    faults: dict[str, dict[str, Any]] = field(default_factory=dict)
    """the user's code's faults by kind, each with its first example, in plain types: checkpoints hold reports"""
    hinted: int = 0
    """of the solved examples, those that needed a hint"""
    more: int = 0
    """further successes of solved examples, where `traces_per_example` asks for them"""
    repeated: int = 0
    """successes that were an earlier one of their example over again"""
    gold: int = 0
    """unsolved examples that gave a pair with the gold answer"""
    too_long: int = 0
    """of the failed runs, those that ended at a prompt that does not fit the window"""
    cut_off: int = 0
    """of the failed runs, those with a completion cut at max_new_tokens"""

    @property
    def solved(self) -> int:
        return sum(self.solved_at_attempt)

    def __str__(self) -> str:
        why = {"wrong answer": self.wrong, "unreadable": self.format, "cut at max_new_tokens": self.cut}
        why |= {f"{kind} faults": getattr(self, kind) for kind in KINDS}
        failed = ", ".join(f"{count} {kind}" for kind, count in why.items() if count) or "none"
        hinted = f", {self.hinted} of them with a hint" if self.hinted else ""
        more = f", {self.more} further traces of them" if self.more else ""
        gold = f", {self.gold} unsolved ones with their gold answer" if self.gold else ""
        solved = f"{self.solved} of {self.examples} examples solved{hinted}"
        return f"{solved} in {self.runs} runs{more}{gold} (failed: {failed})"


class NoTracesError(RuntimeError):
    """A weight step has nothing to learn from."""


def collect(
    examples: Sequence[Example],
    *,
    program: Program,
    lm: LM,
    template: Template,
    prompts: Prompts,
    metric: Metric,
    sampling: Sampling,
    options: Bootstrapping,
    seed: int,
    max_error_rate: float = 0.5,
    progress: Callable[[int], None] | None = None,
    encode_text: Callable[[str], Sequence[int]] = lambda text: (),
) -> tuple[list[Trace], Report]:
    """Runs the program on each example until enough runs succeed, or the attempts are used up.

    Args:
        encode_text: text -> token ids; `gold_answers` needs it.

    Returns:
        Every stage call of the first successful runs of each example, in the order they were found, and then the calls
        with gold answers, in the order of the examples; and the counts.
    """
    report, traces = Report(examples=len(examples)), list[Trace]()
    pool: dict[str, list[Demo]] = labelled_demos(program, examples)
    written: dict[str, set[_Written]] = {example.id: set() for example in examples}
    unsolved = list(examples)
    with_gold: dict[str, Trace] = {}
    last = options.attempts + options.hints - 1
    for attempt in range(last + 1):
        hinting = attempt >= options.attempts
        if attempt == options.attempts:
            unsolved = [example for example in unsolved if not written[example.id]]
            if not unsolved:
                break
        # No run may read its own answer off a demo, so an example's own demos are hidden from it.
        given: list[Prompts] = [hide_own_demos(prompts, example.id) for example in unsolved]
        drawn = sampling
        if attempt:
            drawn = replace(sampling, temperature=options.temperature, top_p=1.0)
            if options.fresh_demos:
                rng = random.Random(f"{seed}|{attempt}")
                given = fresh_prompts(prompts, unsolved, pool, count=options.fresh_demos, rng=rng)
        shown = [hinted(p, e) for p, e in zip(given, unsolved, strict=True)] if hinting else given
        done = rollouts(
            program,
            unsolved,
            lm=lm,
            prompts=shown,
            template=template,
            metric=metric,
            sampling=drawn,
            seed=seed,
            attempt=attempt,
            # Later attempts see only the unsolved, among which faults may well be the most without being many.
            max_error_rate=max_error_rate if attempt == 0 else 1.0,
        )
        _count(report, done, options.threshold)
        solved = sum(map(bool, written.values()))
        for place, rollout in enumerate(done):
            if options.gold_answers and rollout.example.id not in with_gold:
                trace = _gold_trace(rollout, attempt, prompts_id(shown[place]), program, template, encode_text)
                if trace is not None:
                    with_gold[rollout.example.id] = trace
            if _outcome(rollout, options.threshold) == "passed":
                before = written[rollout.example.id]
                said = tuple(step.completion.text for step in rollout.steps)
                report.repeated += said in before
                if said not in before:
                    report.more += bool(before)
                    before.add(said)
                    found = _traces(rollout, attempt, prompts_id(shown[place]), hinted=hinting)
                    traces += found
                    for trace in found:
                        pool.setdefault(trace.stage, []).append(trace.demo)
        newly = sum(map(bool, written.values())) - solved
        report.solved_at_attempt.append(newly)
        report.hinted += newly if hinting else 0
        enough = 1 if hinting else options.traces_per_example
        unsolved = [example for example in unsolved if len(written[example.id]) < enough]
        if progress is not None:
            without = sum(not found for found in written.values())
            progress(newly + without if attempt == last or not unsolved else newly)
        if not unsolved:
            break
    gold = [with_gold[e.id] for e in examples if not written[e.id] and e.id in with_gold]
    report.gold = len(gold)
    return traces + gold, report


def hinted(prompts: Prompts, example: Example) -> dict[str, Prompt]:
    """The prompts with the example's labels as a hint behind each stage's instruction."""
    gold = "; ".join(f"{name}: {gold_text(value)}" for name, value in example.labels.items())
    hint = f"Hint, which your reply must not mention: the final result should be {gold}."
    return {stage: replace(prompt, instruction=f"{prompt.instruction}\n{hint}") for stage, prompt in prompts.items()}


def fresh_prompts(
    prompts: Prompts,
    examples: Sequence[Example],
    pool: Mapping[str, Sequence[Demo]],
    *,
    count: int,
    rng: random.Random,
) -> list[Prompts]:
    """Prompts with freshly drawn demos for each example, never one of its own.

    Examples are put into groups at random, and a group has one draw, from outside it: what its examples share is
    computed once, while an attempt still sees many draws.
    """
    order = list(range(len(examples)))
    rng.shuffle(order)
    given: dict[int, Prompts] = {}
    for start in range(0, len(order), _DRAW_SHARED_BY):
        group = order[start : start + _DRAW_SHARED_BY]
        own = {examples[i].id for i in group}
        drawn = {stage: draw_demos(pool.get(stage, ()), count, rng, exclude_sources=own) for stage in prompts}
        shown = {stage: replace(p, demos=tuple(drawn[stage]) or p.demos) for stage, p in prompts.items()}
        for i in group:
            # Where there was nothing to draw a stage keeps the demos it had, and those may be the example's own.
            given[i] = hide_own_demos(shown, examples[i].id)
    return [given[i] for i in range(len(examples))]


def save_traces(traces: Sequence[Trace], folder: Path) -> None:
    """Writes traces as a `datasets` data set, a row a stage call; inputs and outputs as JSON text.

    A kill leaves no folder or all of it.

    Raises:
        NotWrittenError: the disk is full, read-only or broken.
    """
    from datasets import Dataset, disable_progress_bars, enable_progress_bars, is_progress_bar_enabled

    rows = [
        {
            **vars(trace),
            "inputs": json.dumps(dict(trace.inputs), ensure_ascii=False),
            "outputs": json.dumps(dict(trace.outputs), ensure_ascii=False),
            "messages": [dict(message) for message in trace.messages],
            "completion_ids": list(trace.completion_ids),
        }
        for trace in traces
    ]
    shown = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        with new_folder(folder) as partial:
            Dataset.from_list(rows).save_to_disk(str(partial))
    finally:
        if shown:
            enable_progress_bars()


def load_traces(folder: str | Path, program: Program) -> list[Trace]:
    """Reads what `save_traces` wrote, whichever run wrote it.

    Raises:
        DamagedFileError: a file in it is not as the run wrote it.
        ValueError: the folder holds no traces, or they are those of a program with other stages or fields.
    """
    from datasets import load_from_disk

    if why := damaged_file(Path(folder)):
        raise DamagedFileError(
            f"{why}. Start over with --fresh, which keeps this run aside; completions that are stored are not "
            "generated again. If you changed them on purpose, save them to a folder of their own, for data.traces."
        )
    try:
        rows = load_from_disk(str(folder)).to_list()
        traces = [
            Trace(
                **{
                    **row,
                    "inputs": json.loads(row["inputs"]),
                    "outputs": json.loads(row["outputs"]),
                    "completion_ids": tuple(row["completion_ids"]),
                }
            )
            for row in rows
        ]
    except (FileNotFoundError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f'"{folder}" holds no traces; give a folder that a run wrote, e.g. runs/<name>/traces/step-1.'
        ) from error
    signatures = {name: stage.signature for name, stage in program.stages.items()}
    for trace in traces:
        signature = signatures.get(trace.stage)
        if signature is None or (set(trace.inputs), set(trace.outputs)) != (
            set(signature.inputs),
            set(signature.outputs),
        ):
            raise ValueError(
                f'traces in "{folder}" are of another program: stage "{trace.stage}" '
                f"({', '.join(trace.inputs)} -> {', '.join(trace.outputs)}); this program has {_stages(signatures)}."
            )
    return traces


def _stages(signatures: Mapping[str, Any]) -> str:
    return "; ".join(f'"{name}" ({", ".join(s.inputs)} -> {", ".join(s.outputs)})' for name, s in signatures.items())


def _outcome(rollout: Rollout, threshold: float) -> str:
    if rollout.error is not None:
        return rollout.error.kind
    if rollout.score < threshold:
        return "wrong"
    return "cut" if any(step.completion.finished == "length" for step in rollout.steps) else "passed"


def _count(report: Report, done: Sequence[Rollout], threshold: float) -> None:
    outcomes = Counter(_outcome(rollout, threshold) for rollout in done)
    report.runs += len(done)
    for name in ("wrong", "format", *KINDS, "cut"):
        setattr(report, name, getattr(report, name) + outcomes[name])
    failed = [r for r in done if _outcome(r, threshold) in ("wrong", "format", "type", "cut")]
    ends = [{step.completion.finished for step in rollout.steps} for rollout in failed]
    report.too_long += sum("too_long" in found for found in ends)
    report.cut_off += sum("length" in found for found in ends)
    report.faults = faults_to_dict(merged(faults_from_dict(report.faults), faults_of(done)))


def _traces(rollout: Rollout, attempt: int, used: str, *, hinted: bool) -> list[Trace]:
    return [
        Trace(
            example=rollout.example.id,
            attempt=attempt,
            score=rollout.score,
            stage=step.stage,
            call=call,
            inputs=step.inputs,
            outputs=step.outputs,
            messages=step.messages,
            completion=step.completion.text,
            completion_ids=step.completion.completion_ids,
            complete=step.completion.finished == "eos",
            prompts=used,
            hinted=hinted,
        )
        for call, step in enumerate(rollout.steps)
    ]


def _gold_trace(
    rollout: Rollout,
    attempt: int,
    used: str,
    program: Program,
    template: Template,
    encode_text: Callable[[str], Sequence[int]],
) -> Trace | None:
    """The run's last call with the labels as its outputs; None where the labels do not give all of them.

    None, too, for a run that failed: its last call need not be the program's.
    """
    if rollout.error is not None or not rollout.steps:
        return None
    step, labels = rollout.steps[-1], rollout.example.labels
    signature = program.stages[step.stage].signature
    if any(labels.get(name) is None for name in signature.outputs):
        return None
    outputs = {name: label_text(signature, name, labels[name]) for name in signature.outputs}
    completion = template.complete(signature, outputs)
    return Trace(
        example=rollout.example.id,
        attempt=attempt,
        score=rollout.score,
        stage=step.stage,
        call=len(rollout.steps) - 1,
        inputs=step.inputs,
        outputs=outputs,
        messages=step.messages,
        completion=completion,
        completion_ids=tuple(encode_text(completion)),
        complete=False,
        prompts=used,
        gold=True,
    )
