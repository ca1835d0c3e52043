"""Memory of the engine as requests grow: a process each for 100, 1,000 and 10,000, its peak while generating.

The model is the embedded one cut to its first layers, so that 10,000 requests end in minutes; keys and values still
fill the same number of tokens, which a hundred requests already exceed. What is compared is the process at its peak
less the ids and texts of the completions: those are the caller's, and do grow with the requests.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cotune.lightning_modules.embedded import embedded_model

from benchmarks.peers import Worker, runtime
from benchmarks.report import RESULTS, Report

TARGET = 1.1


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    report = Report("memory")
    with tempfile.TemporaryDirectory(prefix="cotune-benchmark-") as folder:
        cut = cut_model(Path(folder) / "model", layers=options.layers)
        found = {count: measure(cut, count, options) for count in options.requests}
    for count, one in found.items():
        report.add(f"{count} requests: peak of the process", [one["peak"] / 2**20], "MiB")
        report.add(f"{count} requests: completions, the caller's", [one["given"] / 2**20], "MiB")
        report.add(f"{count} requests: model and requests, before", [one["ready"] / 2**20], "MiB")
    least, most = (found[count]["peak"] - found[count]["given"] for count in (min(found), max(found)))
    name = f"peak less completions, {max(found)} requests to {min(found)}"
    report.add(name, [most / least], "times", target=TARGET, better="less")
    report.details = {**vars(options), "measured": found}
    report.write(Path(options.output))


def measure(model: Path, requests: int, options: argparse.Namespace) -> dict[str, Any]:
    """What the worker says of one size; a process of its own, since memory that was freed may stay with a process."""
    with Worker("cotune_memory", environment=runtime(options.threads)) as worker:
        found: dict[str, Any] = worker.call(
            "run",
            model=str(model),
            requests=requests,
            new=options.new,
            cache_tokens=options.cache_tokens,
            threads=options.threads,
        )
    print(f"{requests} requests: {found['prompt_tokens'] / requests:.0f} tokens a prompt", flush=True)
    return found


def cut_model(folder: Path, *, layers: int) -> Path:
    """The embedded model with its first layers only, in a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(embedded_model())
    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:layers]
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", nargs="+", type=int, default=[100, 1000, 10_000])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--new", type=int, default=8)
    parser.add_argument("--cache_tokens", type=int, default=8192, help="as in LanguageModel")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default=str(RESULTS / "memory.json"), help="a JSON file for the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
