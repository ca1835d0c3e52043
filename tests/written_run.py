"""The files of a run, written by hand: any number of stages and examples, in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cotune.datamodules import Report

STAGES = ("first_hop", "second_hop", "answer")
PREFIXES = ("vanilla", "p", "p -> w", "p -> w -> p")


def write_run(
    folder: Path,
    *,
    scores: Sequence[Sequence[float]] = ((0, 0, 0, 1, 0), (0, 1, 0, 0, 0), (1, 1, 0, 1, 0), (1, 1, 0, 1, 0)),
    stages: int = 1,
    recorded: bool = True,
    finished: bool = True,
    text: str = "",
    seed: int = 1,
    tested: Sequence[Sequence[float]] = (),
) -> Path:
    """Writes a run of p -> w -> p; `scores` has a row a prefix that was reached, of scores on val; `tested` likewise on
    test, where prefixes are to be scored on it.

    An example of score 0 whose number is 4 fails by its format. `text` is put wherever data can put a text.
    """
    folder.mkdir(parents=True)
    history = [_history(index, row, text) for index, row in enumerate(scores)]
    for record, row in zip(history, tested, strict=False):
        record |= {"test_score": sum(row) / len(row), "test_cost": {"lm_calls": 11}}
    (folder / "history.jsonl").write_text("".join(json.dumps(record) + "\n" for record in history))
    config = {
        "seed_everything": seed,
        "model": {"lm": {"class_path": "cotune.x.LanguageModel", "init_args": {"model": f"m{text}", "api_key": "k-1"}}},
        "data": {"class_path": "cotune.Iris", "init_args": {"sizes": {"val": len(scores[0]), "test": 2}}},
        "alternate": {"schedule": "p -> w -> p", "epochs": 2},
        "name": folder.name,
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    _write_metrics(folder / "metrics.csv")
    if recorded:
        (folder / "boundaries").mkdir()
        (folder / "rollouts").mkdir()
        for index, row in enumerate(scores):
            known = {"index": index, "prefix": PREFIXES[index], "prompts": _prompts(index, stages, text)}
            if index in (1, 3):
                known["candidates"] = _candidates(index, stages, text)
                known["rejected"] = [_rejected(stages, text)]
            (folder / f"boundaries/{index}.json").write_text(json.dumps(known))
            _write_rollouts(folder / f"rollouts/val-{index}.jsonl", row, stages, text)
        for index, row in enumerate(tested):
            _write_rollouts(folder / f"rollouts/test-{index}.jsonl", row, stages, text)
    if finished:
        if recorded:
            _write_rollouts(folder / "rollouts/test.jsonl", scores[-1][:2], stages, text)
        means = [sum(row) / len(row) for row in scores]
        summary = {
            "schedule": "p -> w -> p",
            "scores": dict(zip(PREFIXES, means, strict=False)),
            "best": PREFIXES[means.index(max(means))],
            "test_score": 0.5,
            "versions": {"cotune": "0.1.0", "torch": f"2{text}"},
            "command": f"cotune fit --config c.yaml --model.lm.api_key k-2 {text}",
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def _history(index: int, scores: Sequence[float], text: str) -> dict[str, Any]:
    record: dict[str, Any] = {
        "index": index,
        "step": ("", "p", "w", "p")[index],
        "prefix": PREFIXES[index],
        "prompts": f"id-{min(index, 2)}",
        "val_score": sum(scores) / len(scores),
        "scores": {"initial": 0.2, "current": sum(scores) / len(scores)} if index == 2 else {"current": 0.0},
        "failures": {"format": 1} if len(scores) > 4 else {},
        "lm_calls": 1000 + index,
        "prompt_tokens": 20_000 + index,
        "completion_tokens": 300 + index,
        "seconds": 70.0 + index,
    }
    if index in (1, 3):
        record |= {"dev_score": 0.75, "notes": [f"a note of search {index} {text}"]}
        record["candidates"] = [{"why": "incumbent", "id": "id-0", "score": 0.5, "pruned": False}]
    if index == 2:
        counts = {"solved": 3, "examples": 6, "runs": 9, "solved_at_attempt": [2, 1], "wrong": 5, "format": 1}
        report = {**vars(Report()), **counts}
        record |= {"traces": report, "epochs": 2, "epoch": 2}
    return record


def _prompts(index: int, stages: int, text: str) -> dict[str, Any]:
    demo = {
        "inputs": {"question": f"demo question{text}"},
        "outputs": {"answer": f"demo answer {index}"},
        "source": "t1",
    }
    return {
        stage: {
            "instruction": ("Answer.", "Answer in one word.", "Answer.", "Answer.")[index] + text,
            "demos": [demo] if index == 1 else [],
        }
        for stage in STAGES[-stages:]
    }


def _candidates(index: int, stages: int, text: str) -> list[dict[str, Any]]:
    tried = [
        ("incumbent", "id-0", 0.5, False),
        (f"random 1{text}", "id-1", 0.75, False),
        ("random 2", "id-9", 0.25, True),
    ]
    return [
        {
            "id": name,
            "parent": "" if name == "id-0" else "id-0",
            "why": why,
            "score": score,
            "pruned": pruned,
            "scores": [score] * (1 if pruned else 4),
            "errors": {"format": 2} if pruned else {},
            "prompts": _prompts(0 if name == "id-0" else 1, stages, text),
        }
        for why, name, score, pruned in tried
    ]


def _rejected(stages: int, text: str) -> dict[str, Any]:
    stage = STAGES[-stages:][0]
    ran = {"minibatch": ["t1", "t2"], "before": [0.5, 1.0], "after": [0.5, 0.0]}
    lineage = {"round": 2, "parents": ["id-1"], "rewritten": {stage: ran}}
    why = f"no better on the minibatch{text}"
    return {"stage": stage, "text": f"Guess.{text}", "why": why, "parent": "id-1", "lineage": lineage}


def _write_rollouts(path: Path, scores: Sequence[float], stages: int, text: str) -> None:
    path.write_text("".join(json.dumps(_rollout(i, score, stages, text)) + "\n" for i, score in enumerate(scores)))


def _rollout(number: int, score: float, stages: int, text: str) -> dict[str, Any]:
    unreadable = number == 4 and not score
    answer = f"right {number}" if score else f"wrong {number}"
    question = f"question {number}{text}"
    return {
        "example": f"ex-{number}{text}",
        "inputs": {"question": question},
        "labels": {"answer": f"right {number}{text}"},
        "steps": [
            {
                "stage": stage,
                "inputs": {"question": question, "context": f"context of {stage}{text}"},
                "messages": [
                    {"role": "system", "content": f"system message of {stage}{text}"},
                    {"role": "user", "content": f"asked {stage} {question}"},
                ],
                "completion": f"completion of {stage}: {answer}{text}",
                "finished": "length" if unreadable else "eos",
                "prompt_tokens": 40,
                "completion_tokens": 7,
                "outputs": {} if unreadable else {"answer": f"{answer}{text}"},
            }
            for stage in STAGES[-stages:]
        ],
        "prediction": None if unreadable else {"answer": f"{answer}{text}"},
        "score": float(score),
        "error": {"kind": "format", "message": f'no "answer" here{text}'} if unreadable else None,
        "cut": "",
    }


def _write_metrics(path: Path) -> None:
    lines = ["step,epoch,train/loss_step,train/lr,val/score,boundary/index"]
    lines += [f"{step},{step // 5},{2 / (step + 1)},{step / 1e4},," for step in range(10)]
    lines += ["4,0,,,0.4,", "9,1,,,0.6,", "9,1,,,,2"]
    path.write_text("\n".join(lines) + "\n")
