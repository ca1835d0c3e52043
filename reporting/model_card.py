"""The model card of an export: README.md with the front matter that the Hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cotune.programs.calibration import shown
from cotune.reporting.run_record import rates_in_words
from cotune.storage.schedule_text import VANILLA, steps_of
from cotune.storage.served_adapter import max_lora_rank, vllm_refusals

_TAGS = ["cotune", "prompt-optimization", "better-together", "arxiv:2407.10930"]


@dataclass(frozen=True)
class Card:
    """What a card is made of.

    Attributes:
        name: of the program, the run's name where there is one.
        described: program.json.
        adapter: adapter_config.json; {} where the export has no adapter.
        prompts: prompts.json.
        summary: summary.json of the run; {} where there is none.
        merged_into: what the adapter was merged into, in words; "" where nothing was merged.
        license: as the Hub abbreviates it; "" leaves it to the base model's.
    """

    name: str
    described: Mapping[str, Any]
    adapter: Mapping[str, Any]
    prompts: Mapping[str, Any]
    summary: Mapping[str, Any]
    merged_into: str = ""
    license: str = ""

    def text(self) -> str:
        from huggingface_hub import ModelCard, ModelCardData

        base = {"name": self.described.get("base_model"), **(self.described.get("base") or {})}
        data = ModelCardData(
            base_model=base["name"] if base.get("on_hub") else None,
            library_name="peft" if self.adapter else "transformers",
            license=self.license or None,
            pipeline_tag="text-generation",
            tags=[*_TAGS[:1], *(["lora"] if self.adapter else []), *_TAGS[1:]],
        )
        parts = [*(["a LoRA adapter"] if self.adapter else []), *(["merged weights"] if self.merged_into else [])]
        best = str(self.summary.get("best") or "")
        what, first = " and ".join(parts), next(iter(self.described["stages"].values()))
        card = ModelCard.from_template(
            data,
            template_path=str(Path(__file__).parent / "templates" / "model_card.md"),
            name=self.name,
            slug=_slug(self.name),
            what=what[0].upper() + what[1:],
            program=self.described["program"],
            stages=self.described["stages"],
            inputs=", ".join(f'{name}="…"' for name in first["inputs"]),
            scores=self.summary.get("scores"),
            best=best,
            tested=self.summary.get("test_score"),
            sizes=(self.described.get("data") or {}).get("sizes") or {},
            base=base,
            bitsandbytes=_bitsandbytes(base),
            merged_into=self.merged_into,
            license=self.license,
            settings=self._settings(),
            prompts={stage: {"demos": [], **prompt} for stage, prompt in self.prompts.items()},
            shown=shown,
            calibrated=any(prompt.get("calibration") for prompt in self.prompts.values()),
            untrained=bool(best) and set(steps_of(best)) <= {"p", VANILLA},
            demos=sum(len(prompt.get("demos") or ()) for prompt in self.prompts.values()),
            adapter=self.adapter,
            served=serve_commands(_slug(self.name), base["name"], self),
            refused=vllm_refusals(self.adapter),
            cell=lambda text: text.replace("|", "\\|").replace("\n", " "),
            fenced=_fenced,
        )
        return f"{card}\n"

    def _settings(self) -> list[tuple[str, str]]:
        data, model = self.described.get("data") or {}, self.described.get("model") or {}
        rows = [
            ("schedule", self.summary.get("schedule")),
            ("data", data.get("class")),
            ("metric", data.get("metric")),
            ("examples", ", ".join(f"{name} {n}" for name, n in (data.get("sizes") or {}).items())),
            ("LoRA", self._lora()),
            ("optimiser", _optimizer(model.get("optimizer"))),
            ("learning rate", rates_in_words(self.summary.get("learning_rates"))),
            ("sampling", _settings_line(model.get("sampling"))),
            ("seed", self.summary.get("seed")),
            ("LM calls", self.summary.get("lm_calls")),
            ("seconds", (self.summary.get("seconds") or {}).get("total")),
            ("versions", _settings_line(self.summary.get("versions"))),
        ]
        return [(name, str(value)) for name, value in rows if value not in (None, "")]

    def _lora(self) -> str:
        a = self.adapter
        if not a:
            return ""
        kind = "rank-stabilised, " if a.get("use_rslora") else ""
        named = [a["target_modules"]] if isinstance(a["target_modules"], str) else a["target_modules"]
        named = [*named, *(a.get("target_parameters") or [])]
        targets = ", ".join(sorted({name.rpartition(".")[2] for name in named}))  # some runs name every layer
        ranks = sorted({a["r"], *(a.get("rank_pattern") or {}).values()})
        rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        whole = f"; trained whole: {', '.join(a['modules_to_save'])}" if a.get("modules_to_save") else ""
        return f"{kind}r {rank}, alpha {a['lora_alpha']}, on {targets}{whole}"


def _bitsandbytes(base: Mapping[str, Any]) -> str:
    """Arguments of the BitsAndBytesConfig into which the run itself rounded the base; "" where it took it as it is."""
    by_run = base.get("by_run") or {}
    kind = by_run.get("quantization")
    if not kind:
        return ""
    double, dtype = bool(by_run.get("double_quantization")), base.get("dtype", "float32")
    four = f'load_in_4bit=True, bnb_4bit_quant_type="{kind}", bnb_4bit_use_double_quant={double}'
    return "load_in_8bit=True" if kind == "int8" else f'{four}, bnb_4bit_compute_dtype="{dtype}"'


def serve_commands(folder: str, base: str, card: Card) -> list[str]:
    """How vLLM serves what is in the folder."""
    commands = []
    if card.adapter and not vllm_refusals(card.adapter):
        rank, name = max_lora_rank(card.adapter), _slug(card.name)
        commands.append(
            f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={folder}/adapter"
        )
    if card.merged_into:
        commands.append(f"vllm serve {folder}/merged")
    return commands or ["# merge the adapter first: cotune export … --what merged"]


def read_summary_beside(export: Path) -> dict[str, Any]:
    """summary.json of the run that an export stands in; {} where it stands alone."""
    path = export.parent / "summary.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _optimizer(chosen: Mapping[str, Any] | None) -> str:
    if not chosen:
        return ""
    settings = chosen.get("init_args") or {}
    name = str(chosen.get("class_path", "")).rpartition(".")[2]
    # A rate of 0 stands for the one that fits the LM's size.
    return f"{name}, {_settings_line({k: settings[k] for k in ('lr', 'weight_decay') if settings.get(k)})}"


def _settings_line(settings: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (settings or {}).items())


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:  # an instruction may hold a block of its own
        fence += "`"
    return f"{fence}\n{text}\n{fence}"


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
