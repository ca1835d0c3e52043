"""Bootstrapping: rollouts that succeed on train become demos for every stage they called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from cotune.errors import BadValueError
from cotune.programs import Demo, Example, Faults, Form, Prompts, Rollout, Runner, faults_of
from cotune.programs.demos import demo_of, hide_own_demos, hinted, labelled_demos, speaks_of_hint
from cotune.programs.faults import merged
from cotune.programs.forms import forms_of
from cotune.prompting.search import SearchTask

HINTED = 4
"""Runs with a hint for each success that is wanted."""


@dataclass(frozen=True)
class Solved:
    """A train example whose rollout succeeded.

    Attributes:
        source: id of the example.
        demos: stage -> one demo for EACH of its calls, in the order of the calls. A stage that a branch left out is
            not a key. All calls are kept, because the later ones of a loop (with passages found, say) look unlike the
            first; whoever draws a demo set takes one of them, so that one example does not fill a prompt.
        hinted: the run was shown the gold answer; no demo of it says so.
    """

    source: str
    demos: Mapping[str, tuple[Demo, ...]]
    hinted: bool = False


@dataclass(frozen=True)
class Bootstrapped:
    """The successes in train order, and what a log should say about the rest; `faults` are of all attempts."""

    solved: tuple[Solved, ...]
    notes: tuple[str, ...]
    faults: Faults = field(default_factory=dict)


def bootstrap(task: SearchTask, prompts: Prompts, *, attempts: int = 1, enough: int = 0) -> Bootstrapped:
    """Runs the program on all of train, in one batch, and keeps what scores at least `task.threshold`.

    A success has a valid score: a completion that does not parse, or code that raises, is never one. An example is run
    without the demos that come from itself, so that it cannot solve itself by copying.

    Args:
        prompts: the ones to run with.
        attempts: times an example is tried until it succeeds. From the second on only the unsolved run, with new draws;
            at temperature 0 those would repeat the first word for word, so they are not run, and a note says so.
        enough: successes that a search needs. Where fewer were found and a stage reasons, `HINTED` times as many of the
            unsolved run once more with the gold answer as a hint (STaR, Zelikman et al., 2022): reasoning that leads to
            it makes a demo, and labels have none. Runs whose reasoning speaks of the hint are left out.

    Raises:
        FaultyProgramError: the user's code raised on more of train than `task.runner.max_error_rate` allows.
        ValueError: attempts is below 1.
    """
    if attempts < 1:
        raise BadValueError(f"attempts {attempts} is below 1; 1 runs every example once.")
    tries = attempts if task.runner.sampling.temperature > 0 else 1
    train = list({example.id: example for example in task.train}.values())  # equal rows share an id: run one
    last: dict[str, Rollout] = {}
    faults: Faults = {}
    for attempt in range(tries):
        unsolved = [example for example in train if not _solved(last.get(example.id), task.threshold)]
        if unsolved:
            done = _run(task, prompts, unsolved, attempt)
            last.update({r.example.id: r for r in done})
            faults = merged(faults, faults_of(done))
    done = list(last.values())  # updating keeps the place of the first attempt: train order
    passed = [r for r in done if _solved(r, task.threshold)]
    forms = forms_of(task.runner.form, prompts)
    solved = [Solved(r.example.id, demos_of(r, task.runner, forms)) for r in passed]
    notes = _notes(task, done, len(solved), attempts, tries)
    reasons = any(forms[name].used(stage.signature).reasoning for name, stage in task.runner.program.stages.items())
    if reasons and len(solved) < min(enough, len(done)):
        unsolved = [r.example for r in done if not _solved(r, task.threshold)][: HINTED * enough]
        told = _run(task, prompts, unsolved, tries, hints=True)
        faults = merged(faults, faults_of(told))
        made = [r for r in told if _solved(r, task.threshold) and not speaks_of_hint(r)]
        solved += [Solved(r.example.id, demos_of(r, task.runner, forms), hinted=True) for r in made]
        passed += made
        notes.append(
            f"bootstrap: {len(made)} of {len(told)} unsolved examples gave reasoning once shown the gold answer"
        )
    demos = sum(len(of_stage) for one in solved for of_stage in one.demos.values())
    notes += _left_out("demos of runs", sum(len(r.steps) for r in passed), demos)
    return Bootstrapped(tuple(solved), tuple(notes), faults)


def demos_of(rollout: Rollout, runner: Runner, forms: Mapping[str, Form] | None = None) -> dict[str, tuple[Demo, ...]]:
    """Stage -> a demo for each of its calls in the rollout, in order, less those that the form cannot write.

    Args:
        forms: stage -> the form of its prompt; the runner's without it.
    """
    found: dict[str, tuple[Demo, ...]] = {}
    for step in rollout.steps:
        signature = runner.program.stages[step.stage].signature
        demo = demo_of(signature, step, rollout.example.id)
        form = forms[step.stage] if forms else runner.form
        if not form.unwritable(signature, demo.outputs):
            found[step.stage] = (*found.get(step.stage, ()), demo)
    return found


def labelled_pool(task: SearchTask) -> tuple[dict[str, list[Demo]], list[str]]:
    """The labelled demos of train that the form can write, and what a log should say about the others."""
    program, forms = task.runner.program, forms_of(task.runner.form, task.initial)
    kept, made = labelled_demos(program, task.train, forms), labelled_demos(program, task.train)
    return kept, _left_out("labelled demos", *(sum(map(len, pool.values())) for pool in (made, kept)))


def _left_out(what: str, made: int, kept: int) -> list[str]:
    said = f"{made - kept} of {made} {what} left out: the form cannot write them so that they are read back"
    return [said] if kept < made else []


def _run(
    task: SearchTask, prompts: Prompts, examples: Sequence[Example], attempt: int, *, hints: bool = False
) -> list[Rollout]:
    if task.progress is not None:
        which = ", with hints" if hints else f", attempt {attempt + 1}" if attempt else ""
        task.progress.start(len(examples), f"bootstrap{which}")
    given = [(hide_own_demos(prompts, example.id), example) for example in examples]
    # Later attempts rerun the unsolved only, so the error rate can be high there even if few examples fail.
    runner = task.runner if attempt == 0 else replace(task.runner, max_error_rate=1.0)
    return runner.run(
        examples,
        [hinted(task.runner.program, shown, example) if hints else shown for shown, example in given],
        seed=task.seed,
        attempt=attempt,
        progress=None if task.progress is None else task.progress.advance,
    )


def _solved(rollout: Rollout | None, threshold: float) -> bool:
    return rollout is not None and rollout.error is None and rollout.score >= threshold


def _notes(task: SearchTask, done: Sequence[Rollout], solved: int, attempts: int, tries: int) -> list[str]:
    notes = [f"bootstrap: {solved} of {len(done)} train examples solved (score at least {task.threshold:g})"]
    if done and not solved:
        notes[0] += f"; the best score was {max(r.score for r in done):g}"
    errors = Counter(r.error.kind for r in done if r.error is not None)
    notes += [f"bootstrap: {count} {kind} errors" for kind, count in sorted(errors.items())]
    if tries < attempts:
        notes.append(f"bootstrap: attempts 2 to {attempts} not run, since at temperature 0 they would equal the first")
    return notes
