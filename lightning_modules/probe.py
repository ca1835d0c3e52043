"""Trying a model's fast paths against plain transformers, on a small random copy of the same config and class.

The copy has layers of every kind that the model has, narrow ones, and its windows and switches are short: so that a few
dozen tokens reach behind a sliding window of thousands, or past the length where long rotary factors begin.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name for it)
from cotune.datamodules.collate import Batch, Pair, collate
from cotune.inference.codec import Codec
from cotune.inference.engine import Prompted
from cotune.inference.local.decoder import Decoder
from cotune.lightning_modules.findings import Build, Findings, Way
from cotune.lightning_modules.lora import seeded
from cotune.lightning_modules.training import plain
from cotune.programs.lm import Sampling
from torch import Tensor

_FIRST = 24
"""Tokens at which the copy's first feature begins: the window's length, or the last position before a switch."""
_STEP = 64
_CLOSE = 2e-3
"""Relative difference of losses and gradients, in float32, up to which they are equal."""
_MAX = 100_000_000
"""Parameters of a copy that is still made in a second or two."""

_NO_TOKEN = 1 << 30
_ALL = 1 << 10
"""More layers than any model has."""

_WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "attention_chunk_size",
    "window_size",
    "attention_window_size",
    "local_window_size",
    "floor_scale",
    "original_max_position_embeddings",
)
"""Lengths in a config beyond which a model computes otherwise."""
_WIDTHS = (
    "intermediate_size",
    "intermediate_size_mlp",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "ffn_dim",
    "ffn_hidden_size",
    "n_inner",
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")


def probe(config: Any, build: Build) -> Findings:
    """Which fast paths a config's models can go, found by trying each."""
    try:
        lengths = features(config)
        model = small_copy(config, build, lengths)
    except Exception as error:
        unknown = Way(f"it could not be tried: {_short(error)}")
        return Findings(unknown, unknown, unknown)
    with _rested(model):
        try:
            sees_ahead = _sees_ahead(model)
        except Exception as error:
            unknown = Way(f"it could not be tried: {_short(error)}")
            return Findings(unknown, unknown, unknown)
        if sees_ahead:
            return Findings(wrong="what it says at a place depends on what comes after it, so it is no causal LM")
        levels = [_FIRST + _STEP * i for i in range(len(lengths))]
        found = Findings(
            decodes=_way(lambda length, short: _decoding(model, length, short), lengths, levels),
            packs=_way(lambda length, short: _packing(model, length, short), lengths, levels),
            pads=_way(lambda length, short: _padding(model, length, short), lengths, levels),
        )
        return replace(found, drops=not found.packs.why and _drops(model))


def features(config: Any) -> list[int]:
    """The lengths, ascending, beyond which models of a config compute otherwise: windows, chunks, rotary switches."""
    text = config.get_text_config()
    return sorted({value for _, _, value in _lengths(text)})


def small_copy(config: Any, build: Build, lengths: Sequence[int]) -> Any:
    """A random model of the config's class in eval mode; its features begin at `_FIRST` tokens, and so on.

    Raises:
        ValueError: there is none that is small enough; or whatever building it raises.
    """
    kinds = _kinds(build, config)
    failed: Exception | None = None
    for narrow in (4, 3, 2, 1, 0):
        for layers in (2, 4, 8, _ALL):
            try:
                small = _shrunk(config, lengths, layers=layers, narrow=narrow)
                with torch.device("meta"):
                    size = sum(p.numel() for p in build(copy.deepcopy(small)).parameters())
                if size > _MAX:
                    raise ValueError(f"a copy of {layers} layers has {size:,} parameters")
                with seeded(0):
                    model = build(small).float().eval()
                    _enliven(model)
                if kinds and {type(module).__name__ for module in model.modules()} != kinds and layers < _ALL:
                    continue  # layers of some kind come later
                plain.last_logits(model, range(3, 12), 4)
            except Exception as error:
                failed = failed or error
                continue
            return model
    raise failed or ValueError("no copy could be made")


def _kinds(build: Build, config: Any) -> set[str]:
    """The classes of modules that a model of the config is made of; empty where that cannot be told without it."""
    try:
        with torch.device("meta"):
            return {type(module).__name__ for module in build(copy.deepcopy(config)).modules()}
    except Exception:  # some models compute while they are made
        return set()


def _shrunk(config: Any, lengths: Sequence[int], *, layers: int, narrow: int) -> Any:
    """The config with few layers, short features, and by `narrow` a small vocabulary, thin MLPs, few heads."""
    small = copy.deepcopy(config)
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    for part in _parts(small):
        _fewer_layers(part, layers if part is small.get_text_config() else 1)
        if narrow >= 1:
            _smaller_vocabulary(part)
        if narrow >= 2:
            _thinner(part)
        if narrow >= 3:
            _fewer_heads(part)
        if narrow >= 4 and isinstance(getattr(part, "head_dim", None), int) and hasattr(part, "hidden_size"):
            part.hidden_size = min(part.hidden_size, 256)  # heads have a width of their own
    for owner, name, value in list(_lengths(small.get_text_config())):
        _put(owner, name, _FIRST + _STEP * list(lengths).index(value))
    return small


def _put(owner: Any, name: str, value: int) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)


def _parts(config: Any) -> list[Any]:
    """A config and those inside it."""
    inner = [value for value in vars(config).values() if hasattr(value, "to_dict") and hasattr(value, "model_type")]
    return [config, *(part for one in inner for part in _parts(one))]


def _fewer_layers(config: Any, layers: int) -> None:
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int) or count <= 2:
        return
    kinds = getattr(config, "layer_types", None)
    sharing = count - (getattr(config, "num_kv_shared_layers", None) or 0)  # where layers begin that read others' keys
    if isinstance(kinds, list) and len(kinds) == count:
        parts = [range(sharing), range(sharing, count)]
        firsts = sorted({next(i for i in part if kinds[i] == kinds[j]) for part in parts for j in part})
        rest = [i for i in range(count) if i not in firsts]
        chosen = sorted([*firsts, *rest[: max(layers - len(firsts), 0)]])
    else:
        chosen = list(range(min(layers, count)))
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == count:
            setattr(config, name, type(value)(value[i] for i in chosen))
    config.num_hidden_layers = len(chosen)
    if sharing < count:
        config.num_kv_shared_layers = min(sum(i >= sharing for i in chosen), len(chosen) - 1)
    for name in ("max_window_layers", "first_k_dense_replace"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value >= len(chosen):
            setattr(config, name, len(chosen) - 1)


def _smaller_vocabulary(config: Any) -> None:
    for name in ("vocab_size", "vocab_size_per_layer_input"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(getattr(config, name), 96))
    for name, value in list(vars(config).items()):
        if name.endswith(("token_id", "token_index")) and value is not None:
            setattr(config, name, {"bos_token_id": 1, "eos_token_id": 2}.get(name, 0))


def _thinner(config: Any) -> None:
    for name in _WIDTHS:
        value = getattr(config, name, None)
        if isinstance(value, int):
            setattr(config, name, min(value, 64))
        elif isinstance(value, list):
            setattr(config, name, [min(width, 64) for width in value])
    chosen = max((getattr(config, name, None) or 1) for name in ("num_experts_per_tok", "top_k_experts", "moe_top_k"))
    for name in _EXPERTS:
        if isinstance(getattr(config, name, None), int) and getattr(config, "n_group", 1) in (None, 1):
            setattr(config, name, min(getattr(config, name), max(4, 2 * chosen)))


def _fewer_heads(config: Any) -> None:
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(width, int) or heads <= 4 or width % heads:
        return
    shared = heads // (getattr(config, "num_key_value_heads", None) or heads)
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = 4 if shared == 1 else 1 if config.num_key_value_heads == 1 else 2
    config.num_attention_heads = 4
    config.hidden_size = 4 * (width // heads)
    if hasattr(config, "mamba_n_heads") and hasattr(config, "mamba_d_head"):
        config.mamba_n_heads = getattr(config, "mamba_expand", 2) * config.hidden_size // config.mamba_d_head
    if getattr(config, "word_embed_proj_dim", None) == width:
        config.word_embed_proj_dim = config.hidden_size


def _lengths(text: Any) -> Iterator[tuple[Any, str, int]]:
    """(where, name, value) of each feature's length in a text config."""
    turned = getattr(text, "rope_parameters", None) or {}
    nested = [turned, *(value for value in turned.values() if isinstance(value, dict))]
    kinds = {str(part.get("rope_type", "default")) for part in nested}
    for owner, names in [(text, vars(text)), *((part, part) for part in nested)]:
        for name in _WINDOWS:
            value = names.get(name)
            if name == "sliding_window" and not getattr(text, "use_sliding_window", True):
                continue
            if name == "original_max_position_embeddings" and "longrope" not in kinds:
                continue
            if isinstance(value, int) and value > 1:
                yield owner, name, value
    if any("dynamic" in kind for kind in kinds) and isinstance(text.max_position_embeddings, int):
        yield text, "max_position_embeddings", text.max_position_embeddings


def _enliven(model: Any) -> None:
    """Weights so large that every part of the model has a say; as they are drawn at first, attention hardly differs."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.0 if "embed" in name else 1.5 / math.sqrt(parameter.shape[-1]))
            elif name.endswith(("bias", "sinks")):
                parameter.normal_(std=0.1)
            parameter.requires_grad_("embed" not in name)
        head = model.get_output_embeddings()
        if head is not None:
            head.requires_grad_(False)


@contextmanager
def _rested(model: Any) -> Iterator[None]:
    try:
        with seeded(0):
            yield
    finally:
        model.zero_grad(set_to_none=True)


def _sees_ahead(model: Any) -> bool:
    """Whether a place sees what comes after it. Raises whatever plain transformers raises."""
    ids = _ids(16, 0)
    with torch.no_grad():
        whole, begun = plain.last_logits(model, ids, 15)[:10], plain.last_logits(model, ids[:12], 11)[:10]
        _completed(model, [ids], together=False)
    return bool(torch.isfinite(whole).all()) and _apart(whole, begun) > _CLOSE


def _way(check: Callable[[int, bool], str], lengths: Sequence[int], levels: Sequence[int]) -> Way:
    """The way that a check finds, which gets a length and whether texts must stay below it; "" where all is equal."""
    if why := check(levels[0] if levels else 4 * _FIRST, True):
        return Way(why)
    for length, level in zip(lengths, levels, strict=True):
        if check(level, False):
            return Way(up_to=length)
    return Way()


def _decoding(model: Any, length: int, below: bool) -> str:
    shared = _ids(length // 3 if below else length - 6, 1)
    rest = (2, length // 4) if below else (1, 9, 22)
    prompts = [shared + _ids(n, 10 + n) for n in rest] + [
        _ids(length // 3, 2),
        *([] if below else [_ids(length + 12, 3)]),
    ]
    try:
        fast = _completed(model, prompts, together=True)
    except Exception as error:
        return _short(error)
    slow = _completed(model, prompts, together=False)
    return "" if fast == slow else "decoding prompts together gives other tokens"


def _completed(model: Any, prompts: Sequence[Sequence[int]], *, together: bool) -> list[list[int]]:
    decoder = Decoder(
        model,
        codec=Codec(None, end_ids=[_NO_TOKEN], encode=_as_ids, decode=lambda ids: " ".join(map(str, ids))),
        window=1 << 20,
        cache_tokens=8192,
        together=lambda tokens: together,
    )
    found = decoder.generate([Prompted(ids) for ids in prompts], Sampling(max_new_tokens=9))
    return [one.ids for one in found]


def _as_ids(text: str) -> list[int]:
    return [int(number) for number in text.split()]


def _packing(model: Any, length: int, below: bool) -> str:
    from cotune.lightning_modules.training.loss import packed_logits

    return _differs(model, packed_logits, _rows(length, below))


def _padding(model: Any, length: int, below: bool) -> str:
    from cotune.lightning_modules.training.loss import padded_logits

    return _differs(model, padded_logits, _rows(length, below))


def _rows(length: int, below: bool) -> Batch:
    """Rows that share a prefix and rows that share none, of unequal lengths, all below a length or most beyond it."""
    shared = _ids(length // 3 if below else length - 2, 3)
    own = (1, length // 4) if below else (4, 21)
    behind = [Pair(shared + _ids(n, 20 + n), _ids(4, n)) for n in own]
    alone = [[Pair(_ids(length // 2, 4), _ids(3, 5))], [Pair(_ids(length + 9, 6), _ids(3, 7))]]
    return collate([behind, *alone[: 1 if below else 2]])


def _differs(model: Any, logits: Callable[[Any, Batch], Tensor], batch: Batch) -> str:
    """Whether losses or gradients of a fast path differ from the plain ones."""
    weights = [p for p in model.parameters() if p.requires_grad]
    slow = _losses(plain.logits(model, batch), batch)
    slow_gradients = torch.autograd.grad(slow.sum(), weights, allow_unused=True)
    try:
        found = _losses(logits(model, batch), batch)
        gradients = torch.autograd.grad(found.sum(), weights, allow_unused=True)
    except Exception as error:
        return _short(error)
    if _apart(found.detach(), slow.detach()) > _CLOSE:
        return "its losses come out different"
    total = _flat(slow_gradients, weights)
    return "" if _apart(_flat(gradients, weights), total) <= 10 * _CLOSE else "its gradients come out different"


def _losses(logits_nV: Tensor, batch: Batch) -> Tensor:
    """(n,) the negative log-likelihood of each token that bears weight."""
    ids_n = batch.bearing(logits_nV.device, logits_nV.dtype).ids[:, 0]
    return F.cross_entropy(logits_nV, ids_n, reduction="none")


def _flat(gradients: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor:
    found = zip(gradients, weights, strict=True)
    return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for g, w in found])


def _drops(model: Any) -> bool:
    """Whether attention is asked to drop weights while training."""
    from cotune.lightning_modules.training.loss import packed_logits

    model.train()
    try:
        with torch.no_grad():
            packed_logits(model, _rows(_FIRST, True))
    except NotImplementedError:
        return True
    finally:
        model.eval()
    return False


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-9))


def _ids(count: int, seed: int) -> list[int]:
    drawn: list[int] = torch.randint(3, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return drawn


def _short(error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:120]}" if first else type(error).__name__
