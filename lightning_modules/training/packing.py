"""Training rows packed into one sequence: a shared prefix once, each row's own tokens behind it, no padding.

```
 tokens     [ prefix | own tokens of row 1 | of row 2 | of row 3 ]  [ prefix | ... ]
 attention    causal   prefix + own, causal                          another segment
 positions    0..P-1   P, P+1, ...           P, P+1, ...
```
The layers between see one sequence of N tokens, so their matrix products are as large as they can be. Only attention
knows which row a token is of. The numbers are those of row by row, gradient included: a prefix's gradient is the sum
over its rows.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from cotune.datamodules.collate import Batch
from cotune.inference.local.out_of_memory import is_out_of_memory
from cotune.inference.local.transformers_internals import attending_by, attention_of
from cotune.lightning_modules.findings import findings
from cotune.lightning_modules.training.packed_attention import NAME, Family
from torch import Tensor

_CLOSE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""How far, relatively, the probe's logits may be from the plain model's; 0.1 for 16-bit and quantised models, and
where products are rounded."""


@dataclass(frozen=True)
class Packed:
    """A batch as one sequence of N tokens.

    Attributes:
        ids: (1, N).
        positions: (1, N) each token's position in its own text, prefix included.
        families: the segments, in order.
        places: (n,) places in the sequence whose next token bears weight, row by row.
    """

    ids: Tensor
    positions: Tensor
    families: tuple[Family, ...]
    places: Tensor


def pack(batch: Batch, device: torch.device) -> Packed:
    """The batch's segments behind one another."""
    ids: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    families: list[Family] = []
    for segment in batch.segments:
        rows = [segment.own(pair) for pair in segment.pairs]
        families.append(Family(len(ids), segment.prefix, tuple(map(len, rows))))
        ids += segment.shared  # (P,) once, however many rows share them
        positions += range(segment.prefix)
        for pair, row in zip(segment.pairs, rows, strict=True):
            ids += row
            positions += range(segment.prefix, segment.prefix + len(row))  # as if nothing stood between
            # A token is predicted at the place before it.
            places += [len(ids) - len(pair.completion_ids) + place - 1 for place in pair.bearing]
    tensors = (torch.tensor(values, device=device) for values in (ids, positions, places))
    packed_ids, packed_positions, packed_places = tensors  # (N,), (N,), (n,)
    return Packed(packed_ids[None], packed_positions[None], tuple(families), packed_places)


def forward(model: Any, packed: Packed, **options: Any) -> Any:
    """What the model says of a packed batch; `options` go to it as they are."""
    with attending_by(model.config.get_text_config(), NAME):
        return model(
            input_ids=packed.ids,
            # Masks of four dimensions are handed on as they are. The attention below needs none; any other would
            # fail on this one, which is better than mixing rows without a word.
            attention_mask=torch.empty(1, 1, 0, 0, device=packed.ids.device),
            position_ids=packed.positions,
            use_cache=False,
            families=packed.families,  # for the attention: which tokens may see which
            **options,
        )


@dataclass(frozen=True)
class Abilities:
    """What of this module a model is fit for.

    Attributes:
        packed: its layers compute packed rows right.
        plain_head: its logits are its output embeddings times its last hidden states, and nothing more.
        padded: where they are not packed, rows can be padded behind what they share.
    """

    packed: bool
    plain_head: bool
    padded: bool = True


def checkpoint_layers(model: Any) -> None:
    """Lets the layers forget what they computed and compute it again in the backward pass: less memory, more time.

    Raises:
        ValueError: the model's layers cannot do that.
    """
    config = model.config.get_text_config()
    # The attention that a layer was computed with is the one that it has to be computed with again.
    options = {
        "use_reentrant": False,
        "context_fn": lambda: (nullcontext(), attending_by(config, attention_of(config))),
    }
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # transformers before 5.23
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def abilities(model: Any, longest: int) -> Abilities:
    """Whether this model can be trained on packed rows of up to `longest` tokens, and how its head may be computed.

    What the layers do with windows, dropout and the like was tried on a small copy (`findings`); here the model itself
    is, once: a few tokens packed and plain must give the same logits.
    """
    found = findings(model)
    if not found.packs.fits(longest) or (model.training and found.drops):
        return Abilities(False, False, found.pads.fits(longest))
    if model not in _known:
        _known[model] = _tried(model)
    return replace(_known[model], padded=found.pads.fits(longest))


_known: WeakKeyDictionary[Any, Abilities] = WeakKeyDictionary()


def backbone(model: Any) -> Any:
    """The model without its head (and without PEFT's wrapper, which does nothing in a forward pass of LoRA)."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(causal, causal.base_model_prefix)


def _tried(model: Any) -> Abilities:
    """Packed against plain on two short rows."""
    # From all over the vocabulary: on its first tokens, which texts hardly have, 16 bits round by up to a tenth.
    ids = torch.arange(1, 13, device=model.device) * model.config.get_text_config().vocab_size // 13
    positions = torch.tensor([[*range(6), *range(6, 8), *range(6, 10)]], device=ids.device)  # 6 shared, then 2 and 4
    last = torch.tensor([7, 11], device=ids.device)  # each row's last token
    packed = Packed(ids[None], positions, (Family(0, 6, (2, 4)),), last)
    training = [module for module in model.modules() if module.training]
    model.eval()  # dropout would make two passes differ
    try:
        with torch.no_grad():
            rows = (ids[:8], torch.cat([ids[:6], ids[8:]]))
            expected = torch.stack([model(input_ids=row[None], use_cache=False).logits[0, -1] for row in rows])
            found = forward(model, packed, logits_to_keep=last).logits[0]
            if not _close(model, found, expected):
                return _only_padded("its logits come out different")
            hidden = forward(backbone(model), packed).last_hidden_state[0, last]
            return Abilities(True, _close(model, model.get_output_embeddings()(hidden), expected))
    except (TypeError, KeyError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        return _only_padded(f"{type(error).__name__}: {error}")
    finally:
        for module in training:
            module.training = True


def _close(model: Any, found: Tensor, expected: Tensor) -> bool:
    coarse = bool(getattr(model, "is_quantized", False)) or rounds_products(found.device)
    tolerance = 0.1 if coarse else _CLOSE.get(found.dtype, 0.1)
    return float((found.float() - expected.float()).norm() / expected.float().norm()) <= tolerance


def rounds_products(device: torch.device) -> bool:
    """Whether float32 matrices are multiplied with fewer bits there, as Lightning advises for tensor cores (TF32)."""
    matrix = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    exact = matrix.double() @ matrix.double()
    return float(((matrix @ matrix).double() - exact).norm() / exact.norm()) > 1e-5


def _only_padded(why: str) -> Abilities:
    warnings.warn(
        f"this model cannot be trained on packed rows ({why.splitlines()[0]}); rows are padded: slower, same result.",
        stacklevel=2,
    )
    return Abilities(False, False)
