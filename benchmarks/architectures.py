"""Every causal LM that transformers has, as a tiny random model: what cotune writes and learns against what plain
transformers does.

    python benchmarks/architectures.py                       # all of them, about half an hour on one core
    python benchmarks/architectures.py llama mamba           # some
    python benchmarks/architectures.py --part 1/4            # a quarter, to run in parts
    python benchmarks/architectures.py --write docs/models-and-quantization.md   # the table, of all results kept

A model counts as equal only where all greedy completions are those of `model.generate` and all losses those of plain
forward passes, one row at a time: on prompts that share much and little, longer and shorter than its windows. Exit code
1 if one is unequal.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name for it)
import transformers
from cotune.datamodules.collate import Pair, collate
from cotune.inference import Codec, Prompted
from cotune.inference.local.decoder import Decoder
from cotune.inference.local.merged_copy import MergedCopy
from cotune.lightning_modules import LoRA, ModelNotFoundError
from cotune.lightning_modules.findings import findings
from cotune.lightning_modules.foreign import check_config
from cotune.lightning_modules.lora import attach
from cotune.lightning_modules.probe import features, small_copy
from cotune.lightning_modules.training.loss import log_probs
from cotune.programs import Sampling
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

KEPT = Path(__file__).parent / "results" / "architectures.json"
HEAD = "| architecture | models as tiny ones | prompts | training rows |"
NEW_TOKENS = 12
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
MORE: dict[str, dict[str, Any]] = {
    "bert": {"is_decoder": True},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 8},
    "hunyuan_v1_dense": {**_ROPE, "head_dim": 64},
    "hunyuan_v1_moe": {**_ROPE, "head_dim": 64},
    "kolibri1": {"vocab_size": 512},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "mamba2": {
        "hidden_size": 64,
        "num_heads": 4,
        "head_dim": 32,
        "n_groups": 1,
        "state_size": 16,
        "vocab_size": 512,
    },
    "ministral": {**_ROPE, "head_dim": 64},
    "rwkv": {"hidden_size": 64, "vocab_size": 512, "attention_hidden_size": 64},
    "xmod": {"is_decoder": True, "default_language": "en_XX", "languages": ["en_XX"]},
    "phi3": {
        "max_position_embeddings": 16384,
        "rope_parameters": {
            "rope_type": "longrope",
            "short_factor": [1.0] * 48,
            "long_factor": [4.0] * 48,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 4096,
        },
    },
    "qwen2": {"use_sliding_window": True, "max_window_layers": 16},
}
"""Options beyond a config's defaults, where those do not show what the family can, or give no model of a tiny size."""


@dataclass(frozen=True)
class Result:
    """What came of one architecture: `outcome` is "equal", "refused", "unequal" or "not built"."""

    name: str
    outcome: str
    said: str = ""
    prompts: str = ""
    rows: str = ""
    seconds: float = 0.0


def tried(name: str) -> Result:
    """One architecture."""
    began = time.perf_counter()
    try:
        config = CONFIG_MAPPING[name](**MORE.get(name, {}))
        check_config(name, config, trust=False)
    except ModelNotFoundError as refusal:
        return Result(name, "refused", str(refusal).partition(" is ")[2].partition(",")[0])
    except Exception as error:
        return Result(name, "not built", _line(error))
    try:
        model = small_copy(config, AutoModelForCausalLM.from_config, features(config))
    except Exception as error:
        return Result(name, "not built", _line(error))
    try:
        result = _compared(name, model)
    except (ModelNotFoundError, ValueError) as refusal:
        result = Result(name, "refused", _line(refusal))
    except Exception as error:
        result = Result(name, "unequal", _line(error))
    return Result(**{**asdict(result), "seconds": round(time.perf_counter() - began, 1)})


def _compared(name: str, base: Any) -> Result:
    found = findings(base)
    if found.wrong:
        return Result(name, "refused", found.wrong)
    model = attach(base.requires_grad_(False), LoRA(r=4, alpha=8), seed=0)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    prefix = _ids(40, 0)
    prompts = [prefix + _ids(9, 1), prefix + _ids(3, 2), prefix + _ids(20, 3), _ids(6, 4), _ids(60, 5)]
    unequal = [*_generation(model.eval(), prompts), *_training(model, prompts)]
    told = {part: _told(way) for part, way in (("prompts", found.decodes), ("rows", found.packs))}
    if found.packs != found.pads and told["rows"] != "together":
        told["rows"] = told["rows"].replace("alone", "padded")
    return Result(name, "unequal" if unequal else "equal", "; ".join(unequal), **told)


def _told(way: Any) -> str:
    return "alone" if way.why else "together" if way.up_to is None else "together, long ones alone"


def _generation(model: Any, prompts: Sequence[Sequence[int]]) -> list[str]:
    codec = Codec(None, end_ids=[1 << 30], encode=lambda text: [], decode=str)  # no token ends a text
    fits = findings(model).decodes.fits
    decoder = Decoder(model, codec=codec, window=1 << 20, cache_tokens=8192, together=fits)
    with MergedCopy().swapped(model):
        ours = [
            r.ids for r in decoder.generate([Prompted(ids) for ids in prompts], Sampling(max_new_tokens=NEW_TOKENS))
        ]
    differing = [i for i, ids in enumerate(prompts) if ours[i] != _theirs(model, ids)]
    return [f"completions differ for {len(differing)} of {len(prompts)} prompts"] if differing else []


def _theirs(model: Any, ids: Sequence[int]) -> list[int]:
    base = model.get_base_model()
    fresh_rotary(base)
    given = torch.tensor([list(ids)])
    base.generation_config = transformers.GenerationConfig(pad_token_id=0)
    out = base.generate(
        input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    fresh_rotary(base)
    written: list[int] = out[0, len(ids) :].tolist()
    return written


def fresh_rotary(base: Any) -> None:
    """Dynamic rotary embeddings keep the factors of the longest text so far; each text is to find them as new."""
    for module in base.modules():
        if hasattr(module, "original_inv_freq") and hasattr(module, "original_max_seq_len"):
            module.inv_freq, module.max_seq_len_cached = module.original_inv_freq.clone(), module.original_max_seq_len


def _training(model: Any, prompts: Sequence[Sequence[int]]) -> list[str]:
    pairs = [Pair(ids, _ids(5, 10 + i)) for i, ids in enumerate(prompts)]
    batch = collate([pairs[:3], pairs[3:]])
    tokens = batch.bearing(model.device, torch.float32)
    ours = tokens.by_row(-log_probs(model, batch, tokens.ids)[0][:, 0])
    theirs = torch.stack([_plain_loss(model, pair) for pair in pairs])
    apart = float(((ours - theirs).abs() / theirs.abs().clamp(min=1e-6)).max())
    return [f"losses differ by up to {apart:.1%}"] if apart > 1e-3 else []


def _plain_loss(model: Any, pair: Pair) -> torch.Tensor:
    base = model.get_base_model()
    fresh_rotary(base)
    text = torch.tensor([*pair.prompt_ids, *pair.completion_ids])
    with torch.no_grad():
        logits = base(input_ids=text[None], use_cache=False).logits[0, len(pair.prompt_ids) - 1 : -1].float()
    fresh_rotary(base)
    return F.cross_entropy(logits, text[len(pair.prompt_ids) :], reduction="sum")


def _ids(count: int, seed: int) -> list[int]:
    drawn: list[int] = torch.randint(3, 96, (count,), generator=torch.Generator().manual_seed(100 + seed)).tolist()
    return drawn


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def table(results: Sequence[Result]) -> str:
    """The results in Markdown."""
    lines = [HEAD, "|---|---|---|---|"]
    for one in sorted(results, key=lambda one: one.name):
        said = one.outcome + (f": {one.said.replace('|', '/')}" if one.said else "")
        lines.append(f"| {one.name} | {said} | {one.prompts or '-'} | {one.rows or '-'} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types; all of them without")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="the I-th of N parts of the list")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table of all kept results into a document")
    options = parser.parse_args(words)
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}
    if not options.write:
        transformers.logging.set_verbosity_error()
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        part, parts = map(int, options.part.split("/"))
        for name in options.names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)[part - 1 :: parts]:
            result = tried(name)
            print(f"{result.name}: {result.outcome} {result.said} [{result.prompts}; {result.rows}] {result.seconds} s")
            sys.stdout.flush()
            kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}  # other parts write, too
            kept[name] = asdict(result)
            KEPT.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n", encoding="utf-8")
    results = [Result(**one) for one in kept.values()]
    if options.write:
        text = options.write.read_text(encoding="utf-8")
        before, _, rest = text.partition(HEAD)
        after = rest.partition("\n\n")[2]
        options.write.write_text(f"{before}{table(results)}\n\n{after}", encoding="utf-8")
    return int(any(one.outcome == "unequal" for one in results))


if __name__ == "__main__":
    sys.exit(main())
