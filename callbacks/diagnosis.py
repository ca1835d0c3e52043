"""Diagnosis: what a step won and lost on val, wrong answers apart from missing ones, and whose traces passed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cotune.datamodules import Bootstrapping, Report, Trace
from cotune.programs import Example, Rollout, mean_score
from cotune.programs.faults import KINDS
from cotune.programs.set_metrics import measured
from cotune.programs.values import gold_text

_MAX_LABELS = 100


def diagnose(
    done: Sequence[Rollout],
    before: Mapping[str, float] | None,
    *,
    threshold: float,
    set_metrics: Sequence[str] = (),
) -> dict[str, Any]:
    """The rollouts of a boundary, taken apart; plain types. An example passes from a score of `threshold` on.

    Args:
        before: example id -> score at the boundary before; None at the first.

    Returns:
        `passed`, `wrong`, `closed` (as wrong, with a text that was closed at its limit), `out_of_type`: how many
        examples; the rest failed. `unreadable`: stage -> how many examples' runs ended there without an answer.
        `by_label`: label -> [passed, examples], where labels repeat.
        `set_metrics`: name -> [value, low, high], where any are asked for.
        `won` and `lost`: ids of examples that pass now and did not before, and the other way round.
    """
    passed = {r.example.id for r in done if r.error is None and r.score >= threshold}
    failed = [r for r in done if r.error is not None]
    missed = [r for r in done if r.error is None and r.example.id not in passed]
    closed = [r for r in missed if any(step.closed for step in r.steps)]
    unreadable = Counter(r.steps[-1].stage for r in failed if r.error and r.error.kind == "format" and r.steps)
    found: dict[str, Any] = {
        "passed": len(passed),
        "wrong": len(missed) - len(closed),
        "closed": len(closed),
        "out_of_type": sum(r.error is not None and r.error.kind == "type" for r in failed),
        "unreadable": dict(sorted(unreadable.items())),
        "by_label": by_label([r.example for r in done], passed),
    }
    if set_metrics:
        found["set_metrics"] = measured(set_metrics, [(r.example, r.prediction) for r in done])
    if before is not None:
        known = [r.example.id for r in done if r.example.id in before]
        found["won"] = [id_ for id_ in known if id_ in passed and before[id_] < threshold]
        found["lost"] = [id_ for id_ in known if id_ not in passed and before[id_] >= threshold]
    return found


def nothing_gained(done: Sequence[Rollout], before: Mapping[str, float]) -> str:
    """What is said of a weight step that val is not better for, example by example."""
    pairs = [(rollout.score, before[rollout.example.id]) for rollout in done]
    better, worse = (sum(now > then for now, then in pairs), sum(now < then for now, then in pairs))
    mean, was = mean_score(done), math.fsum(then for _, then in pairs) / max(len(pairs), 1)
    return (
        f"nothing gained: val score {mean:.3f} against {was:.3f} before ({better} examples better, {worse} worse); "
        "weights and prompts are unchanged"
    )


def sampled_apart(traces: Sequence[Trace]) -> str:
    """What is said of how far the sampler's log-probabilities lie from those that training computes of the same ids.

    In fp32 they are the same to about 1e-5. What is more means that runs are drawn by another LM than is trained.
    """
    rows = [zip(trace.sampled, trace.reference, strict=True) for trace in traces if trace.sampled]
    apart = [abs(drawn - known[0]) for row in rows for drawn, known in row if drawn]
    if not apart:
        return "the sampler's log-probabilities cannot be compared with the trainer's: a form limited every token."
    most = max(apart)
    warning = "" if most < 1e-4 else ": above 1e-4, which is normal with 16-bit weights and otherwise a fault"
    return f"sampler and trainer differ by at most {most:.1e} nats on {len(apart):,} unconstrained tokens{warning}"


def trace_coverage(traces: Sequence[Trace], examples: Sequence[Example]) -> dict[str, Any]:
    """How many examples have a trace, by stage and by label; plain types. Those with gold answers do not count.

    Returns:
        `by_stage`: stage -> examples; `by_label`: label -> [examples with a trace, examples], where labels repeat.
    """
    stages: dict[str, set[str]] = {}
    traces = [trace for trace in traces if not trace.gold]
    for trace in traces:
        stages.setdefault(trace.stage, set()).add(trace.example)
    solved = {trace.example for trace in traces}
    return {"by_stage": {s: len(ids) for s, ids in stages.items()}, "by_label": by_label(examples, solved)}


def by_label(examples: Sequence[Example], passed: set[str]) -> dict[str, list[int]]:
    """Label -> [examples that passed, examples], by label; {} where almost every label is unique."""
    total = Counter(_label(example) for example in examples)
    if len(total) > min(_MAX_LABELS, len(examples) / 2):
        return {}
    solved = Counter(_label(example) for example in examples if example.id in passed)
    return {label: [solved[label], count] for label, count in sorted(total.items())}


def _label(example: Example) -> str:
    return ", ".join(gold_text(value) for value in example.labels.values())


def advice_without_traces(report: Report, options: Bootstrapping, *, gold_answers: bool) -> str:
    """What to do where no run has succeeded; more attempts only where they could give something else.

    Args:
        gold_answers: whether `options.gold_answers` is off and could be used.
    """
    faults = sum(getattr(report, kind) for kind in KINDS)
    read = report.wrong + report.cut + report.retold
    if faults == report.runs:
        return "Fix the program or the metric: they failed on every run."
    if report.too_long + faults == report.runs:
        return "No prompt fits the model's window, however often it is tried: take shorter inputs, or another model."
    ways = []
    if report.cut_off:
        ways.append(f"{report.cut_off} of the runs were cut off: raise model.sampling.max_new_tokens")
    if options.temperature == 0 and not options.fresh_demos and options.attempts > 1:
        ways.append("set data.bootstrapping.temperature above 0, since at 0 all attempts are the same")
    elif read or report.runs > report.too_long + report.cut_off + faults:
        ways.append(
            f"raise data.bootstrapping.attempts (now {options.attempts}) or its temperature ({options.temperature:g})"
        )
    if report.wrong:
        ways.append("lower data.bootstrapping.threshold")
    if gold_answers:
        ways.append("set data.bootstrapping.gold_answers")
    ways.append("put a prompt step first")
    message = ", ".join(ways[:-1]) + f", or {ways[-1]}" if len(ways) > 1 else ways[0]
    return f"{message[0].upper()}{message[1:]}. `cotune report` shows what it wrote on val."
