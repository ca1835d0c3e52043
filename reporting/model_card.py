"""The model card of an export: README.md with the front matter that the Hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PAPER = "https://arxiv.org/abs/2407.10930"
_TAGS = ["cotune", "lora", "prompt-optimization", "better-together", "arxiv:2407.10930"]
_MERGED_TAGS = ["cotune", "prompt-optimization", "better-together", "arxiv:2407.10930"]
# vLLM takes these values of --max-lora-rank; its default is 16.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


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
        parts = [
            f"---\n{self._front_matter()}\n---\n\n# {self.name}",
            self._introduction(),
            "## Scores\n\n" + self._scores(),
            "## Base model\n\n" + self._base(),
            "## Settings\n\n" + _table(("setting", "value"), self._settings()),
            "## Prompts\n\n" + self._prompts(),
            "## How to load it\n\n" + "\n\n".join(self._loading()),
        ]
        return "\n\n".join(parts) + "\n"

    def _front_matter(self) -> str:
        from huggingface_hub import ModelCardData

        base = self.described.get("base") or {}
        data = ModelCardData(
            base_model=base.get("name") if base.get("on_hub") else None,
            library_name="peft" if self.adapter else "transformers",
            license=self.license or None,
            pipeline_tag="text-generation",
            tags=_TAGS if self.adapter else _MERGED_TAGS,
        )
        return str(data.to_yaml())

    def _introduction(self) -> str:
        stages = self.described["stages"]
        shapes = "\n".join(
            f"- `{name}`: {', '.join(stage['inputs'])} → {', '.join(stage['outputs'])}"
            for name, stage in stages.items()
        )
        what = " and ".join(
            [*(["a LoRA adapter"] if self.adapter else []), *(["merged weights"] if self.merged_into else [])]
        )
        return (
            f"{what[0].upper() + what[1:]} for a language-model program of {len(stages)} "
            f"stage{'s' if len(stages) > 1 else ''}, tuned by cotune: prompts and weights by turns "
            f"([BetterTogether]({_PAPER})). The weights go with the prompts in `prompts.json`; with other prompts the "
            f"scores below do not hold.\n\nStages of `{self.described['program']}`:\n\n{shapes}"
        )

    def _scores(self) -> str:
        scores = self.summary.get("scores")
        if not scores:
            return "Not known: the export was made without its run's `summary.json`."
        sizes = (self.described.get("data") or {}).get("sizes") or {}
        best, tested = self.summary.get("best"), self.summary.get("test_score")
        rows = [
            (
                f"{prefix}{' (exported)' if prefix == best else ''}",
                f"{score:.3f}",
                str(sizes.get("val", "not recorded")),
            )
            for prefix, score in scores.items()
        ]
        table = _table(("after", "score on val", "n"), rows)
        told = (
            f"On the test set, used once and at the end: **{tested:.3f}** (n = {sizes.get('test', 'not recorded')})."
            if tested is not None
            else "The test set has not been used."
        )
        return f"{table}\n\n{told} {self._caution(sizes.get('test') if tested is not None else sizes.get('val'))}"

    def _caution(self, n: int | None) -> str:
        chosen = "The exported prefix was chosen by its score on val, which is therefore a little too high."
        return chosen + (f" With n = {n}, one example is {1 / n:.3f}." if n else "")

    def _base(self) -> str:
        base = self.described.get("base") or {}
        name = base.get("name", self.described["base_model"])
        shown = f"[{name}](https://huggingface.co/{name})" if base.get("on_hub") else f"`{name}`"
        held = base.get("quantization") or "not quantised"
        lines = [
            f"- Base: {shown}" + (f", revision `{base['revision']}`" if base.get("revision") else ""),
            f"- While tuning its weights were {held}; computation in {base.get('dtype', 'an unrecorded type')}.",
        ]
        if base.get("gguf"):
            lines.append(
                f"- They were read from `{base['gguf']}`, a rounded copy, and unpacked. Beside the unrounded base the "
                "adapter can write other tokens."
            )
        if self.merged_into:
            lines.append(f"- `merged/` is the adapter added to {self.merged_into}.{self._rounding(base)}")
        licence = f"`{self.license}`" if self.license else "that of the base model; check it there"
        return "\n".join([*lines, f"- Licence: {licence}. The training data may have conditions of its own."])

    def _rounding(self, base: Mapping[str, Any]) -> str:
        if not base.get("quantization"):
            return ""
        if "bitsandbytes" in self.merged_into:
            return " So the base is rounded as it was while tuning."
        return (
            " The adapter was trained beside rounded weights, so this model can write other tokens than in the run: "
            "score it before you rely on the table above. Without `--unrounded` the rounding is kept."
        )

    def _settings(self) -> list[tuple[str, str]]:
        data, model = self.described.get("data") or {}, self.described.get("model") or {}
        rows = [
            ("schedule", self.summary.get("schedule")),
            ("data", data.get("class")),
            ("metric", data.get("metric")),
            ("examples", ", ".join(f"{name} {n}" for name, n in (data.get("sizes") or {}).items())),
            ("LoRA", self._lora()),
            ("optimiser", _optimizer(model.get("optimizer"))),
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

    def _prompts(self) -> str:
        lines = []
        for stage, prompt in self.prompts.items():
            demos = len(prompt.get("demos") or [])
            lines.append(
                f"`{stage}`, with {demos} demo{'' if demos == 1 else 's'}:\n\n{_fenced(prompt['instruction'])}"
            )
        total = sum(len(prompt.get("demos") or []) for prompt in self.prompts.values())
        if total:
            lines.append(f"The demos in `prompts.json` are {total} examples of the training data, word for word.")
        return "\n\n".join(lines)

    def _loading(self) -> list[str]:
        base = (self.described.get("base") or {}).get("name", self.described["base_model"])
        parts = [
            f"The folder as it stands (from the Hub: `hf download REPO --local-dir {_slug(self.name)}`). "
            "cotune runs the whole program, prompts included; the others give you the LM alone."
        ]
        if self.adapter:
            parts += ["cotune:\n\n" + _fenced(_COTUNE % (_slug(self.name), self._inputs()), "python")]
            parts += ["PEFT:\n\n" + _fenced(self._peft(base), "python")]
        if self.merged_into:
            parts += ["transformers:\n\n" + _fenced(_TRANSFORMERS % {"folder": _slug(self.name)}, "python")]
        parts.append("vLLM:\n\n" + _fenced("\n".join(serve_commands(_slug(self.name), base, self)), "bash"))
        if self.adapter and self._by_run():
            parts.append(
                "vLLM holds the base unquantised there, beside which the adapter can write other tokens than in the "
                "run; merged weights (`cotune export --what merged`) do not have that trouble."
            )
        refused = vllm_refusals(self.adapter)
        return [*parts, *(f"vLLM does not take this adapter: {why}." for why in refused)]

    def _peft(self, base: str) -> str:
        kind, double = self._by_run(), (self.described.get("base") or {}).get("by_run", {}).get("double_quantization")
        if not kind:
            return _PEFT % {"base": base, "folder": _slug(self.name), "more": "", "imports": ""}
        dtype = (self.described.get("base") or {}).get("dtype", "float32")
        four = f'load_in_4bit=True, bnb_4bit_quant_type="{kind}", bnb_4bit_use_double_quant={bool(double)}, '
        held = "load_in_8bit=True" if kind == "int8" else f'{four}bnb_4bit_compute_dtype="{dtype}"'
        more = f", quantization_config=BitsAndBytesConfig({held})"
        return _PEFT % {"base": base, "folder": _slug(self.name), "more": more, "imports": ", BitsAndBytesConfig"}

    def _by_run(self) -> str:
        """The format into which the run itself rounded the base; "" where it took the base as it is."""
        return (self.described.get("base") or {}).get("by_run", {}).get("quantization") or ""

    def _inputs(self) -> str:
        first = next(iter(self.described["stages"].values()))
        return ", ".join(f'{name}="…"' for name in first["inputs"])


_COTUNE = """\
import cotune

tuned = cotune.load("%s")
tuned(%s)"""

_PEFT = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM%(imports)s

base = AutoModelForCausalLM.from_pretrained("%(base)s", dtype="auto"%(more)s)
model = PeftModel.from_pretrained(base, "%(folder)s/adapter")"""

_TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("%(folder)s/merged", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("%(folder)s/merged")"""


def serve_commands(folder: str, base: str, card: Card) -> list[str]:
    """How vLLM serves what is in the folder."""
    commands = []
    if card.adapter and not vllm_refusals(card.adapter):
        rank = next(r for r in _VLLM_RANKS if r >= _highest_rank(card.adapter))
        name = _slug(card.name)
        commands.append(
            f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={folder}/adapter"
        )
    if card.merged_into:
        commands.append(f"vllm serve {folder}/merged")
    return commands or ["# merge the adapter first: cotune export … --what merged"]


def vllm_refusals(adapter: Mapping[str, Any]) -> list[str]:
    """Why vLLM would refuse an adapter_config.json; [] where it takes it (as of vLLM 0.27)."""
    rank = _highest_rank(adapter)
    found = {
        "it is a DoRA": adapter.get("use_dora"),
        f"it trains whole modules ({', '.join(adapter.get('modules_to_save') or [])})": adapter.get("modules_to_save"),
        "it trains biases": adapter.get("bias", "none") != "none",
        f"its rank {rank} is above {_VLLM_RANKS[-1]}": rank > _VLLM_RANKS[-1],
    }
    return [why for why, true in found.items() if true]


def _highest_rank(adapter: Mapping[str, Any]) -> int:
    ranks: list[int] = [adapter.get("r", 0), *(adapter.get("rank_pattern") or {}).values()]
    return max(ranks)


def read_summary_beside(export: Path) -> dict[str, Any]:
    """summary.json of the run that an export stands in; {} where it stands alone."""
    path = export.parent / "summary.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _optimizer(chosen: Mapping[str, Any] | None) -> str:
    if not chosen:
        return ""
    settings = chosen.get("init_args") or {}
    name = str(chosen.get("class_path", "")).rpartition(".")[2]
    return f"{name}, {_settings_line({k: settings[k] for k in ('lr', 'weight_decay') if k in settings})}"


def _settings_line(settings: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (settings or {}).items())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _fenced(text: str, language: str = "") -> str:
    fence = "```"
    while fence in text:  # an instruction may hold a block of its own
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
