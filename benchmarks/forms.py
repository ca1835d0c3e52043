"""What filling in costs: constrained fields, and fixed texts in the middle, beside as many free tokens.

All sides write as many tokens to the same prompts on one LM, in one process, by turns. No token ends a turn, and
constrained fields hold texts that are longer than the limit, so that every token is chosen under a constraint.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from cotune.programs import Request, Sampling
from cotune.programs.layout import Choices, Field, Fixed, Layout, Pattern

from benchmarks import machine as rates
from benchmarks.models import Endless, language_model, speak
from benchmarks.report import RESULTS, Report

TARGET = 1.03


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    report = Report("forms")
    here = rates.measure(options.threads)
    print(here, flush=True)
    report.details = {"machine": asdict(here), "prompts": options.prompts, "new": options.new}
    for dtype in options.dtype:
        # Room for all rows at once on every side: a choice reserves what its longest text could take, a byte a token.
        lm = language_model(Endless, options.model, dtype=dtype, cache_tokens=1 << 17)
        lm.load(seed=0)
        speak(lm)
        times = {name: list[float]() for name in layouts(options.new)}
        for number in range(options.rounds + 1):  # the first makes the masks and the second copy
            for name, layout in _turns(layouts(options.new), number):
                seconds = _seconds(lm, layout, options.prompts, options.new, number)
                times[name] += [seconds] if number else []
        for name in [name for name in times if name != "free"]:
            ratios = [own / free for own, free in zip(times[name], times["free"], strict=True)]
            # A fixed text is read beside the free tokens, so filling in has no target: it costs what its ids cost.
            target = None if name == "filled in" else TARGET
            report.add(f"{name}, {dtype}: time beside free text", ratios, "x", target=target, better="less")
        report.details[dtype] = times
    report.write(Path(options.output))


def layouts(new: int) -> dict[str, Layout]:
    """What each side writes: `new` free tokens each."""
    rng = random.Random(0)
    words = ["petal", "river", "number", "answer", "green", "seven", "because", "city", "paper", "never"]
    choices = Choices(tuple(" ".join(rng.choices(words, k=3 * new)) for _ in range(16)))
    fixed = Fixed("\nanswer:")
    return {
        "free": (Field("a", max_tokens=new),),
        "filled in": (Field("a", max_tokens=new // 2), fixed, Field("b", max_tokens=new - new // 2)),
        "choices": (Field("a", max_tokens=new, syntax=choices),),
        "pattern": (Field("a", max_tokens=new, syntax=Pattern(r"[a-z ]+\|\|\|")),),
    }


def _turns(found: dict[str, Layout], number: int) -> list[tuple[str, Layout]]:
    """The sides in another order each round."""
    items = list(found.items())
    start = number % len(items)
    return items[start:] + items[:start]


def _seconds(lm: Endless, layout: Layout, prompts: int, new: int, number: int) -> float:
    """Processor time of a batch, all threads together: both sides do it on the same processor, and what else runs there
    does not count. The prompts are other ones each round, or their keys and values would be there."""
    requests = [
        Request([{"role": "user", "content": f"{number}.{i}: name a river."}], layout=layout) for i in range(prompts)
    ]
    began = time.process_time()
    completions = lm.complete(requests, Sampling(max_new_tokens=new))
    seconds = time.process_time() - began
    chosen = sum(field.end - field.start for completion in completions for field in completion.fields)
    assert chosen >= 0.9 * prompts * new, f"{chosen} tokens in fields, of {prompts * new}"
    return seconds


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new", type=int, default=32, help="tokens that each prompt has written")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=list(rates.BYTES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="embedded", help="as in LanguageModel")
    parser.add_argument("--output", default=str(RESULTS / "forms.json"), help="a JSON file for the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
