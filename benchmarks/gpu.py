"""`make gpu`: the tests marked gpu, and how fast rollouts and training are, in one JSON to send back (minutes).

The LM is the embedded one, or --model, in bfloat16, with random chats of a prompt step's shape: a shared beginning and
short answers.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from cotune.datamodules.collate import Pair, collate
from cotune.lightning_modules import LanguageModel
from cotune.lightning_modules.objectives import Rejection
from cotune.lightning_modules.training.gradients import BatchGradients
from cotune.programs import Request, Sampling

ROOT = Path(__file__).resolve().parents[1]
_SHARED = " ".join(f"Rule {n}: answer with one word." for n in range(60))


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--model", default="embedded", help="a Hub id, a folder or a .gguf file")
    parser.add_argument("--device", default="cuda", help="cpu tries this script, and measures nothing of interest")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: error: torch finds no CUDA device; `cotune doctor` says why.", file=sys.stderr)
        return 2
    found = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor(),
        "versions": {name: version(name) for name in ("cotune", "torch", "transformers", "peft", "bitsandbytes")},
        "tests": _tests(options.output.with_suffix(".xml")),
        "model": options.model,
        "figures": _figures(options.model, options.device),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{options.output}: send this file back")
    return int(any(said != "passed" for said in found["tests"].values()))


def _tests(report: Path) -> dict[str, str]:
    """Test -> "passed", "skipped", or the first line of what went wrong."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_gpu.py", f"--junitxml={report}"]
    subprocess.run(command, cwd=ROOT, check=False)
    cases = ElementTree.parse(report).iter("testcase")
    report.unlink()
    return {case.attrib["name"]: _said(case) for case in cases}


def _said(case: ElementTree.Element) -> str:
    (wrong,) = list(case.iterfind("*"))[:1] or (None,)
    return "passed" if wrong is None else f"{wrong.tag}: {wrong.attrib.get('message', '')}".splitlines()[0][:300]


def _figures(model: str, device: str) -> dict[str, float]:
    lm = LanguageModel(model, device=device, dtype="bfloat16", cache_tokens=1 << 18)
    lm.load(seed=0)
    chats = [Request([{"role": "user", "content": f"{_SHARED} What is {n} times {n}?"}]) for n in range(128)]
    sampling = Sampling(max_new_tokens=32)
    lm.complete(chats[:8], sampling)
    done, generating = _timed(device, lambda: lm.complete(chats, sampling))
    pairs = [Pair(one.prompt_ids, one.completion_ids) for one in done if one.completion_ids][:32]
    trained, gradients = [p for p in lm.model.parameters() if p.requires_grad], BatchGradients(None)

    def step() -> float:
        return float(gradients.compute(lm.model, trained, collate([pairs]), Rejection()).loss)

    step()
    _, training = _timed(device, step)
    return {
        "completions a second": len(done) / generating,
        "new tokens a second": sum(len(one.completion_ids) for one in done) / generating,
        "training rows a second": len(pairs) / training,
        "peak GB": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0,
    }


def _timed(device: str, work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    made = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return made, time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
