"""ExportProgram: the tuned program as a folder that others load: adapter/, prompts.json, program.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cotune.callbacks.alternate import ended
from cotune.datamodules import TraceDataModule
from cotune.inference.local.transformers_internals import commit_of
from cotune.lightning_modules import LanguageModel, ProgramModule
from cotune.lightning_modules.embedded import HUB_ID, gguf_source
from cotune.lightning_modules.model_source import EMBEDDED
from cotune.lightning_modules.quantization import quantized_as
from cotune.lightning_modules.text_lm import TextLM
from cotune.programs import prompts_to_dict
from cotune.storage.durable import as_not_written, new_folder, write_whole
from lightning.pytorch import Callback, LightningModule, Trainer

FORMAT = 2
"""Of an export, in its program.json. 1 said no number, and its first exports not what base they are of."""


class ExportProgram(Callback):
    """Writes `export/` when the fit ends; nothing if the schedule did not, or if it was a `fast_dev_run`.

    `adapter/` is what PEFT saves, of an LM with weights here; `prompts.json` maps stage names to prompts;
    `program.json` says which program, LM, template, sampling and data they belong to. `cotune export` makes a model
    card and merged weights of it.

    Args:
        folder: the run's folder; null takes the trainer's default_root_dir.
        config: the module's arguments as the command line knows them, so that `cotune predict` can build it again.
            Without them the export is loaded from Python, where the program is at hand.
    """

    def __init__(self, folder: str | None = None, config: Mapping[str, Any] | None = None) -> None:
        self.folder, self.config = folder, config

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ProgramModule)
        if trainer.is_global_zero and not trainer.fast_dev_run and ended(trainer):  # type: ignore[attr-defined]
            self.write(trainer, pl_module)

    def write(self, trainer: Trainer, module: ProgramModule) -> None:
        """Writes the export of the module as it is."""
        folder = Path(self.folder or trainer.default_root_dir) / "export"
        data = getattr(trainer, "datamodule", None)
        described = describe_data(data) if isinstance(data, TraceDataModule) else None
        export_program(module, folder, config=self.config, data=described)


def export_program(
    module: ProgramModule,
    folder: Path,
    *,
    config: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Writes the export; an older one in its place is replaced only once the new one is complete and on disk."""
    lm = module.lm
    base = describe_base(lm)
    described = {
        "format": FORMAT,
        "base_model": lm.name,
        "base": base,
        "program": f"{type(module.program).__module__}.{type(module.program).__qualname__}",
        "stages": {
            name: {"inputs": list(stage.signature.inputs), "outputs": list(stage.signature.outputs)}
            for name, stage in module.program.stages.items()
        },
        "data": dict(data) if data is not None else None,
        "model": dict(config) if config is not None else None,
    }
    with as_not_written(folder), new_folder(folder) as partial:
        if isinstance(lm, LanguageModel):
            lm.save_adapter(partial / "adapter")
            name_base(partial / "adapter", base["name"], base["revision"])
        write_whole(partial / "prompts.json", json.dumps(prompts_to_dict(module.prompts), indent=2, ensure_ascii=False))
        write_whole(partial / "program.json", json.dumps(described, indent=2, ensure_ascii=False))


def describe_base(lm: LanguageModel | TextLM) -> dict[str, Any]:
    """What the adapter was trained on; of an LM without weights here, its name and how it is asked.

    `name` is what others can load: the Hub id where there is one, else the folder on this machine. `quantization` says
    how the weights were held, e.g. "bitsandbytes nf4", "" for unquantised; `gguf` names the file they were read from.
    `identity` and `tokenizer` are hashes of the base's files and of the tokenizer's tokens: `load` compares them.
    """
    if isinstance(lm, TextLM):
        return {"name": lm.name, "asked": lm.identity}
    source = gguf_source(lm.source)
    here = Path(lm.source).expanduser().is_dir()
    on_hub = HUB_ID if lm.name == EMBEDDED else None if here else lm.name
    return {
        "model": lm.name,
        "name": on_hub or str(Path(lm.source).expanduser().resolve()),
        "on_hub": on_hub is not None,
        "revision": None if here else commit_of(lm.config),
        "gguf_file": lm.gguf_file,
        "gguf": source.get("file", ""),
        "quantization": quantized_as(lm.model.config),
        "by_run": {"quantization": lm.quantization, "double_quantization": lm.double_quantization},
        "dtype": str(lm.dtype).removeprefix("torch."),
        "identity": lm.base_identity(),
        "tokenizer": lm.encode.vocabulary(lm.name).tokenizer,
    }


def describe_data(data: TraceDataModule) -> dict[str, Any]:
    """Which data the scores are of: the class, the metric, the sizes of the four sets."""
    metric = data.metric
    return {
        "class": f"{type(data).__module__}.{type(data).__qualname__}",
        "metric": getattr(metric, "__name__", type(metric).__name__),
        "sizes": {name: len(getattr(data.splits, name)) for name in ("train", "dev", "val", "test")},
    }


def name_base(adapter: Path, name: str, revision: str | None = None) -> None:
    """Makes PEFT's files fit to be handed on: the base by a name others have, and no model card full of blanks."""
    (adapter / "README.md").unlink(missing_ok=True)
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": name, "revision": revision}
    if isinstance(config.get("target_modules"), list):  # PEFT writes a set, in another order each time
        config["target_modules"] = sorted(config["target_modules"])
    write_whole(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    for weights in adapter.glob("*.safetensors"):
        weights.chmod(0o644)  # safetensors writes 0600, and an export is made to be shared
