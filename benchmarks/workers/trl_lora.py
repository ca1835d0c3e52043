"""TRL's side of the alternation: one LoRA by `SFTTrainer`, merged into a folder. Runs in the environment "trl"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.workers.protocol import serve


def start() -> dict[str, Any]:
    """Imports the libraries, which takes a good part of a short training."""
    import peft
    import trl

    return {"versions": {"trl": trl.__version__, "peft": peft.__version__}}


def train(
    *,
    model: str,
    chats: Sequence[dict[str, Any]],
    out: str,
    steps: int,
    batch_size: int,
    rank: int,
    alpha: int,
    rate: float,
    threads: int,
    device: str,
    rows_at_once: int | None = None,
) -> dict[str, Any]:
    """Trains on the completions alone for that many optimiser steps, merges, and writes the model to `out`."""
    import torch
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.workers.trl_sides import quiet_and_fast

    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(model)
    pairs = [{"prompt": chat["messages"][:-1], "completion": chat["messages"][-1:]} for chat in chats]
    settings = trl.SFTConfig(
        max_steps=steps,
        per_device_train_batch_size=rows_at_once or batch_size,
        gradient_accumulation_steps=batch_size // (rows_at_once or batch_size),
        learning_rate=rate,
        lr_scheduler_type="constant",
        completion_only_loss=True,
        packing=False,
        **(quiet_and_fast() | {"use_cpu": device == "cpu"}),
    )
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    done = trainer.train()
    trainer.model.merge_and_unload().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {"steps": done.global_step, "loss": done.training_loss, "pairs": len(pairs)}


if __name__ == "__main__":
    serve({"start": start, "train": train})
