"""What a boundary has to show, as rows of tables and as text: scores, cost, prompts, candidates, rollouts."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cotune.callbacks.boundary import Boundary
from cotune.programs import Prompt, Prompts, Rollout, prompts_id
from cotune.programs.calibration import shown
from cotune.prompting import Found
from cotune.prompting.search import mean

Rows = tuple[list[str], list[list[Any]]]
"""Column names, and rows."""

COSTS = ("lm_calls", "cached_calls", "prompt_tokens", "completion_tokens", "generating_seconds", "seconds")
"""What a step costs, by the names that history.jsonl has."""


def score_rows(history: Sequence[Mapping[str, Any]]) -> Rows:
    """A row a prefix of the schedule, with the cost of the step that led there."""
    columns = ["index", "prefix", "val_score", "dev_score", "prompts", *COSTS]
    return columns, [[record.get(name) for name in columns] for record in history]


def phase_costs(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What all steps of a kind have cost so far: `cost/p/lm_calls` and so on; "vanilla" is scoring before any step."""
    total: dict[str, float] = {}
    for record in history:
        for name in COSTS:
            key = f"cost/{record['step'] or 'vanilla'}/{name}"
            total[key] = total.get(key, 0.0) + record.get(name, 0)
    return total


def trials(boundary: Boundary, *, before: int) -> list[dict[str, float]]:
    """A point a candidate of the prompt search, in the order of trying; `before` came in earlier searches."""
    if boundary.found is None:
        return []
    points, best = [], 0.0
    for number, candidate in enumerate(boundary.found.candidates, start=before):
        best = best if candidate.pruned else max(best, candidate.score)
        points.append(
            {
                "trial/number": float(number),
                "trial/dev_score": candidate.score,
                "trial/best_dev_score": best,
                "trial/dev_runs": float(len(candidate.scores)),
                "trial/pruned": float(candidate.pruned),
            }
        )
    return points


def candidate_rows(boundary: Boundary) -> Rows:
    """A row a candidate of the prompt search, in the order of trying; `dev_runs`, on how many examples it ran;
    `before` and `after`, mean scores on the minibatch of the parent and of a rewrite."""
    columns = ["why", "dev_score", "pruned", "prompts", "parent", "kept", "dev_runs", "errors", "text", "difference"]
    columns += ["parents", "before", "after"]
    if boundary.found is None:
        return columns, []
    known = _known(boundary, boundary.found)
    kept = prompts_id(boundary.prompts)
    rows = []
    for c in boundary.found.candidates:
        origin = known.get(c.parent, boundary.previous)
        errors, text = sum(c.errors.values()), _all_text(c.prompts)
        difference = _difference(_all_text(origin), text)
        row = [c.why, c.score, c.pruned, c.id, c.parent, c.id == kept, len(c.scores), errors, text, difference]
        rows.append([*row, ", ".join(c.lineage.get("parents", [c.parent])), *_minibatch(c.lineage)])
    return columns, rows


def rejected_rows(boundary: Boundary) -> Rows:
    """A row a text that was proposed and became no candidate, in order, with the reason and its difference from the
    instruction that it was to replace."""
    columns = ["stage", "why", "parent", "round", "before", "after", "text", "difference"]
    if boundary.found is None:
        return columns, []
    known = _known(boundary, boundary.found)
    rows = []
    for one in boundary.found.rejected:
        parent = known.get(one.parent, {}).get(one.stage)
        difference = _difference(parent.instruction if parent else "", one.text)
        told = [one.lineage.get("round"), *_minibatch(one.lineage)]
        rows.append([one.stage, one.why, one.parent, *told, one.text, difference])
    return columns, rows


def prompt_rows(prompts: Prompts, previous: Prompts) -> Rows:
    """A row a stage."""
    rows = [
        [
            stage,
            prompt.instruction,
            json.dumps([demo.to_dict() for demo in prompt.demos], ensure_ascii=False, indent=1),
            len(prompt.demos),
            prompt_difference(previous.get(stage), prompt),
        ]
        for stage, prompt in prompts.items()
    ]
    return ["stage", "instruction", "demos", "number of demos", "difference"], rows


def rollout_rows(done: Sequence[Rollout], *, max_rows: int, max_characters: int) -> tuple[Rows, int]:
    """A row a stage call, whole rollouts only, and the number of rollouts left out.

    A rollout that failed before its first call has one row without a stage. Longer texts are cut in their middle and
    say so; if rollouts are left out, a last row says how many.
    """
    columns = ["example", "call", "stage", "inputs", "output", "finished", "score", "error", "message"]
    rows: list[list[Any]] = []
    for number, rollout in enumerate(done):
        calls = _call_rows(rollout, max_characters)
        if len(rows) + len(calls) > max_rows:
            left_out = len(done) - number
            said = f"{left_out} of {len(done)} rollouts are left out here; the run's folder has them in rollouts/"
            return (columns, [*rows, ["", None, "", "", "", None, None, "", said]]), left_out
        rows += calls
    return (columns, rows), 0


def prompt_text(prompt: Prompt) -> str:
    """A prompt as a reader would write it down: the instruction, then the demos field by field."""
    lines = [f"Form: {prompt.form}", ""] if prompt.form else []
    lines += [f"Calibration: {shown(prompt.calibration)}", ""] if prompt.calibration else []
    lines.append(prompt.instruction)
    for number, demo in enumerate(prompt.demos, start=1):
        lines += ["", f"Demo {number}" + (f" ({demo.source})" if demo.source else "")]
        lines += [f"{name}: {value}" for name, value in {**demo.inputs, **demo.outputs}.items()]
    return "\n".join(lines)


def prompt_difference(before: Prompt | None, after: Prompt) -> str:
    """Unified diff of two prompts' texts; "" where they are equal."""
    return _difference(prompt_text(before) if before is not None else "", prompt_text(after))


def _known(boundary: Boundary, found: Found) -> dict[str, Prompts]:
    """Prompts by id that a search can have begun with or made."""
    known = {prompts_id(boundary.previous): boundary.previous}
    return known | {candidate.id: candidate.prompts for candidate in found.candidates}


def _minibatch(lineage: Mapping[str, Any]) -> list[float | None]:
    """Mean score on the minibatches before and after a rewrite; None where there was none."""
    runs = list(lineage.get("rewritten", {}).values())
    scores = ([score for run in runs for score in run[name]] for name in ("before", "after"))
    return [mean(values) if values else None for values in scores]


def _difference(before: str, after: str) -> str:
    return "\n".join(difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "after", lineterm=""))


def _all_text(prompts: Prompts) -> str:
    return "\n\n".join(f"[{stage}]\n{prompt_text(prompt)}" for stage, prompt in prompts.items())


def _call_rows(rollout: Rollout, max_characters: int) -> list[list[Any]]:
    name, error = rollout.example.id, rollout.error
    message = _cut(error.message, max_characters) if error else ""
    end = [rollout.score, error.kind if error else "", message]
    if not rollout.steps:
        return [[name, 0, "", "{}", "", None, *end]]
    return [
        [
            name,
            call,
            step.stage,
            _cut(json.dumps(dict(step.inputs), ensure_ascii=False), max_characters),
            _cut(step.completion.text, max_characters),
            step.completion.finished,
            *end,
        ]
        for call, step in enumerate(rollout.steps)
    ]


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]} […{len(text) - limit:,} characters left out…] {text[-(limit - limit // 2) :]}"
