"""Our generation against Hugging Face `generate` on prompts that share a prefix: one run, both sides interleaved.

Both write the same tokens, or no ratio is printed. Ours runs as in a fit: a LoRA adapter whose weights are not zero,
merged into a second copy of the weights. Hugging Face runs a plain model without an adapter that holds the merged
weights, left-padded and greedy, so that both do the same work and neither pays for an adapter while decoding.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from cotune.datamodules.collate import shared_prefix
from cotune.lightning_modules import LanguageModel
from cotune.lightning_modules.lora import lora_layers
from cotune.programs import Request, Sampling

QUESTIONS = (
    "What is its capital?",
    "Name a river there.",
    "How many people live there, roughly?",
    "Who wrote about it?",
)


@dataclass(frozen=True)
class Result:
    """What a run measured. Times are seconds a round, `ours` and `theirs` alternating."""

    prompts: int
    prompt_tokens: list[int]
    shared_tokens: int
    new_tokens: int
    written_tokens: int
    threads: int
    ours: list[float]
    theirs: list[float]
    ratios: list[float]
    gemm_gflops: float
    copy_gb_per_s: float
    machine: str
    versions: dict[str, str]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    gemm, copied = gemm_rate(), copy_rate()
    lm = LanguageModel(options.model, device="cpu")
    lm.load(seed=0)
    _speak(lm)
    requests = make_requests(lm, prompts=options.prompts, shared=options.shared)
    sampling = Sampling(max_new_tokens=options.new)
    theirs = hugging_face(lm, requests, options.new)
    ours = cotune_generation(lm, requests, sampling)
    expected, found = theirs(), ours()  # also warms both up
    if found != expected:
        differ = sum(a != b for a, b in zip(found, expected, strict=True))
        raise SystemExit(f"{differ} of {len(found)} completions differ: no ratio is printed.")
    our_times, their_times = [], []
    for _ in range(options.rounds):
        their_times.append(timed(theirs))
        our_times.append(timed(ours))
    ids = [lm.encode(request.messages) for request in requests]
    result = Result(
        prompts=len(ids),
        prompt_tokens=[len(prompt) for prompt in ids],
        shared_tokens=shared_prefix(ids),
        new_tokens=options.new,
        written_tokens=sum(map(len, found)),
        threads=torch.get_num_threads(),
        ours=our_times,
        theirs=their_times,
        ratios=[b / a for a, b in zip(our_times, their_times, strict=True)],
        gemm_gflops=gemm,
        copy_gb_per_s=copied,
        machine=f"{_processor()}, {os.cpu_count()} CPUs",
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )
    print(shown(result))
    if options.output:
        Path(options.output).write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")


def make_requests(lm: LanguageModel, *, prompts: int, shared: int) -> list[Request]:
    """Chats whose prompts share about `shared` tokens: an instruction with facts, then a question of each one's own."""
    facts, count = "Answer from these facts.", 0
    while True:
        requests = [
            Request(
                [
                    {"role": "system", "content": facts},
                    {"role": "user", "content": f"Country {i}: {QUESTIONS[i % len(QUESTIONS)]}"},
                ]
            )
            for i in range(1, prompts + 1)
        ]
        ids = [lm.encode(request.messages) for request in requests]
        if (shared_prefix(ids) if prompts > 1 else len(ids[0])) >= shared:
            return requests
        count += 1
        facts += f" Country {count} lies {count * 7 % 90} degrees north."


def hugging_face(lm: LanguageModel, requests: Sequence[Request], new: int) -> Callable[[], list[list[int]]]:
    """Left-padded greedy `generate` on a plain model with the merged weights: no PEFT around any layer."""
    model = _merged_base(lm)
    end_ids = lm.end_ids

    def run() -> list[list[int]]:
        prompts = [lm.encode(request.messages) for request in requests]  # tokenising counts on both sides
        width = max(map(len, prompts))
        ids = torch.tensor([[lm.pad_id] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            written = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=end_ids,
                pad_token_id=lm.pad_id,
            )[:, width:]
        return [_until_end(row, end_ids) for row in written.tolist()]

    return run


def cotune_generation(
    lm: LanguageModel, requests: Sequence[Request], sampling: Sampling
) -> Callable[[], list[list[int]]]:
    """What a fit calls."""
    return lambda: [list(completion.completion_ids) for completion in lm.generate(requests, sampling)]


def timed(run: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def gemm_rate(seconds: float = 1.0) -> float:
    """GFLOP/s of fp32 matrix products of 1024 x 1024, the best of those made in about a second."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / _best(lambda: a @ b, seconds) / 1e9


def copy_rate(seconds: float = 1.0) -> float:
    """GB/s of copying 256 MB, read and written bytes both counted, the best in about a second."""
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _best(lambda: target.copy_(source), seconds) / 1e9


def shown(result: Result) -> str:
    """The result as text."""
    lengths = f"{min(result.prompt_tokens)}-{max(result.prompt_tokens)}"
    rounds = "  ".join(f"{a:.2f}/{b:.2f}" for a, b in zip(result.ours, result.theirs, strict=True))
    return "\n".join(
        [
            f"{result.prompts} prompts of {lengths} tokens, {result.shared_tokens} shared, {result.new_tokens} new "
            f"at most ({result.written_tokens} written), fp32, equal tokens on both sides",
            f"{result.machine}; {result.threads} threads; GEMM {result.gemm_gflops:.0f} GFLOP/s, "
            f"copy {result.copy_gb_per_s:.1f} GB/s; {', '.join(f'{k} {v}' for k, v in result.versions.items())}",
            f"cotune      {statistics.median(result.ours):8.2f} s (median)",
            f"HF generate {statistics.median(result.theirs):8.2f} s (median)",
            f"rounds, ours/theirs: {rounds}",
            f"ratio       {statistics.median(result.ratios):8.2f}  (median of the rounds' ratios; lowest "
            f"{min(result.ratios):.2f}, highest {max(result.ratios):.2f})",
        ]
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--shared", type=int, default=375, help="tokens that all prompts share, at least")
    parser.add_argument("--new", type=int, default=16, help="tokens to write, at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0 takes torch's default")
    parser.add_argument("--model", default="embedded", help="as in LanguageModel")
    parser.add_argument("--output", help="a JSON file for the figures")
    options = parser.parse_args(arguments)
    for name in ("prompts", "new", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} is below 1")
    return options


def _speak(lm: LanguageModel) -> None:
    """Gives the adapter small weights, as training would: a zero one could be forgotten without a difference."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, layer in lora_layers(lm.model):
            weight = layer.lora_B["default"].weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * 1e-3)


def _merged_base(lm: LanguageModel) -> Any:
    """A plain copy of the model with the adapter in its weights."""
    adapted = {name.removeprefix("base_model.model."): layer for name, layer in lora_layers(lm.model)}
    base = lm.model.get_base_model()
    plain = type(base)(base.config).eval()
    with torch.no_grad():
        state = {name.replace(".base_layer.", "."): t for name, t in base.state_dict().items() if "lora_" not in name}
        for name, layer in adapted.items():
            state[f"{name}.weight"] = state[f"{name}.weight"] + layer.get_delta_weight("default")
    plain.load_state_dict(state)
    plain.generation_config = base.generation_config
    return plain


def _until_end(row: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    """A row without the padding after its end-of-turn token."""
    end = next((at for at, token in enumerate(row) if token in end_ids), len(row) - 1)
    return list(row[: end + 1])


def _best(run: Callable[[], object], seconds: float) -> float:
    run()
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        best = min(best, timed(run))
    return best


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
