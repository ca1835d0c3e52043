"""The report's page: one HTML file with all it needs in it, every text from a run escaped."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from typing import Any

import jinja2
from cotune.reporting import charts, journeys
from cotune.reporting.closing_table import cost_lines, judge_line
from cotune.reporting.comparison import Comparison
from cotune.reporting.journeys import Journey
from cotune.reporting.prompt_changes import PromptChange, demo_fields, descent, prompt_changes
from cotune.reporting.run_record import Json, Prefix, RunRecord, rates_in_words, setting
from cotune.reporting.statistics import binomial_error, interval, standard_error
from markupsafe import Markup

_LONG = 700
"""Texts with more characters than this are cut in the middle; the whole one is folded in behind."""

_KEY_SETTINGS = {
    "program": "model.program.class_path",
    "signature": "model.program.signature",
    "model": "model.lm.model",
    "quantisation": "model.lm.quantization",
    "LoRA rank asked for": "model.lm.lora.r",
    "optimiser": "model.optimizer.class_path",
    "learning rate": "model.optimizer.lr",
    "schedule": "alternate.schedule",
    "epochs of a weight step": "alternate.epochs",
    "steps of their own": "alternate.steps",
    "search": "alternate.search.class_path",
    "data": "data.class_path",
    "metric": "data.metric",
    "batch size": "data.batch_size",
    "longest completion": "model.sampling.max_new_tokens",
    "seed": "seed_everything",
}


@dataclass(frozen=True)
class Score:
    """A mean score with what is known of its error; `n` None where the number of examples is not known."""

    value: float
    n: int | None
    error: float
    low: float
    high: float


@dataclass(frozen=True)
class PromptStep:
    """The prompts of a prefix beside those of the one before."""

    before: Prefix | None
    after: Prefix
    stages: Sequence[PromptChange]

    @property
    def changed(self) -> bool:
        return any(stage.changed for stage in self.stages)


@dataclass(frozen=True)
class Clipped:
    """A long text: its beginning, how many characters are left out, its end."""

    head: str
    left_out: int
    tail: str


def render_report(run: RunRecord, *, examples: int = 60, now: datetime | None = None) -> str:
    """The page as text.

    Args:
        examples: most examples of a group (changed, always right, never right) whose traces are shown.
        now: of the note at the end; the present time without it.
    """
    ways = journeys.journeys(run)
    shared = {prefix.index: _shared_messages(prefix) for prefix in run.prefixes}
    page = (
        environment()
        .get_template("report.html")
        .render(
            run=run,
            title=run.name,
            val=_val_score(run, run.best),
            test=_test_score(run),
            scores={prefix.index: _val_score(run, prefix) for prefix in run.prefixes},
            test_calls=sum(p.record.get("test_cost", {}).get("lm_calls", 0) for p in run.prefixes),
            prefix_tests={p.index: s for p in run.prefixes if (s := _prefix_test(run, p)) is not None},
            timelines=[(name, charts.timeline(run, width=width)) for name, width in (("wide", 760), ("narrow", 320))],
            curves=[(name, charts.curves(run, width=width)) for name, width in (("wide", 760), ("narrow", 320))],
            prompt_steps=prompt_steps(run),
            shared=shared,
            changes=journeys.changes(run, ways),
            groups=_groups(run, ways, examples),
            labels=journeys.by_label(run, ways),
            stages=[(p, journeys.by_stage(p, run.threshold)) for p in run.prefixes if p.rollouts],
            traces=[(p, journeys.trace_counts(p)) for p in run.prefixes if p.traces],
            unanswered=_unanswered(run),
            costs=costs(run),
            key_settings=key_settings(run.config, run.summary),
            paid=cost_lines(run.summary),
            judged=judge_line(run.judge),
            now=(now or datetime.now()).strftime("%Y-%m-%d %H:%M"),
            version=version("cotune"),
        )
    )
    # Half a surrogate pair, as JSON can hold one, has no place in UTF-8.
    return page.encode(errors="replace").decode()


def render_comparison(compared: Comparison, *, now: datetime | None = None) -> str:
    """Runs side by side, as a page like the report's."""
    tests = {name: _test_score(run) for name, run in compared.runs.items()}
    page = (
        environment()
        .get_template("compare.html")
        .render(
            compared=compared,
            title=" against ".join(compared.names),
            vals={name: _val_score(run, run.best) for name, run in compared.runs.items()},
            tests=tests,
            now=(now or datetime.now()).strftime("%Y-%m-%d %H:%M"),
            version=version("cotune"),
        )
    )
    return page.encode(errors="replace").decode()


def environment() -> jinja2.Environment:
    """The templates, with autoescape: what comes from a run is text, whatever it looks like."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("cotune.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "arrows": arrows,
        "breakable": breakable,
        "clock": clock,
        "count": lambda value: f"{value:,.0f}",
        "score": lambda value: "–" if value is None or math.isnan(value) else f"{value:.3f}",
        "signed": lambda value: f"{value:+.3f}".replace("-", "−"),
        "said": journeys.answer_text,
        "one_line": journeys.one_line,
        "short": short,
        "demo_fields": demo_fields,
        "last_part": lambda value: str(value).rpartition(".")[2] if isinstance(value, str) else value,
    }
    made.globals |= {
        "clipped": clipped,
        "outcome": journeys.outcome,
        "pieces": journeys.pieces,
        "failure": journeys.failure,
    }
    made.globals |= {"descent": descent, "prompt_changes": prompt_changes, "same_values": same_values}
    return made


def _score_of(value: float, scores: Sequence[float], n: int | None, noise: float = 0.0) -> Score:
    """A score and its error: from the single scores where they were recorded, else the largest it can have.

    Both grow by the variance of a score that is its metric's alone (`noise`).
    """
    error = standard_error(scores) if len(scores) > 1 else binomial_error(value, n) if n else math.nan
    error = math.sqrt(error**2 + noise / n) if n else error
    low, high = interval(value, n, noise) if n else (math.nan, math.nan)
    return Score(value, n, error, low, high)


def prompt_steps(run: RunRecord) -> list[PromptStep]:
    """The prompts of the first prefix, and what each step made of them."""
    known = [prefix for prefix in run.prefixes if prefix.prompts is not None]
    steps = []
    for place, prefix in enumerate(known):
        before = known[place - 1] if place else None
        assert prefix.prompts is not None
        same = before.prompts if before else prefix.prompts  # the first is shown as it is, not as one addition
        steps.append(PromptStep(before, prefix, prompt_changes(same, prefix.prompts)))
    return steps


def _shared_messages(prefix: Prefix) -> dict[str, list[Json]]:
    """Stage -> the messages that all its calls begin with, the prompt as the LM reads it: said once, not each time."""
    calls: dict[str, list[Sequence[Json]]] = {}
    for row in prefix.rollouts or ():
        for step in row["steps"]:
            if step["messages"]:
                calls.setdefault(step["stage"], []).append(step["messages"][:-1])
    return {stage: _common_start(lists) for stage, lists in calls.items()}


def costs(run: RunRecord) -> list[dict[str, Any]]:
    """What each phase took; `share` of the run's time in percent."""
    total = sum(prefix.record["seconds"] for prefix in run.prefixes) or 1.0
    return [
        {
            "prefix": prefix,
            "lm_calls": prefix.record["lm_calls"],
            "prompt_tokens": prefix.record.get("prompt_tokens"),
            "completion_tokens": prefix.record.get("completion_tokens"),
            "cached": next((value for name, value in prefix.record.items() if name.startswith("cached")), None),
            "seconds": prefix.record["seconds"],
            "share": 100 * prefix.record["seconds"] / total,
        }
        for prefix in run.prefixes
    ]


def key_settings(config: Json, summary: Json) -> list[tuple[str, Any]]:
    """The settings that say what the run was; those that are not known are left out.

    Args:
        summary: of the run, which says what the model had and which learning rates fitted it; {} while there is none.
    """
    found = [(name, setting(config, path, None)) for name, path in _KEY_SETTINGS.items()]
    if adapter := summary.get("adapter"):
        found = [("adapter", adapter) if name.startswith("LoRA") else (name, value) for name, value in found]
    rate = rates_in_words(summary.get("learning_rates")) or setting(config, "model.optimizer.lr", None)
    rate = "by the LM's size" if rate == 0 else rate
    found = [(name, rate if name == "learning rate" else value) for name, value in found]
    sizes = setting(config, "data.sizes", None)
    if isinstance(sizes, Mapping):
        found.append(("sizes", ", ".join(f"{part} {size}" for part, size in sizes.items())))
    return [(name, value) for name, value in found if value is not None]


def arrows(prefix: str) -> str:
    """
    >>> arrows("p -> w")
    'p → w'
    """
    return prefix.replace("->", "→")


def breakable(name: str) -> Markup:
    """A dotted name that may be broken behind its dots and underscores, escaped.

    >>> str(breakable("data.max_size<"))
    'data.<wbr>max_<wbr>size&lt;'
    """
    return Markup("<wbr>").join(re.split(r"(?<=[._])", name))


def clock(seconds: float) -> str:
    """
    >>> clock(9.4), clock(75), clock(3700)
    ('9.4 s', '1 min 15 s', '1 h 2 min')
    """
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


def short(text: Any, limit: int = 60) -> str:
    """The text in one line, cut at its end.

    >>> short("a\\n b", 10), short("abcdefgh", 5)
    ('a b', 'abcd…')
    """
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def clipped(text: str, limit: int = _LONG) -> Clipped | None:
    """The two ends of a long text; None for one that is short enough to be shown whole."""
    if len(text) <= limit + 100:
        return None
    # At a space where there is one near, so that words stay whole.
    head = text[: limit * 2 // 3]
    head = head[: head.rfind(" ")] if " " in head[-30:] else head
    tail = text[-(limit // 3) :]
    tail = tail[tail.find(" ") :] if " " in tail[:30] else tail
    return Clipped(head, len(text) - len(head) - len(tail), tail)


def same_values(inputs: Json, given: Json) -> bool:
    """Whether a call's inputs repeat the example's where they share a name, so that a reader has seen them."""
    return all(str(inputs[name]) == str(given[name]) for name in inputs.keys() & given.keys())


def _val_score(run: RunRecord, prefix: Prefix) -> Score:
    return _score_of(prefix.val_score, [row["score"] for row in prefix.rollouts or ()], run.size("val"), run.noise)


def _prefix_test(run: RunRecord, prefix: Prefix) -> Score | None:
    if prefix.test_score is None:
        return None
    scores = [row["score"] for row in prefix.tested or ()]
    return _score_of(prefix.test_score, scores, len(scores) or run.size("test"), run.noise)


def _test_score(run: RunRecord) -> Score | None:
    value = run.summary.get("test_score")
    if value is None:
        return None
    return _score_of(float(value), [row["score"] for row in run.test or ()], run.size("test"), run.noise)


def _groups(run: RunRecord, ways: Sequence[Journey], examples: int) -> list[dict[str, Any]]:
    titles = {"changed": "Changed on the way", "right": "Right all the way", "wrong": "Wrong all the way"}
    groups = []
    for name, title in titles.items():
        own = [way for way in ways if way.group(run.threshold) == name]
        if own:
            groups.append({"name": name, "title": title, "ways": own[:examples], "rest": own[examples:], "n": len(own)})
    return groups


def _unanswered(run: RunRecord) -> list[dict[str, Any]]:
    """Prefixes with runs that ended without an answer, {"prefix", "rows"}."""
    found = []
    for prefix in run.prefixes:
        rows = [row for row in prefix.rollouts or () if row["error"] and row["error"]["kind"] in ("format", "type")]
        if rows:
            found.append({"prefix": prefix, "rows": rows})
    return found


def _common_start(lists: Sequence[Sequence[Json]]) -> list[Json]:
    common = list(lists[0])
    for messages in lists[1:]:
        same = 0
        while same < min(len(common), len(messages)) and common[same] == messages[same]:
            same += 1
        common = common[:same]
    return common
