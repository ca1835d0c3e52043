"""Which bases generate, train and export on this machine: every cell of the table in docs/models-and-quantization.md.

    python benchmarks/quantization.py --gguf FILE --json benchmarks/results/quantization-cpu.json
    python benchmarks/quantization.py --table benchmarks/results/quantization-cpu.json

Runs the embedded model in each form through what a weight step does, in its order: generate, train, generate, save.
A cell is "ok" only if all of these hold:

- rollouts: the same completions twice;
- training, after generating: every LoRA matrix gets a gradient that is not zero, the loss falls in eight steps, and the
  base's state_dict is byte for byte what it was when loaded, the loss too after asking for it;
- adapter: saved and loaded beside the same base, it writes the same tokens;
- merged, into the base as it was rounded or, with --unrounded, as it was before: plain transformers loads it
  unquantised, and of six greedy completions so many are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from cotune.callbacks.export_program import export_program
from cotune.datamodules.collate import Batch, Pair, collate
from cotune.datamodules.tasks.iris import iris_examples
from cotune.lightning_modules import LanguageModel, LoRA, ProgramModule
from cotune.lightning_modules.embedded import embedded_model
from cotune.lightning_modules.training.loss import exact_dtype, log_probs
from cotune.programs import Completion, Predict, Sampling

from cotune.commands.export import write_export

FLOWERS = iris_examples()[::25]
SIGNATURE = "petal_length, petal_width, sepal_length, sepal_width -> answer"
NEW_TOKENS = 6


@dataclass
class Row:
    """One base. A cell is "ok", with a figure behind it, or what went wrong."""

    base: str
    options: str
    cells: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    weights_mb: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", help="rows by name")
    parser.add_argument("--gguf", metavar="FILE", help="a GGUF file of the embedded model, for the row that reads one")
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    parser.add_argument("--table", metavar="FILE", help="only print the table of such a file")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(Path(options.table).read_text(encoding="utf-8"))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in bases(Path(folder), options.gguf).items():
            if not options.only or name in options.only:
                rows.append(measure(name, settings, options.device, Path(folder)))
                print(line(rows[-1]), flush=True)
    if options.json:
        machine = {
            "device": options.device,
            "cpu": torch.cpu.get_capabilities().get("cpu_name"),
            "torch": torch.__version__,
        }
        found = {"machine": {**machine, "python": platform.python_version()}, "rows": [asdict(row) for row in rows]}
        Path(options.json).write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def bases(folder: Path, gguf: str | None) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name -> a function that makes the settings of its LanguageModel; some have to be made first."""
    plain = str(embedded_model())
    found: dict[str, Callable[[], dict[str, Any]]] = {
        "fp32": lambda: {"model": plain},
        "bf16": lambda: {"model": plain, "dtype": "bfloat16"},
        "nf4": lambda: {"model": plain, "quantization": "nf4"},
        "nf4, bf16": lambda: {"model": plain, "quantization": "nf4", "dtype": "bfloat16"},
        "nf4, double": lambda: {"model": plain, "quantization": "nf4", "double_quantization": True},
        "fp4": lambda: {"model": plain, "quantization": "fp4"},
        "int8": lambda: {"model": plain, "quantization": "int8"},
        "embedded (GGUF)": lambda: {"model": "embedded"},
        "saved nf4": lambda: {"model": saved(plain, folder / "saved-nf4", "nf4")},
        "saved int8": lambda: {"model": saved(plain, folder / "saved-int8", "int8")},
    }
    if gguf:
        found["GGUF file"] = lambda: {"model": gguf}
        found["GGUF file, nf4"] = lambda: {"model": gguf, "quantization": "nf4"}
    return found


def saved(model: str, folder: Path, quantization: Any) -> str:
    """A folder as others publish them: weights already quantised by bitsandbytes."""
    lm = LanguageModel(model, quantization=quantization, lora=LoRA(r=1))
    lm.load()
    lm.model.unload().save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


def measure(name: str, settings: Callable[[], dict[str, Any]], device: str, folder: Path) -> Row:
    made = settings()
    row = Row(name, ", ".join(f"{key} {value}" for key, value in made.items() if key != "model"))
    began = time.perf_counter()
    module = ProgramModule(
        Predict(SIGNATURE, instruction="Classify the iris flower."),
        LanguageModel(**made, device=device, lora=LoRA(r=8, alpha=16)),
        sampling=Sampling(max_new_tokens=NEW_TOKENS),
    )
    module.configure_model()
    row.weights_mb = sum(p.nbytes for p in module.lm.model.parameters() if not p.requires_grad) / 1e6
    out = folder / hashlib.sha256(name.encode()).hexdigest()[:8]
    steps: dict[str, Callable[[], str]] = {
        "rollouts": lambda: rollouts(module),
        "training": lambda: training(module),
        "adapter": lambda: adapter(module, made, device, out),
        "merged": lambda: merged(module, out),
        "merged, unrounded": lambda: merged(module, out, unrounded=True) if module.lm.quantization else "-",
    }
    for cell, step in steps.items():
        try:
            row.cells[cell] = step()
        except Exception as error:  # a cell that fails is what the table is for
            row.cells[cell] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    row.seconds = round(time.perf_counter() - began, 1)
    return row


def rollouts(module: ProgramModule) -> str:
    began = time.perf_counter()
    first = completions(module)
    seconds = time.perf_counter() - began
    if completions(module) != first:
        return "FAILS: other completions the second time"
    return f"ok, {sum(len(c.completion_ids) for c in first) / seconds:.1f} tokens/s"


def training(module: ProgramModule) -> str:
    """Trains after `rollouts` has generated, which is where 4-bit weights on a CPU would break."""
    lm = module.lm
    before = digest(lm)
    if faults := without_gradient(module, "lora_B"):  # A's gradient is zero as long as B is
        return f"FAILS: {len(faults)} matrices without a gradient"
    optimizer = torch.optim.AdamW([p for p in lm.model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = loss_of(module)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    completions(module)
    if faults := without_gradient(module, "lora_"):
        return f"FAILS: {len(faults)} matrices without a gradient after training"
    with torch.no_grad():
        last = loss_of(module).item()
        if digest(lm) != before:
            return "FAILS: the base's state_dict has changed"
        if loss_of(module).item() != last:
            return "FAILS: the loss changed when state_dict was asked for"
    if not last < 0.7 * losses[0]:
        return f"FAILS: the loss went from {losses[0]:.2f} to {last:.2f}"
    return f"ok, loss {losses[0]:.2f} → {last:.2f}"


def adapter(module: ProgramModule, settings: dict[str, Any], device: str, out: Path) -> str:
    export_program(module, out / "export")
    again = LanguageModel(**settings, device=device, adapter=str(out / "export" / "adapter"))
    again.load()
    if again.fingerprint() != module.lm.fingerprint():
        return "FAILS: another adapter came back"
    other = ProgramModule(module.program, again, sampling=module.sampling)
    return "ok" if completions(other) == completions(module) else "FAILS: other tokens"


def merged(module: ProgramModule, out: Path, *, unrounded: bool = False) -> str:
    from transformers import AutoModelForCausalLM

    card = write_export(out / "export", out / "merged-export", what="merged", unrounded=unrounded)
    model = AutoModelForCausalLM.from_pretrained(out / "merged-export" / "merged", dtype="auto")
    if getattr(model, "is_quantized", False) or {p.dtype for p in model.parameters()} != {module.lm.dtype}:
        return "FAILS: the merged weights are not plain"
    done = completions(module)
    same = sum(continued(model, completion) == completion.completion_ids for completion in done)
    return f"ok, {same} of {len(done)} completions equal; into {card.merged_into}"


def continued(model: Any, completion: Completion) -> tuple[int, ...]:
    prompt = torch.tensor([completion.prompt_ids])
    with torch.no_grad():
        written = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt))
    return tuple(written[0, prompt.shape[1] :].tolist())[: len(completion.completion_ids)]


def completions(module: ProgramModule) -> list[Completion]:
    return [step.completion for rollout in module.rollouts(FLOWERS, metric=None) for step in rollout.steps]


def loss_of(module: ProgramModule) -> torch.Tensor:
    """Mean negative log-likelihood of the completions' tokens."""
    given, model = batch(module), module.lm.model
    tokens = given.bearing(model.device, exact_dtype(model))
    return log_probs(model, given, tokens.ids, -tokens.ce[:, None])[1] / given.tokens


def batch(module: ProgramModule) -> Batch:
    lm, pairs = module.lm, []
    for flower in FLOWERS:
        asked = "\n".join(f"{name}: {value}" for name, value in flower.inputs.items())
        prompt = lm.encode([{"role": "user", "content": asked}])
        answer = lm.tokenizer.encode(str(flower.labels["answer"]), add_special_tokens=False)
        pairs.append(Pair(prompt, [*answer, lm.end_ids[0]]))
    return collate([pairs])


def without_gradient(module: ProgramModule, part: str) -> list[str]:
    """The adapter's matrices that one backward pass gives no gradient, or one of zeros."""
    module.lm.model.zero_grad()
    loss_of(module).backward()
    matrices = [(name, p.grad) for name, p in module.lm.model.named_parameters() if part in name]
    return [name for name, gradient in matrices if gradient is None or not bool(gradient.abs().sum() > 0)]


def digest(lm: LanguageModel) -> dict[str, str]:
    """Hash of every tensor of the base, as its state_dict gives it."""
    return {
        name: hashlib.sha256(
            tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, tensor in lm.model.state_dict().items()
        if isinstance(tensor, torch.Tensor) and "lora_" not in name
    }


def table(found: dict[str, Any]) -> str:
    """The rows as Markdown, short enough for the page."""
    head = ["base", "weights", "rollouts", "training", "adapter", "merged", "merged, unrounded"]
    lines = [[*head, "all of it on CUDA"], ["---"] * (len(head) + 1)]
    for row in found["rows"]:
        cells = [row["cells"][name].partition(";")[0].removesuffix(" completions equal") for name in head[2:]]
        cells[0] = cells[0].partition(", ")[0]  # the speed says more of the neighbours than of the format
        lines.append([row["base"], f"{row['weights_mb']:,.0f} MB", *cells, "not run"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def line(row: Row) -> str:
    cells = " | ".join(row.cells.values())
    return f"| {row.base} | {row.weights_mb:,.0f} MB | {cells} | {row.seconds:.0f} s |"


if __name__ == "__main__":
    main()
