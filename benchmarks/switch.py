"""From the last optimiser step to the first rollout token, and the base weights after a hundred such switches.

One switch is what a fit does between a weight step and the prompt step after it: an optimiser step has changed the
adapter, and the next rollout must see it. The time runs from the end of `optimizer.step()` to the first token of a
prompt that shares nothing with earlier ones: adapter merged into the second copy, old keys and values dropped, prompt
read. A large prompt would measure prefill instead, so it has 32 tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from cotune.lightning_modules import LanguageModel
from cotune.programs import Request, Sampling

from benchmarks import machine as rates
from benchmarks.models import language_model, speak
from benchmarks.report import RESULTS, Report

TARGET = 1.0


class BaseChangedError(RuntimeError):
    """Generating or training wrote to the base weights."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    report = Report("switch")
    for threads in options.threads:
        torch.set_num_threads(threads)
        here = rates.measure(threads)
        print(here, flush=True)
        report.details.setdefault("machines", []).append(asdict(here))
        for dtype in options.dtype:
            lm = language_model(LanguageModel, options.model, dtype=dtype)
            lm.load(seed=0)
            speak(lm)
            before = base_hash(lm)
            seconds = switches(lm, options.switches)
            if base_hash(lm) != before:
                raise BaseChangedError(f"{dtype}: after {options.switches} switches the base weights are not the same.")
            name = f"{dtype}, {threads} threads: last optimiser step to first token"
            report.add(name, seconds, "s", target=TARGET, better="less")
            report.details[name] = {"switches": options.switches, "base_sha256": before}
            print(f"{dtype}: base weights bit-equal after {options.switches} switches ({before[:12]})")
    report.write(Path(options.output))


def switches(lm: LanguageModel, count: int) -> list[float]:
    """Seconds of each switch. Every step changes the adapter, and every completion must come from the changed one."""
    trained = [p for p in lm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    seconds: list[float] = []
    fingerprints = {lm.fingerprint()}
    for number in range(count + 1):  # the first is not counted: it makes the second copy
        _train(lm, optimizer)
        began = time.perf_counter()
        completion = lm.complete([_request(number)], Sampling(max_new_tokens=1))[0]
        seconds.append(time.perf_counter() - began)
        assert len(completion.completion_ids) == 1
        fingerprints.add(lm.fingerprint())
    assert len(fingerprints) == count + 2, "an optimiser step left the adapter as it was"
    return seconds[1:]


def base_hash(lm: LanguageModel) -> str:
    """SHA-256 of all weights that are not the adapter's."""
    digest = hashlib.sha256()
    for name, tensor in sorted(lm.model.state_dict().items()):
        if "lora_" not in name:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _train(lm: LanguageModel, optimizer: torch.optim.Optimizer) -> None:
    ids_1T = torch.tensor([lm.encode(_request(0).messages)])
    optimizer.zero_grad()
    lm.model(input_ids=ids_1T, labels=ids_1T).loss.backward()
    optimizer.step()


def _request(number: int) -> Request:
    return Request([{"role": "user", "content": f"{number}: name a river."}])


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--switches", type=int, default=100)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=list(rates.BYTES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--model", default="embedded", help="as in LanguageModel")
    parser.add_argument("--output", default=str(RESULTS / "switch.json"), help="a JSON file for the figures")
    options = parser.parse_args(arguments)
    if options.switches < 1:
        parser.error(f"--switches {options.switches} is below 1")
    return options


if __name__ == "__main__":
    main()
