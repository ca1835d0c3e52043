"""gepa's side of the comparison of searches: its optimiser on a scripted task. Runs in the environment "gepa"."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.workers import hidden_rules
from benchmarks.workers.protocol import serve

_FENCE = re.compile(r"```\n(.*?)\n```", re.DOTALL)


class Adapter:
    """The scripted program as gepa sees it: components are the instructions of the stages."""

    propose_new_texts = None

    def __init__(self, task: hidden_rules.Task, objectives: bool) -> None:
        self.task, self.objectives = task, objectives

    def evaluate(self, batch: Sequence[str], candidate: Mapping[str, str], capture_traces: bool = False) -> Any:
        from gepa.core.adapter import EvaluationBatch

        ran = [self.task.run(candidate, example) for example in batch]
        traces = [(example, score, feedback) for example, (score, feedback, _, _) in zip(batch, ran, strict=True)]
        return EvaluationBatch(
            outputs=list(batch),
            scores=[score for score, _, _, _ in ran],
            trajectories=traces if capture_traces else None,
            objective_scores=[dict(halves) for _, _, _, halves in ran] if self.objectives else None,
        )

    def make_reflective_dataset(
        self, candidate: Mapping[str, str], eval_batch: Any, components_to_update: Sequence[str]
    ) -> dict[str, list[dict[str, str]]]:
        records = [
            {"Inputs": example, "Generated Outputs": "done", "Feedback": feedback or f"This run scored {score:.3f}."}
            for example, score, feedback in eval_batch.trajectories
        ]
        return dict.fromkeys(components_to_update, records)


def optimize(
    *,
    seed: int,
    feedback: bool,
    objectives: bool,
    stages: int,
    proposals: int,
    merge: bool,
    train: int,
    dev: int,
    max_runs: int,
) -> dict[str, Any]:
    """One optimisation, ended once prompts with all hidden rules have run."""
    import gepa
    from gepa.strategies.proposal_sampling import IndependentSampling, SingleMutationSampling

    task = hidden_rules.Task(seed, feedback, stages)
    asked = rounds = 0

    def reflect(prompt: Any) -> str:
        nonlocal asked
        asked += 1
        text = prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)
        current, told, *_ = _FENCE.findall(text)
        stage = next(name for name in hidden_rules.STAGES if current.startswith(hidden_rules.instruction_of(name)))
        return f"```\n{task.propose(stage, current, told, f'{seed} {asked}')}\n```"

    def solved(state: Any) -> bool:
        nonlocal rounds
        rounds = state.i + 1
        return bool(task.solved_at)

    result = gepa.optimize(
        seed_candidate={stage: hidden_rules.instruction_of(stage) for stage in hidden_rules.STAGES[:stages]},
        trainset=[f"train {number}" for number in range(train)],
        valset=[f"dev {number}" for number in range(dev)],
        adapter=Adapter(task, objectives),
        reflection_lm=reflect,
        frontier_type="hybrid" if objectives else "instance",
        sampling_strategy=SingleMutationSampling() if proposals == 1 else IndependentSampling(proposals),
        use_merge=merge,
        max_metric_calls=max_runs,
        stop_callbacks=[solved],
        logger=_Silent(),
        cache_evaluation=False,
        seed=seed,
    )
    best = result.candidates[result.best_idx]
    return {
        "stages": stages,
        "solved_at": task.solved_at,
        "runs": task.runs,
        "proposer_calls": asked,
        "rounds": rounds,
        "share": len(task.obeyed(best)) / hidden_rules.HIDDEN,
    }


class _Silent:
    def log(self, message: str) -> None:
        """gepa tells every step, which is no figure."""


if __name__ == "__main__":
    serve({"optimize": optimize, "versions": lambda: {"gepa": importlib.metadata.version("gepa")}})
