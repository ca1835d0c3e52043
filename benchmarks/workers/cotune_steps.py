"""cotune's training steps as a fit takes them: Lightning's loop, `ProgramModule`, clipping, AdamW."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from typing import Any

import lightning
import torch
from cotune.datamodules import Batch, Pair, Splits, TraceDataModule, collate
from cotune.datamodules.splits import Sizes
from cotune.lightning_modules import LanguageModel, LearningRate, ProgramModule
from cotune.programs import Predict
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from benchmarks.workers.protocol import serve


class Given(TraceDataModule):
    """These batches in their order."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        super().__init__(sizes=Sizes(1, 0, 0, 0))
        self.batches = batches

    def load(self) -> Splits:
        return Splits((), (), (), ())

    def train_dataloader(self) -> Any:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]


class Clock(Callback):
    """Seconds and loss of each step, everything between two batches included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)
        self.losses.append(float(outputs["loss"]))


class Side:
    """One model, whose adapter is put back before each run."""

    def start(self, *, model: str, adapter: str, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        self.lm = LanguageModel(model, adapter=adapter, device="cpu")
        self.lm.load(seed=0)
        self.adapter = self.lm.adapter_state()
        return {"lightning": lightning.__version__, "torch": torch.__version__}

    def run(self, *, batches: Sequence[Sequence[Sequence[list[int]]]], rate: float) -> dict[str, Any]:
        """Steps on batches of (prompt ids, completion ids) rows, each batch at once."""
        self.lm.load_adapter_state(self.adapter)
        module = ProgramModule(
            Predict("question -> answer"),
            self.lm,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0),
            learning_rate=LearningRate(warmup=0, decay="constant"),
        )
        data = Given([collate([[Pair(*row) for row in rows]]) for rows in batches])
        clock = Clock()
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            gradient_clip_val=1.0,
            callbacks=[clock],
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tempfile.mkdtemp(prefix="cotune-benchmark-"),
        )
        trainer.fit(module, datamodule=data)
        return {"seconds": clock.seconds, "losses": clock.losses}


if __name__ == "__main__":
    side = Side()
    serve({"start": side.start, "run": side.run})
