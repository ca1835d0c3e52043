"""Losses that are no numbers, memory that runs out, and another number of processes."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.kills import Reference, resumed_equal
from faults.nursery import fresh, last_line, run_to_end
from faults.small_run import Job, outcome
from faults.trials import Trial

BAD = {"NaN": float("nan"), "Inf": float("inf")}


def not_a_number_trial(job: Job, value: str, k: int) -> Trial:
    """One row's loss is no number at the k-th computation of losses. The weights must stay as they were before it."""
    fresh(job.folder)
    child = run_to_end(job, _spoiling(job.folder / "losses.jsonl", k, BAD[value]), seconds=600)
    seen = [json.loads(line) for line in (job.folder / "losses.jsonl").read_text().splitlines()]
    if len(seen) < k:
        return {"ok": child.code == 0, "end": True, "redone": 0, "silent": 0, "said": ""}
    after = seen[k]["weights"] if len(seen) > k else None
    untouched = after in (None, seen[k - 1]["weights"]) and all(record["finite"] for record in seen)
    said = next((line for line in child.text.splitlines() if "not finite" in line), "")
    return {
        "ok": bool(child.code == 0 and untouched and said),
        "redone": 0,
        "silent": int(not untouched or not said),
        "said": said or last_line(child.text),
    }


def training_memory_trial(job: Job, expected: Reference, k: int) -> Trial:
    """Memory runs out at the k-th computation of losses, for more than one row at once."""
    fresh(job.folder)
    child = run_to_end(job, _no_memory_in_training(job.folder / "losses", k), seconds=600)
    said = next((line for line in child.text.splitlines() if "memory ran out" in line), "")
    if child.code == 0 and not said:
        return {"ok": True, "end": True, "redone": 0, "silent": 0, "said": ""}
    found = outcome(job.run) if child.code == 0 else {}
    # The same gradients, added in another order: the last bits may differ, and no score does.
    alike = all(found.get(name) == expected.result[name] for name in ("scores", "prompts", "test_score"))
    return {
        "ok": alike,
        "equal to the last bit": found == expected.result,
        "redone": 0,
        "silent": int(child.code == 0 and not alike),
        "said": said or last_line(child.text),
    }


def generation_memory_trial(job: Job, expected: Reference, k: int) -> Trial:
    """Memory runs out at the k-th forward pass outside training, once."""
    fresh(job.folder)
    child = run_to_end(job, _no_memory_in_generation(job.folder / "passes", k), seconds=600)
    if not (job.folder / "passes").exists():
        return {"ok": child.code == 0, "end": True, "redone": 0, "silent": 0, "said": ""}
    equal = child.code == 0 and outcome(job.run) == expected.result
    clean = child.code == 0 or (child.code == 2 and "Traceback" not in child.text)
    again = equal or resumed_equal(job, expected)[0]
    said = next((line for line in child.text.splitlines() if "memory" in line), "")
    return {
        "ok": clean and again,
        "went on": equal,
        "redone": 0,
        "silent": int(child.code == 0 and not equal),
        "said": said or last_line(child.text),
    }


def address_space_trial(job: Job, expected: Reference, megabytes: int) -> Trial:
    """The process may take so many megabytes more than it has when it begins (RLIMIT_AS); then as much as it likes."""
    fresh(job.folder)
    child = run_to_end(job, _little_memory(megabytes), seconds=600)
    if child.code == 0:
        equal = outcome(job.run) == expected.result
        return {"ok": equal, "end": True, "redone": 0, "silent": int(not equal), "said": ""}
    equal, second = resumed_equal(job, expected)
    return {
        "ok": equal,
        "exit code": child.code,
        "redone": 0,
        "silent": int(second.code == 0 and not equal),
        "said": last_line(child.text)[:300],
    }


def _spoiling(record: Path, k: int, value: float) -> Callable[[], None]:
    def arm() -> None:
        import torch
        from cotune.lightning_modules.lora import fingerprint
        from cotune.lightning_modules.training import gradients

        original, calls = gradients.log_probs, 0
        record.write_text("")

        def spoiled(model: Any, part: Any, *given: Any) -> Any:
            nonlocal calls
            calls += 1
            trained = [p for p in model.parameters() if p.requires_grad]
            finite = all(bool(torch.isfinite(p).all()) for p in trained)
            with record.open("a") as file:
                file.write(json.dumps({"weights": fingerprint(model), "finite": finite}) + "\n")
            found_nK, weighted = original(model, part, *given)
            if calls == k:
                found_nK = found_nK.clone()
                found_nK[0] = found_nK[0] * value
                weighted = weighted * value
            return found_nK, weighted

        gradients.log_probs = spoiled

    return arm


def _no_memory_in_training(record: Path, k: int) -> Callable[[], None]:
    def arm() -> None:
        import torch
        from cotune.lightning_modules.training import gradients

        original, calls = gradients.log_probs, 0

        def starved(model: Any, part: Any, *given: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= k and part.rows > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return original(model, part, *given)

        gradients.log_probs = starved

    return arm


def _no_memory_in_generation(record: Path, k: int) -> Callable[[], None]:
    def arm() -> None:
        import torch
        from transformers import LlamaModel

        original, calls = LlamaModel.forward, 0

        def starved(self: Any, *args: Any, **more: Any) -> Any:
            nonlocal calls
            if not torch.is_grad_enabled():
                calls += 1
                if calls == k:
                    record.write_text("")
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return original(self, *args, **more)

        LlamaModel.forward = starved  # type: ignore[method-assign]

    return arm


def _little_memory(megabytes: int) -> Callable[[], None]:
    def arm() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

    return arm
