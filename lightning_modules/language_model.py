"""The shared LM: one Hugging Face model with one LoRA adapter behind all stages, in this process."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from cotune.datamodules.encode import ChatEncoder, Vocabulary
from cotune.datamodules.thinking import told_apart
from cotune.errors import BadValueError
from cotune.inference import Codec
from cotune.inference.engine import Engine, Generated, Prompted
from cotune.inference.local.engine import LocalEngine, unmixed
from cotune.inference.local.merged_copy import base_alone
from cotune.inference.stored import CompletionStore, StoredEngine, completion_of
from cotune.lightning_modules.choice_chances import with_chances
from cotune.lightning_modules.choice_scores import with_scores
from cotune.lightning_modules.findings import findings, remember
from cotune.lightning_modules.foreign import (
    check_adapter,
    check_config,
    check_folder,
    check_tokenizer,
    check_weights,
    load_adapter,
    named_adapter,
    reading,
)
from cotune.lightning_modules.lora import (
    Attached,
    LoRA,
    adapter_state,
    attach,
    attached,
    fingerprint,
    load_adapter_state,
    peft_of_today,
    reset,
    weights_version,
)
from cotune.lightning_modules.model_identity import UNTRAINED, AdapterIdentity, base_identity
from cotune.lightning_modules.model_source import EMBEDDED, generation_config_of, source_of, tuned_like
from cotune.lightning_modules.quantization import (
    Quantization,
    bitsandbytes_config,
    check_base,
    check_settings,
    check_trainable,
    prepare_layers,
    quantized_as,
)
from cotune.lightning_modules.usage import Usage
from cotune.programs import LM, Completion, Request, Sampling
from cotune.programs.usage import Usage as Cost
from cotune.storage.durable import file_sum
from torch import Tensor, nn

ADAPTERS = ("", "default")
"""Whom a request can ask: the base alone, or the LoRA that is tuned."""

DTYPES = ("float32", "bfloat16", "float16")
_PROCESSORS = ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "sequence_bias")
"""Settings of a generation_config by which transformers' own generate changes what a model says."""


class LanguageModel(nn.Module, LM):
    """A causal LM with a chat template, a LoRA adapter, and batched generation.

    The constructor only keeps its arguments; `load` reads the weights.

    Args:
        model: "embedded" (SmolLM2-135M-Instruct), a Hub id, a local folder, or a .gguf file.
        gguf_file: name of the GGUF file inside `model`, if that is a Hub id or a folder.
        adapter: folder of a PEFT adapter to begin from, instead of a fresh one.
        quantization: bitsandbytes format of the base: nf4, fp4 or int8. The adapter stays in full precision. Do not set
            it for a checkpoint that is already quantised.
        double_quantization: also quantise the 4-bit scales.
        dtype: of the weights (of the computation, if quantised). float32 is reproducible to the bit on a CPU.
        device: where to load; None: CUDA if there is one. Lightning moves the model afterwards anyway.
        lora: shape of the adapter.
        cache_tokens: limit on keys and values held while generating, in tokens: half for the rows that decode together,
            half for prefixes, kept until the weights change. This and the next two are for `LocalEngine`.
        keep_prompts: also keep the keys and values of whole prompts until the weights change, within cache_tokens, so
            that a repeated prompt is not read again. Useful only without a completion store, which answers equal
            requests at once. The last bits of logits then depend on earlier requests.
        merge_while_generating: decode with a merged second copy of the adapted weights (on a CPU, of all linear
            layers). Takes their memory twice, and saves about a third of the time.
        completions: file that stores every completion, to answer equal requests of equal weights again
            (`CompletionStore`). Null stores none; the command line uses `<runs_dir>/completions.sqlite` unless
            this is another path, or "off".
        trust_remote_code: run Python code that comes with the model. Leave it off for models you have not read.

    Attributes:
        completing: the engine, and the completions that are kept.
    """

    def __init__(
        self,
        model: str = EMBEDDED,
        *,
        gguf_file: str | None = None,
        adapter: str | None = None,
        quantization: Quantization | None = None,
        double_quantization: bool = False,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        device: str | None = None,
        lora: LoRA = LoRA(),  # noqa: B008 (frozen)
        cache_tokens: int = 32768,
        keep_prompts: bool = False,
        merge_while_generating: bool = True,
        completions: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        check_settings(quantization, double_quantization)
        if dtype not in DTYPES:
            raise BadValueError(f'dtype "{dtype}" is none of {", ".join(DTYPES)}.')
        self.name, self.gguf_file, self.adapter = model, gguf_file, adapter
        self.quantization, self.double_quantization = quantization, double_quantization
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.device_name, self.lora = device, lora
        self.trust_remote_code = bool(trust_remote_code)
        self.usage = Usage()
        engine = LocalEngine(cache_tokens, keep_prompts, merge_while_generating)
        self.completing = StoredEngine(engine, identity=self._identity)
        self.keep_completions(completions)
        self.model: Any = None
        self.config: Any
        self.encode: ChatEncoder
        self.codec: Codec
        self._identities = AdapterIdentity()

    def load(self, *, seed: int = 0) -> None:
        """Reads tokenizer and weights and attaches the adapter, drawn from the seed. Does nothing when loaded.

        Raises:
            ModelNotFoundError: there is no such model here, or the Hub has none or cannot be reached.
            ValueError: no chat template, or LoRA targets that fit no layer.
        """
        if self.model is not None:
            return
        if not hasattr(self, "tokenizer"):
            self.load_tokenizer()
        known = tuned_like(self.name, self.config, trust=self.trust_remote_code)
        base = self._base(self._found)
        remember(base, known)
        self.config, self.generation_config = base.config, base.generation_config
        self.model = self._with_adapter(base, seed)
        self.model.train()  # Lightning keeps the mode it finds, and in eval mode dropout would never act
        self.completing.start(self)

    def load_tokenizer(self) -> None:
        """Reads the tokenizer and the model's settings: enough for `encode`, `window`, `pad_id` and `end_ids`.

        Raises:
            ModelNotFoundError, ValueError: as `load`.
        """
        from transformers import AutoConfig, AutoTokenizer

        # Looked for once: it may convert a GGUF file, or at least read all of it to know it.
        source = self._found = source_of(self.name, self.gguf_file)
        trust = {"trust_remote_code": self.trust_remote_code}
        if self.adapter is not None:
            check_adapter(self.adapter)
        with reading("model", self.name):
            if Path(source).is_dir():
                check_folder(self.name, Path(source))
            self.config = AutoConfig.from_pretrained(source, **trust)
            check_config(self.name, self.config, trust=self.trust_remote_code)
            tokenizer = AutoTokenizer.from_pretrained(source, **trust)
            check_tokenizer(self.name, tokenizer, self.config)
            self.generation_config = generation_config_of(source, self.config)
        self.encode = ChatEncoder(tokenizer)
        self.tokenizer = tokenizer
        text = functools.partial(self.encode.text, closes_thinking=False)
        self.codec = Codec(tokenizer, end_ids=self.end_ids, encode=text, decode=self.encode.decode)

    @property
    def source(self) -> str:
        """What the weights are read from, a folder or a Hub id; known once the tokenizer is loaded."""
        return self._found

    @property
    def attached(self) -> Attached:
        """The adapter that the loaded model has, whatever was asked for."""
        return attached(self.model)

    @property
    def remarks(self) -> list[str]:
        """What to know of the loaded model before a run: where the adapter comes from, what is slow and why."""
        from cotune.lightning_modules.embedded import HUB_ID

        names = [self.name, self.source, *([HUB_ID] if self.name == EMBEDDED else [])]
        shape = "" if self.lora == LoRA() else "; its shape stands, and model.lm.lora is not used"
        begins = [f"begins from {named_adapter(self.adapter, names)}{shape}"] if self.adapter is not None else []
        asked = self.generation_config.to_diff_dict()
        left_out = [f"{name} {asked[name]}" for name in _PROCESSORS if asked.get(name) not in (None, 0, 1, 1.0)]
        if left_out:
            begins.append(f"its generation_config asks for {', '.join(left_out)}: ignored; its probabilities decide")
        return begins + findings(self.model).remarks

    @property
    def size(self) -> int:
        """Parameters of the loaded base, those of 4 bits counted as what they stand for."""
        base = (p for p in self.model.parameters() if not p.requires_grad)
        return sum(math.prod(p.quant_state.shape) if hasattr(p, "quant_state") else p.numel() for p in base)

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end_ids[0])

    @property
    def window(self) -> int:
        """Longest prompt plus completion, in tokens."""
        return int(getattr(self.config.get_text_config(), "max_position_embeddings", 1 << 20))

    @property
    def end_ids(self) -> list[int]:
        """Ids that end the assistant's turn. The first is the one that training teaches: the chat template's own."""
        configured = self.generation_config.eos_token_id
        ids = configured if isinstance(configured, list) else [configured]
        known = (self.encode.turn_end, self.tokenizer.eos_token_id, *ids)
        return list(dict.fromkeys(i for i in known if i is not None))

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion a request, in order; a prompt longer than the window gives an empty, "too_long" one."""
        self.load()
        started, before = time.perf_counter(), self.paid.calls
        prompts = [Prompted(self.encode(r.messages), r.layout, r.seed) for r in requests]
        results = [Completion("")] * len(requests)
        for adapter in dict.fromkeys(request.adapter for request in requests):
            if adapter not in ADAPTERS:
                raise BadValueError(f'there is no adapter "{adapter}"; use "default", or "" for the base alone.')
            places = [i for i, request in enumerate(requests) if request.adapter == adapter]
            with unmixed(self.model):  # so that engines of one's own write the same in validation, too
                made = self.completing.generate([prompts[i] for i in places], sampling, adapter=adapter)
            done = [self._completion(prompts[i], generated) for i, generated in zip(places, made, strict=True)]
            for i, completion in zip(places, self._judged([requests[i] for i in places], done, adapter), strict=True):
                results[i] = completion
        self.usage.calls += len(prompts)
        self.usage.prompt_tokens += sum(len(p.ids) for p in prompts)
        self.usage.completion_tokens += sum(len(r.completion_ids) for r in results)
        self.usage.too_long += sum(r.finished == "too_long" for r in results)
        self.usage.cached += len(prompts) - (self.paid.calls - before)
        self.usage.seconds += time.perf_counter() - started
        return results

    def counted(self) -> dict[str, float]:
        """What was asked so far, wall time apart; see `Counter`."""
        return {name: n for name, n in vars(self.usage).items() if name != "seconds"}

    def count(self, more: Mapping[str, float]) -> None:
        for name, n in more.items():
            setattr(self.usage, name, getattr(self.usage, name) + int(n))

    def _completion(self, prompt: Prompted, generated: Generated) -> Completion:
        """What was written, its thinking apart from the fields' texts; the ids hold both."""
        return told_apart(completion_of(prompt.ids, generated), prompt.layout, self.encode.thinking)

    def _judged(self, requests: Sequence[Request], done: Sequence[Completion], adapter: str) -> list[Completion]:
        """With scores and chances of choices, where they are asked for."""
        asked = any(request.scores or request.chances for request in requests)
        with base_alone(self.model) if asked and not adapter else nullcontext():
            return with_chances(self.model, self.codec, requests, with_scores(self.model, self.codec, requests, done))

    def use(self, engine: Engine) -> None:
        """Generates with this engine from now on, in place of a `LocalEngine`."""
        self.completing.engine = engine
        if self.model is not None:
            engine.start(self)

    def keep_completions(self, path: str | Path | None) -> None:
        """Keeps completions in this file from now on, and looks them up there; None, "" or "off" keeps none."""
        if self.store is not None:
            self.store.close()
        self.completing.store = CompletionStore(path) if path and path != "off" else None

    @property
    def paid(self) -> Cost:
        """What was generated so far; what the store had is free."""
        return self.completing.paid

    @property
    def store(self) -> CompletionStore | None:
        """Where completions are kept, if they are."""
        return self.completing.store

    @property
    def before_wave(self) -> Callable[[], None]:
        """Called before each part of a `complete` that is one unit of work; what it raises stops there."""
        return self.completing.before_wave

    @before_wave.setter
    def before_wave(self, call: Callable[[], None]) -> None:
        self.completing.before_wave = call

    @property
    def version(self) -> Hashable:
        """A value that changes when the weights do."""
        return weights_version(self.model)

    def decodes_together(self, tokens: int) -> bool:
        """Whether texts of so many tokens were found to come out right where they are decoded together."""
        return findings(self.model).decodes.fits(tokens)

    def described(self, *, seed: int) -> list[str]:
        """What it is, in lines for people; loads it, to say what is and not what was asked for."""
        self.load(seed=seed)
        held = f"{self.quantization}, " if self.quantization else ""
        return [f"{self.name}, {held}{str(self.dtype).removeprefix('torch.')}; {self.attached}", *self.remarks]

    def close(self) -> None:
        """Closes the store; it opens again where it is asked again."""
        if self.store is not None:
            self.store.close()

    @property
    def vocabulary(self) -> Vocabulary:
        """What its token ids mean; the tokenizer must be loaded."""
        return self.encode.vocabulary(self.name)

    def base_identity(self) -> str:
        """What the base is, by the content of its files or its commit on the Hub; the adapter and its training apart.

        Raises:
            ModelNotFoundError: as `load`.
        """
        if not self._identities.base:
            if not hasattr(self, "tokenizer"):
                self.load_tokenizer()
            sum_of = self.store.file_sum if self.store else file_sum
            self._identities.base = base_identity(self._found, self.config, sum_of=sum_of)
        return self._identities.base

    def _identity(self, adapter: str) -> dict[str, Any]:
        """What a completion follows from, beside the prompt, the sampling and the engine."""
        return {
            "base": self.base_identity(),
            "adapter": self._identities.name(self.model) if adapter else UNTRAINED,
            "dtype": str(self.dtype),
            "quantization": [self.quantization, self.double_quantization],
            "device": next(self.model.parameters()).device.type,
            "end_ids": sorted(self.end_ids),
            "window": self.window,
            "torch": torch.__version__,
        }

    def adapter_state(self) -> dict[str, Tensor]:
        """A copy of the adapter's tensors, on the CPU, by parameter name; not to be written to."""
        return dict(self._identities.tensors(self.model, adapter_state))

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        load_adapter_state(self.model, state)

    def reset_adapter(self, *, seed: int) -> None:
        reset(self.model, seed=seed)

    def fingerprint(self) -> str:
        return fingerprint(self.model)

    def save_adapter(self, folder: Path) -> None:
        """Writes the adapter as PEFT does, for `peft.PeftModel.from_pretrained` and for servers that read it."""
        # The embedding layers are never trained; asking PEFT whether they were would ask the Hub.
        self.model.save_pretrained(str(folder), save_embedding_layers=False)

    def _base(self, source: str) -> Any:
        from transformers import AutoModelForCausalLM

        options: dict[str, Any] = {"dtype": self.dtype, "trust_remote_code": self.trust_remote_code}
        device = self.device_name or ("cuda" if torch.cuda.is_available() else "cpu")
        check_base(self.name, self.config, self.quantization, device)
        if self.quantization:
            options["quantization_config"] = bitsandbytes_config(
                self.quantization, double=self.double_quantization, dtype=self.dtype
            )
        quantized = bool(self.quantization or quantized_as(self.config))
        if quantized:  # the format is made, or unpacked, where the weights arrive
            options["device_map"] = {"": device}
        with reading("model", self.name):
            base, info = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
            check_weights(self.name, base, info)
            if not quantized:
                base.to(device)
        check_trainable(self.name, base)
        prepare_layers(base, dtype=self.dtype)
        base.requires_grad_(False)
        return base

    def _with_adapter(self, base: Any, seed: int) -> Any:
        if self.adapter is None:
            return attach(base, self.lora, seed=seed)
        with peft_of_today():
            return load_adapter(base, self.adapter)
