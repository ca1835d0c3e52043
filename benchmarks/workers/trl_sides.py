"""What the workers on TRL do alike: a model whose adapter is put back, trainers that keep losses, their settings."""

from __future__ import annotations

import tempfile
from typing import Any

import peft
import torch
import transformers
import trl


def quiet_and_fast() -> dict[str, Any]:
    """Settings of a trainer that saves and reports nothing. TRL's defaults trade time for memory that nobody lacks."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="cotune-benchmark-trl-"),
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


class KeptLosses:
    """A trainer's loss of each part of a step; their sum is the step's. Stands before the trainer among the bases."""

    def training_step(self, *args: Any, **options: Any) -> Any:
        loss = super().training_step(*args, **options)  # type: ignore[misc]
        self.losses = [*getattr(self, "losses", []), float(loss)]
        return loss


class TRLSide:
    """One model, whose adapter is put back before each run."""

    def start(self, *, model: str, adapter: str, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        self.model = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)
        self.adapter = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        return {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}

    def put_back(self) -> None:
        """The adapter as it was at the start."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.adapter:
                    parameter.copy_(self.adapter[name])
