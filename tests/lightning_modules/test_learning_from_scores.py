"""A program with two arms, one of which pays: every objective finds it, and two do where no run passes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cotune.callbacks.diagnosis import sampled_apart
from cotune.datamodules import Bootstrapping, Runs, Trace, collate, collect, collect_runs
from cotune.lightning_modules import LanguageModel, LoRA, ProgramModule
from cotune.lightning_modules.objectives import DPO, GRPO, KTO, Distil, Objective, Rejection
from cotune.lightning_modules.training.gradients import BatchGradients
from cotune.lightning_modules.training.reference import drawn_by, with_reference
from cotune.programs import Demo, Example, Lines, Predict, Prompt, Prompts, Runner, Sampling

ARMS = Predict("question -> answer", instruction="Pick.", types={"answer": ["left", "right"]})
EXAMPLES = [Example.of({"question": str(i)}, {"answer": "right"}, id=str(i)) for i in range(2)]
PLAIN = ARMS.initial_prompts()
TUNED = {"predict": Prompt("The other one!", (Demo({"question": "9"}, {"answer": "right"}, "9"),))}


class Bandit:
    """A tiny LM that picks an arm, and steps of training by an objective without a Trainer."""

    def __init__(self, model: Path) -> None:
        self.lm = LanguageModel(str(model), device="cpu", lora=LoRA(r=4, alpha=8))
        self.module = ProgramModule(ARMS, self.lm, Lines())
        self.lm.load()

    def start(self, seed: int, *, right: float) -> None:
        """An adapter that picks the right arm between half and twice as often as that."""
        self.lm.reset_adapter(seed=seed)
        self.optimizer = torch.optim.AdamW(self._trained, lr=3e-3)
        while not right / 2 < (share := self.picks_right(PLAIN)) < 2 * right:
            arm = "right" if share < right else "left"
            text = Lines().write(ARMS.stages["predict"].signature, {"answer": arm})
            ids = tuple(self.lm.encode.text(text))
            row = Trace("x", 0, 1.0, "predict", 0, {"question": "1"}, {"answer": arm}, (), text, ids, False, "")
            self._step(Rejection(), [row])

    def learn(self, objective: Objective, *, steps: int, metric: Any, lr: float = 2e-2) -> float:
        """How often the right arm is picked after so many collections with a step of training each."""
        self.optimizer = torch.optim.AdamW(self._trained, lr=lr)
        begin = self.lm.adapter_state()
        for step in range(steps):
            if rows := self.rows(objective, metric, step, begin):
                self._step(objective, rows)
        return self.picks_right(PLAIN)

    def rows(self, objective: Objective, metric: Any, step: int, begin: Any) -> list[Trace]:
        runner = Runner(ARMS, self.lm, Lines(), metric, Sampling(max_new_tokens=8))
        options = Bootstrapping(attempts=4, fresh_demos=0, temperature=1.0, gold_answers=False)
        given: dict[str, Any] = {"options": options, "seed": step}
        if objective.runs is None:
            return objective.rows(collect(EXAMPLES, runner, PLAIN, **given))
        rows = objective.rows(collect_runs(EXAMPLES, runner, PLAIN, runs=objective.runs, **given))
        reference, now = objective.reference, self.lm.adapter_state()
        assert reference is not None
        if reference.weights == "start":
            self.lm.load_adapter_state(begin)
        maker = self.module.pair_maker(TUNED if reference.prompts == "before" else PLAIN)
        rows = with_reference(rows, maker, partial(BatchGradients().likeliest, self.lm.model, count=reference.top_k))
        self.lm.load_adapter_state(now)
        return drawn_by(rows) if reference.weights == "round" else rows

    def picks_right(self, prompts: Prompts) -> float:
        """Of the two first tokens of an arm."""
        maker, found = self.module.pair_maker(prompts), []
        first = [self.lm.encode.text(arm)[0] for arm in ("left", "right")]
        for example in EXAMPLES:
            signature = ARMS.stages["predict"].signature
            ids = maker.encode(Lines().render(signature, prompts["predict"], example.inputs))
            with torch.no_grad():
                logits = self.lm.model(input_ids=torch.tensor([ids])).logits[0, -1, first]
            found.append(float(logits.softmax(dim=0)[1]))
        return sum(found) / len(found)

    def _step(self, objective: Objective, rows: Sequence[Trace]) -> None:
        maker = self.module.pair_maker(PLAIN)
        batch = collate([[maker.pair(row) for row in rows]])
        made = BatchGradients().compute(self.lm.model, self._trained, batch, objective)
        for parameter, gradient in zip(self._trained, made.gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()

    @property
    def _trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.lm.model.parameters() if p.requires_grad]


@pytest.fixture(scope="module")
def bandit(tiny_model: Path) -> Bandit:
    return Bandit(tiny_model)


def pays(example: Example, prediction: Any) -> float:
    return float(prediction["answer"] == "right")


def pays_a_part(example: Example, prediction: Any) -> float:
    """Never enough to pass."""
    return 0.6 if prediction["answer"] == "right" else 0.2


SEEDS = [0, pytest.param(1, marks=pytest.mark.slow)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("objective", "steps"),
    [
        (Rejection(), 6),
        (KTO(), 12),
        (DPO(), 12),
        (GRPO(), 12),
        *(pytest.param(GRPO(variant), 12, marks=pytest.mark.slow) for variant in ("dr_grpo", "dapo", "cispo")),  # type: ignore[arg-type]
    ],
    ids=lambda value: getattr(value, "variant", str(value) if isinstance(value, int) else type(value).__name__),
)
def test_the_arm_that_pays_is_found(bandit: Bandit, objective: Objective, steps: int, seed: int) -> None:
    bandit.start(seed, right=0.3)
    assert bandit.learn(objective, steps=steps, metric=pays) > 0.9


def test_sampler_and_training_agree_on_how_likely_tokens_drawn_among_all_were(bandit: Bandit) -> None:
    program = Predict("question -> thought, answer", types={"answer": ["left", "right"]})
    runner = Runner(program, bandit.lm, Lines(), pays, Sampling(max_new_tokens=40))
    vocabulary = bandit.lm.encode.vocabulary(bandit.lm.name)
    drawn = collect_runs(
        EXAMPLES,
        runner,
        program.initial_prompts(),
        runs=Runs(2),
        options=Bootstrapping(),
        seed=0,
        vocabulary=vocabulary,
    )
    rows = KTO().rows(drawn)
    maker = ProgramModule(program, bandit.lm, Lines()).pair_maker(program.initial_prompts())
    rows = with_reference(rows, maker, partial(BatchGradients().likeliest, bandit.lm.model, count=0))
    found = re.fullmatch(
        r"sampler and trainer differ by at most (.*) nats on (\d+) unconstrained tokens", sampled_apart(rows)
    )
    assert found
    assert float(found[1]) < 1e-4
    assert int(found[2]) > 4 * len(rows)
    for row, step in zip(rows, (step for attempt in drawn.attempts for step in attempt.rollout.steps), strict=True):
        answer = step.completion.fields[-1]
        assert set(row.sampled[answer.start : answer.end]) == {0.0}  # drawn among two


@pytest.mark.parametrize("seed", SEEDS)
def test_a_student_comes_to_do_without_the_prompts_what_its_teacher_does_with_them(bandit: Bandit, seed: int) -> None:
    bandit.start(seed, right=0.1)
    with_prompts, without = bandit.picks_right(TUNED), bandit.picks_right(PLAIN)
    after = bandit.learn(Distil(runs=4), steps=20, metric=pays)
    assert abs(after - with_prompts) < 0.25 * abs(without - with_prompts)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("objective", "right", "metric"), [(GRPO(), 0.1, pays_a_part), (KTO(), 0.01, pays)], ids=["GRPO", "KTO"]
)
def test_where_no_run_passes_failing_ones_still_teach(
    bandit: Bandit, objective: Objective, right: float, metric: Any, seed: int
) -> None:
    bandit.start(seed, right=right)
    assert bandit.rows(Rejection(), metric, 0, {}) == []
    assert bandit.learn(objective, steps=15, metric=metric) > 0.5
