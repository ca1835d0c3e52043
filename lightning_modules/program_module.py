"""ProgramModule: a program, its prompts and its LM as a LightningModule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cotune.datamodules import Batch, PairMaker, Trace, TraceDataModule, Vocabulary
from cotune.errors import BadValueError
from cotune.inference.engine import Engine
from cotune.inference.local.engine import evaluating
from cotune.lightning_modules.language_model import LanguageModel
from cotune.lightning_modules.learning_rate import LearningRate, made_optimizer
from cotune.lightning_modules.lightning_internals import give_all_rows
from cotune.lightning_modules.objectives import Objective, Rejection
from cotune.lightning_modules.objectives.objective import Reference
from cotune.lightning_modules.quantization import refuse_plugin
from cotune.lightning_modules.text_lm import NoWeightsError, TextLM, no_weights
from cotune.lightning_modules.torch_ranks import TorchRanks
from cotune.lightning_modules.training.calibrated_teacher import with_offsets
from cotune.lightning_modules.training.fused import fuse_adapter
from cotune.lightning_modules.training.gradients import BatchGradients, is_finite, known_gradients
from cotune.lightning_modules.training.packing import checkpoint_layers
from cotune.lightning_modules.training.reference import with_reference
from cotune.lightning_modules.training.skips import SkipLimits, Skips
from cotune.programs import (
    LM,
    BudgetedLM,
    Example,
    Form,
    Ledger,
    Metric,
    Program,
    Prompts,
    ReasonThenFill,
    Rollout,
    Runner,
    Sampling,
    Vote,
    mean_score,
    prompts_from_dict,
    prompts_to_dict,
    settled,
)
from cotune.programs.faults import check_errors
from cotune.programs.forms import in_form
from cotune.programs.ranks import Ranks
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


class ProgramModule(LightningModule):
    """Trains the LM on the program's own steps; validates by running the program.

    A training step computes loss and gradients itself, in parts if memory requires it, and hands Lightning a loss
    whose gradients are known. So precision, clipping, accumulation and hooks work as usual. Accumulated batches
    (`Trainer(accumulate_grad_batches=...)`) are weighted by tokens: the gradient is the mean over all tokens. A step
    whose loss or gradients are not finite is skipped, and changes neither weights nor the optimiser's state.

    Args:
        program: what to tune.
        lm: the shared LM: a `LanguageModel`, or another, such as an endpoint. Only the prompts of the latter can be
            tuned, not its weights.
        form: how stages ask and answer. Default: reasoning first, then each output after its name.
        sampling: how the program's completions are drawn, in prompt steps, validation and test.
        optimizer: for the adapter's parameters. A learning rate of 0 means one that fits the LM's size: 5e-4 up to
            135M parameters, 5e-5 from 0.5B on; objectives may scale it (`Objective.rate`).
        learning_rate: its schedule within a weight step.
        seed: of the adapter's initial values and of every draw while running the program.
        max_error_rate: share of examples on which the program or the metric may raise before the run stops.
        micro_batch_size: rows of a batch computed at once; fewer take less memory and give the same step. Null: all.
            It is halved automatically if memory runs out.
        gradient_slices: parts of a batch whose gradients are added in a fixed order, in any number of processes: 8 give
            the same bits with 1, 2, 4 and 8 processes, and take 8 passes. Null: one per process.
        gradient_checkpointing: compute each layer twice instead of keeping what it computed: less memory, about a
            third more time.
        skip_limits: how many steps that are not finite may be skipped before the run stops.
        engine: what completes the LM's prompts. Default: the decoder in this process (`LocalEngine`).
    """

    def __init__(
        self,
        program: Program,
        lm: LM,
        form: Form | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0),
        learning_rate: LearningRate = LearningRate(),  # noqa: B008 (frozen)
        seed: int = 0,
        max_error_rate: float = 0.5,
        micro_batch_size: int | None = None,
        gradient_slices: int | None = None,
        gradient_checkpointing: bool = False,
        skip_limits: SkipLimits = SkipLimits(),  # noqa: B008 (frozen)
        engine: Engine | None = None,
    ) -> None:
        super().__init__()
        self.program, self.sampling = program, sampling
        self.lm: LanguageModel | TextLM = lm if isinstance(lm, LanguageModel | TextLM) else TextLM(lm)
        if engine is not None:
            self.weights.use(engine)
        self.ledger = Ledger()
        self._bounded: BudgetedLM | None = None
        self.form: Form = form or ReasonThenFill()
        self.optimizer, self.learning_rate = optimizer, learning_rate
        self.seed, self.max_error_rate = seed, max_error_rate
        self.prompts: Prompts = program.initial_prompts()
        self.optimiser_step = 0  # optimiser steps taken in this weight step, and how many it will take
        self.optimiser_steps = 1
        self.full_rate: float | None = None  # of this weight step; None: the optimiser's own
        self.evaluated: list[Rollout] = []
        self._run: list[Rollout] = []  # each run of an example, where `evaluated` has what they come to
        self.gradient_checkpointing = gradient_checkpointing
        self.skips = Skips(skip_limits)
        self._gradients = BatchGradients(micro_batch_size, gradient_slices)
        self.ranks = Ranks()
        self.objective: Objective = Rejection()
        self._precision: Any = None  # the trainer's
        self._size = 0.0  # what the batch at hand counts as, and
        self._accumulated = 0.0  # what the gradients are the mean over so far: tokens, for most objectives
        # Checkpoints hold the adapter alone: the base never changes, and is checked by what is missing on load.
        self.strict_loading = False

    def setup(self, stage: str) -> None:
        refuse_plugin(self.trainer)
        if self.trainer.world_size > self.ranks.count:
            self.ranks = self._gradients.ranks = TorchRanks(
                (self.ledger, *([self.lm] if isinstance(self.lm, LanguageModel) else []))
            )
        give_all_rows(self.trainer)
        self._precision = self.trainer.precision_plugin

    def configure_model(self) -> None:
        if isinstance(self.lm, TextLM):
            return
        self.lm.load(seed=self.seed)
        fuse_adapter(self.lm.model)
        if self.gradient_checkpointing:
            checkpoint_layers(self.lm.model)

    def meter(self, ledger: Ledger, completions: str | Path | None = None) -> None:
        """Charges the LM's calls to a ledger. One without weights keeps its answers in the file, if one is given."""
        self.ledger = ledger
        if isinstance(self.lm, TextLM):
            self.lm.meter(ledger, completions)
        else:
            self._bounded = BudgetedLM(self.lm, ledger)

    @property
    def asked(self) -> LM:
        """The LM as it is to be asked: within the budget."""
        return self._bounded or self.lm

    @property
    def weights(self) -> LanguageModel:
        """The LM with its weights.

        Raises:
            NoWeightsError: it has none here.
        """
        if isinstance(self.lm, TextLM):
            raise NoWeightsError(no_weights(self.lm.name))
        return self.lm

    def rollouts(
        self,
        examples: Sequence[Example],
        *,
        metric: Metric | None,
        prompts: Prompts | None = None,
        progress: Callable[[int], None] | None = None,
        samples: int = 1,
        vote: Vote = "mean",
    ) -> list[Rollout]:
        """Runs the program as it stands (current weights; current prompts unless others are given).

        Args:
            samples, vote: runs of each example, and how they become one (see `settled`).
        """
        given, runner = self.prompts if prompts is None else prompts, self.runner(metric)
        return settled(self._passes(runner, examples, given, samples, progress), vote)

    def _passes(
        self,
        runner: Runner,
        examples: Sequence[Example],
        prompts: Prompts,
        samples: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Rollout]]:
        return [runner.run(examples, prompts, seed=self.seed, attempt=k, progress=progress) for k in range(samples)]

    @property
    def initial_prompts(self) -> Prompts:
        """The program's own prompts, in the forms of those in force: what is trained is in the form that is run."""
        return in_form(self.program.initial_prompts(), self.prompts)

    def runner(self, metric: Metric | None) -> Runner:
        """How this program runs on its LM, and by what it is scored."""
        return Runner(self.program, self.asked, self.form, metric, self.sampling, self.max_error_rate, self.ranks)

    @property
    def vocabulary(self) -> Vocabulary:
        """What the LM's token ids mean; its tokenizer must be loaded."""
        return self.lm.vocabulary

    def pair_maker(self, prompts: Prompts) -> PairMaker:
        """Makes training pairs with these prompts, for this LM; its tokenizer must be loaded."""
        lm = self.weights
        return PairMaker(
            self.program,
            self.form,
            prompts,
            lm.encode,
            end_id=lm.end_ids[0],
            window=lm.window,
            vocabulary=self.vocabulary,
        )

    def referenced(self, traces: Sequence[Trace], prompts: Prompts, by: Reference) -> list[Trace]:
        """The traces with what the LM says of them behind these prompts, less those that would not fit its window."""
        model = self.weights.model
        off = model.disable_adapter() if by.weights == "base" else nullcontext()
        with evaluating(model), off, self.trainer.precision_plugin.train_step_context():
            maker, score = self.pair_maker(prompts), functools.partial(self._gradients.likeliest, model, count=by.top_k)
            found = with_reference(traces, maker, score)
            if not by.top_k:
                return found
            return with_offsets(found, maker, self.weights.codec, model, by.choice_temperature)

    def begin_weight_step(self, *, steps: int, done: int = 0) -> None:
        """Starts the learning rate's course for a weight step of `steps` optimiser steps, `done` of them taken."""
        if self.learning_rate.warmup >= steps and not done:
            print(
                f"model.learning_rate.warmup is {self.learning_rate.warmup} but this weight step has only {steps} "
                f"optimiser steps, so all of it is warm-up; set it to about {steps // 10}, or raise alternate.epochs."
            )
        self.optimiser_step, self.optimiser_steps = done, steps

    def on_train_start(self) -> None:
        if isinstance(model := self.trainer.strategy.model, DistributedDataParallel):
            model.require_backward_grad_sync = False  # gradients have been added up before they come to `backward`
        self.set_rate()

    def set_rate(self, *_: Any, **__: Any) -> None:
        """Of the coming optimiser step, since callbacks may read it before that."""
        factor = self.learning_rate.factor(self.optimiser_step, self.optimiser_steps)
        for group in (group for optimizer in self.trainer.optimizers for group in optimizer.param_groups):
            group["lr"] = self.rate(self.objective, self.full_rate, group) * factor

    on_train_batch_end = set_rate

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.weights.completing.rest()
        parameters = self._trained()
        scaler = self._loss_scaler()
        scale = scaler.get_scale() if scaler else 1.0
        computed = self._gradients.compute(self.weights.model, parameters, batch, self.objective, scale=scale)
        # Gradients of fp16 that overflow are the loss scaler's: it skips the step and lowers its factor.
        finite = bool(torch.isfinite(computed.loss)) if scaler else computed.finite
        if finite:
            self.skips.passed()
            self.log("train/loss", computed.loss, prog_bar=True, batch_size=batch.rows)
        else:
            what = "the gradient" if torch.isfinite(computed.loss) else "the loss"
            self._skip(what, self._gradients.not_finite(self.weights.model, parameters, batch, computed))
        self.log("train/skipped_steps", float(self.skips.total))
        self._size = computed.size if finite or scaler else 0
        return known_gradients(computed, parameters) if self._size else computed.loss.requires_grad_()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Adds the batch's gradients: afterwards the gradients are the mean over all that was accumulated."""
        if not self._size:
            return
        before, self._accumulated = self._accumulated, self._accumulated + self._size
        if before:
            for parameter in self._trained():
                if parameter.grad is not None:
                    parameter.grad.mul_(before / self._accumulated)
        # Lightning has divided by the number of batches, as if they were equal.
        share = self.trainer.accumulate_grad_batches * self._size / self._accumulated
        super().backward(loss * share, *args, **kwargs)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self._accumulated = 0.0

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.optimiser_step += 1
        self.log("train/lr", optimizer.param_groups[0]["lr"])
        if self._loss_scaler() is None and not is_finite([p.grad for p in self._trained()]):
            for parameter in self._trained():
                parameter.grad = None  # what has no gradient no optimiser touches: weight, moments, count of steps
            self._skip("the accumulated gradient", ())

    def validation_step(self, batch: list[Example], batch_idx: int) -> None:
        self._evaluate(batch, samples=self._data.val_samples)

    def test_step(self, batch: list[Example], batch_idx: int) -> None:
        self._evaluate(batch, samples=1)

    def _evaluate(self, batch: list[Example], *, samples: int) -> None:
        """Runs some of the examples; how many fail is measured once all have been run."""
        passes = self._passes(replace(self.runner(self._data.metric), max_error_rate=1.0), batch, self.prompts, samples)
        self._run += [rollout for done in passes for rollout in done]
        self.evaluated += settled(passes, self._data.val_vote)

    def predict_step(self, batch: list[Example], batch_idx: int) -> list[dict[str, Any]]:
        """A plain dict an example, because Lightning moves what it returns and stops at frozen dataclasses."""
        return [
            {
                "id": rollout.example.id,
                "prediction": None if rollout.prediction is None else dict(rollout.prediction),
                "error": None if rollout.error is None else rollout.error.message,
            }
            for rollout in replace(self.runner(None), max_error_rate=1.0).run(batch, self.prompts, seed=self.seed)
        ]

    def on_validation_epoch_start(self) -> None:
        self.evaluated, self._run = [], []

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        check_errors(self._run, max_error_rate=self.max_error_rate)
        self.log("val/score", mean_score(self.evaluated), prog_bar=True)

    def on_test_epoch_end(self) -> None:
        check_errors(self._run, max_error_rate=self.max_error_rate)
        self.log("test/score", mean_score(self.evaluated))

    @property
    def _data(self) -> TraceDataModule:
        return self.trainer.datamodule  # type: ignore[attr-defined, no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer | list[torch.optim.Optimizer]:
        if isinstance(self.lm, TextLM):
            return []
        return made_optimizer(self.optimizer, self._trained(), size=self.lm.size)

    def rate(self, objective: Objective, own: float | None, group: Mapping[str, Any]) -> float:
        """The full learning rate of a weight step: its own, the optimiser's, or what fits LM and objective."""
        return own or group["initial_lr"] * (objective.rate if group["by_size"] else 1.0)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # plain ids and examples, which have no device; Lightning would walk into the frozen ones and fail

    def _trained(self) -> list[Tensor]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def _loss_scaler(self) -> Any:
        return getattr(self._precision, "scaler", None)

    def _skip(self, what: str, rows: Sequence[str]) -> None:
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.skips.skipped(step=self.trainer.global_step, what=what, rows=rows, learning_rate=rate)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The adapter only."""
        return dict(self.lm.adapter_state())

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads an adapter.

        Raises:
            ValueError: names or shapes do not fit; nothing is changed then.
        """
        self.lm.load_adapter_state(state_dict)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["prompts"] = prompts_to_dict(self.prompts)
        checkpoint["lm"] = {"base": self.vocabulary.base, "tokenizer": self.vocabulary.tokenizer}
        checkpoint["weight_step"] = [self.optimiser_step, self.optimiser_steps]
        checkpoint["skips"] = self.skips.state()
        checkpoint["rows_at_once"] = self._gradients.rows_at_once

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up what a checkpoint holds.

        Raises:
            ValueError: its adapter was trained on another tokenizer's ids.
        """
        made = checkpoint.get("lm", {"tokenizer": self.vocabulary.tokenizer})  # not named before format 2 of traces
        if made["tokenizer"] != self.vocabulary.tokenizer:
            raise BadValueError(
                f'the checkpoint\'s adapter was trained with "{made["base"]}", whose tokenizer differs from that of '
                f'"{self.vocabulary.base}". Set model.lm.model to the LM that it was trained on.'
            )
        self.prompts = prompts_from_dict(checkpoint["prompts"])
        self.optimiser_step, self.optimiser_steps = checkpoint["weight_step"]
        self.skips.load(checkpoint["skips"])
        # With another split, sums would differ in the last bits from those of a run that was never stopped.
        self._gradients.rows_at_once = checkpoint["rows_at_once"]
