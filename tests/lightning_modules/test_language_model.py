"""The shared LM: what it loads and refuses, what a generation leaves behind, and quantised bases that still train."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cotune.datamodules.collate import Pair, collate
from cotune.inference import Filling, Plan
from cotune.inference.engine import Engine, Generated, Prompted, Weights
from cotune.inference.local import LocalEngine
from cotune.lightning_modules import LanguageModel, LoRA, ModelNotFoundError, embedded
from cotune.lightning_modules.choice_scores import choice_scores
from cotune.lightning_modules.lora import lora_layers
from cotune.lightning_modules.quantization import QuantizationError
from cotune.programs import ReasonThenFill, Request, Sampling, Signature
from losses import completion_loss
from tiny import save_tiny_model, save_wide_model, tiny_tokenizer
from transformers import AutoConfig, AutoTokenizer

SMALL = LoRA(r=4, alpha=8)


def loaded(folder: Path, **settings: Any) -> LanguageModel:
    lm = LanguageModel(str(folder), device="cpu", **{"lora": SMALL, **settings})
    lm.load(seed=0)
    return lm


def local(lm: LanguageModel) -> LocalEngine:
    assert isinstance(lm.completing.engine, LocalEngine)
    return lm.completing.engine


def disturb(lm: LanguageModel) -> None:
    """Gives the adapter something to say."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in lora_layers(lm.model):
            weight = layer.lora_B["default"].weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)


def asks(*contents: str, **settings: Any) -> list[Request]:
    return [Request([{"role": "user", "content": content}], **settings) for content in contents]


# Generating


def test_completions_hold_the_ids_they_were_generated_from_and_as(tiny_model: Path) -> None:
    lm = loaded(tiny_model)
    request, other = asks("hello", "good day")
    first, second = lm.complete([request, other], Sampling(max_new_tokens=6))
    assert list(first.prompt_ids) == lm.encode(request.messages)
    assert list(second.prompt_ids) == lm.encode(other.messages)
    assert 1 <= len(first.completion_ids) <= 6
    written = list(first.completion_ids)
    assert first.text == lm.tokenizer.decode(written, skip_special_tokens=True)
    assert first.finished == ("eos" if written[-1] in lm.end_ids else "length")


CHOICES = ("red", "blue", "dark blue")


@pytest.mark.parametrize("signature", ["question -> answer", "question -> reasoning, answer"])
@pytest.mark.parametrize("adapter", ["default", ""])
def test_scores_are_those_of_a_plain_loop_over_the_choices(tiny_model: Path, signature: str, adapter: str) -> None:
    lm = loaded(tiny_model)
    disturb(lm)
    layout = ReasonThenFill().layout(Signature.parse(signature, types={"answer": list(CHOICES)}))
    request = Request([{"role": "user", "content": "which?"}], layout=layout, adapter=adapter, scores=True)
    (done,) = lm.complete([request], Sampling(max_new_tokens=8))
    filled = done.fields[-1]
    before = [*done.prompt_ids, *done.completion_ids[: filled.start]]
    for choice, score in done.scores["answer"].items():
        ids = lm.codec.encode(f" {choice}" if filled.start else choice)
        with torch.no_grad(), nullcontext() if adapter else lm.model.disable_adapter():
            told = lm.model.eval()(input_ids=torch.tensor([[*before, *ids]])).logits[0].log_softmax(-1)
        plain = sum(float(told[len(before) - 1 + place, token]) for place, token in enumerate(ids))
        assert score == pytest.approx(plain, abs=1e-4)
    assert tuple(done.scores["answer"]) == CHOICES


def test_scores_read_what_all_choices_share_once_and_are_made_only_where_asked_for(tiny_model: Path) -> None:
    lm = loaded(tiny_model)
    layout = ReasonThenFill().layout(Signature.parse("question -> answer", types={"answer": list(CHOICES)}))
    asked = Request([{"role": "user", "content": "which? " * 20}], layout=layout, scores=True)
    (done,) = lm.complete([replace(asked, scores=False)], Sampling())
    assert done.scores == {}
    read = list[int]()
    lm.model.get_base_model().model.register_forward_pre_hook(
        lambda _, __, given: read.append(given["input_ids"].numel()), with_kwargs=True
    )
    choice_scores(lm.model, lm.codec, layout, done)
    own = sum(1 + len(lm.codec.encode(choice)) for choice in CHOICES)
    assert read[-1] == len(done.prompt_ids) - 1 + own


def test_kept_prompts_are_not_read_again(tiny_model: Path) -> None:
    lm = loaded(tiny_model, keep_prompts=True)
    read = list[int]()
    lm.model.register_forward_pre_hook(lambda _, __, given: read.append(given["input_ids"].numel()), with_kwargs=True)
    requests = asks("what is this?", "and what is that?")
    first = lm.complete(requests, Sampling(max_new_tokens=1))
    assert sum(read) > 2
    read.clear()
    assert [c.completion_ids for c in lm.complete(requests, Sampling(max_new_tokens=1))] == [
        c.completion_ids for c in first
    ]
    assert read == [2]  # the last token of each


def test_the_merged_copy_writes_what_base_and_adapter_write(tiny_model: Path) -> None:
    merged, apart = loaded(tiny_model), loaded(tiny_model, merge_while_generating=False)
    before = merged.complete(asks("hello", "bye"), Sampling(max_new_tokens=8))
    for lm in (merged, apart):
        disturb(lm)
    found = merged.complete(asks("hello", "bye"), Sampling(max_new_tokens=8))
    assert found == apart.complete(asks("hello", "bye"), Sampling(max_new_tokens=8))
    assert found != before  # the copy made for the first generation is not used for the second


def test_a_prompt_over_the_window_is_too_long_and_its_neighbour_is_answered(tiny_model: Path) -> None:
    lm = loaded(tiny_model)
    long, short = lm.complete(asks("x" * 2000, "x"), Sampling(max_new_tokens=3))
    assert (long.text, long.completion_ids, long.finished) == ("", (), "too_long")
    assert len(long.prompt_ids) > 2000
    assert short.completion_ids
    assert (lm.usage.calls, lm.usage.too_long) == (2, 1)
    assert lm.usage.completion_tokens == len(short.completion_ids)
    assert lm.usage.prompt_tokens == len(long.prompt_ids) + len(short.prompt_ids)


def test_usage_can_be_read_as_a_difference(tiny_model: Path) -> None:
    lm = loaded(tiny_model)
    lm.complete(asks("a"), Sampling(max_new_tokens=2))
    earlier = dict(vars(lm.usage))
    lm.complete(asks("a", "b"), Sampling(max_new_tokens=2))
    assert lm.usage.since(earlier)["calls"] == 2


@pytest.mark.parametrize("fails", [False, True])
def test_generating_leaves_every_module_in_the_mode_it_had(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    lm = loaded(tiny_model, lora=LoRA(r=4, dropout=0.5))
    assert lm.model.training
    frozen = lora_layers(lm.model)[0][1]
    frozen.eval()  # one that the user keeps in eval mode
    before = {name: module.training for name, module in lm.model.named_modules()}
    inside: list[bool] = []
    decoder = local(lm).decoder
    generate = decoder.generate

    def watched(*args: Any) -> Any:
        inside.append(any(module.training for module in lm.model.modules()))
        if fails:
            raise RuntimeError("inside")
        return generate(*args)

    monkeypatch.setattr(decoder, "generate", watched)
    if fails:
        with pytest.raises(RuntimeError, match="inside"):
            lm.complete(asks("a"), Sampling(max_new_tokens=2))
    else:
        lm.complete(asks("a"), Sampling(max_new_tokens=2))
    assert inside == [False]
    assert {name: module.training for name, module in lm.model.named_modules()} == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_after_generating_reaches_every_weight_of_the_adapter(tiny_model: Path, dtype: str) -> None:
    lm = loaded(tiny_model, dtype=dtype)
    disturb(lm)
    assert all_gradients(lm)
    lm.complete(asks("a", "b"), Sampling(max_new_tokens=4))
    assert all_gradients(lm)


def all_gradients(lm: LanguageModel) -> bool:
    """Whether a training step gives every weight of the adapter a gradient that is not zero, and the base none."""
    lm.model.zero_grad()
    prompt = lm.encode([{"role": "user", "content": "What is it?"}])
    pairs = [Pair(prompt, [50, 60, 2]), Pair([*prompt[:-3], 99, *prompt[-3:]], [70, 2])]
    completion_loss(lm.model, collate([pairs])).backward()
    adapted = [p for p in lm.model.parameters() if p.requires_grad]
    others = [p for p in lm.model.parameters() if not p.requires_grad]
    return all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in adapted) and all(
        p.grad is None for p in others
    )


# Loading


def test_it_has_fewer_than_twenty_attributes_of_its_own(tiny_model: Path) -> None:
    own = vars(loaded(tiny_model)).keys() | {"model"}
    assert len(own - vars(torch.nn.Module()).keys()) < 20


def test_loading_twice_loads_once(tiny_model: Path) -> None:
    lm = loaded(tiny_model)
    model = lm.model
    lm.load(seed=5)
    assert lm.model is model


def test_the_seed_of_loading_decides_the_adapter_and_reset_brings_it_back(tiny_model: Path) -> None:
    lm = loaded(tiny_model)
    made = lm.fingerprint()
    assert loaded(tiny_model).fingerprint() == made
    disturb(lm)
    assert lm.fingerprint() != made
    lm.reset_adapter(seed=0)
    assert lm.fingerprint() == made


def test_a_saved_adapter_loads_as_the_beginning_of_another_run(tiny_model: Path, tmp_path: Path) -> None:
    lm = loaded(tiny_model)
    disturb(lm)
    lm.save_adapter(tmp_path / "adapter")
    again = loaded(tiny_model, adapter=str(tmp_path / "adapter"))
    assert again.fingerprint() == lm.fingerprint()
    asked = asks("a", "b")
    assert again.complete(asked, Sampling(max_new_tokens=6)) == lm.complete(asked, Sampling(max_new_tokens=6))
    assert all_gradients(again)


def test_what_a_generation_config_would_change_is_said(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "repetition_penalty": 1.3}))
    (said,) = loaded(folder).remarks
    assert said.startswith("its generation_config asks for repetition_penalty 1.3: ignored")


def test_a_missing_adapter_folder_is_named(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelNotFoundError, match=r'adapter ".*none" is not a folder that holds an adapter_config\.json'
    ):
        loaded(tiny_model, adapter=str(tmp_path / "none"))


@pytest.mark.parametrize("name", ["/nowhere/model", "./none", "~/none/at/all", "a/b/c", "none.gguf"])
def test_a_path_that_is_not_there_is_named_and_the_hub_not_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: pytest.fail("asked"))
    with pytest.raises(ModelNotFoundError, match=r'there is no such folder or \.gguf file\. Give "embedded"') as error:
        LanguageModel(name).load()
    assert f'"{name}"' in str(error.value)


@pytest.mark.parametrize("said", ["We couldn't connect to the Hub.\nCheck your connection.", ""])
def test_a_hub_that_gives_nothing_is_explained(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    def unreachable(*args: Any, **options: Any) -> Any:
        raise OSError(said)

    for kind in (AutoConfig, AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", unreachable)
    with pytest.raises(ModelNotFoundError) as error:
        LanguageModel("someone/some-model").load()
    message = str(error.value)
    assert message.startswith('model "someone/some-model" is no local folder, and the Hub gave none by that name')
    assert said.split("\n")[0] in message
    assert "\n" not in message
    assert 'Give "embedded"' in message


def test_a_folder_without_a_model_is_named_as_such(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"the folder holds no config\.json; name a GGUF file") as error:
        LanguageModel(str(tmp_path)).load()
    assert str(tmp_path) in str(error.value)


def test_a_folder_without_weights_is_named_as_such(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"is a folder that lacks something \(.*safetensors"):
        loaded(folder)


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "plain")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"has no chat template\. Use an instruct model"):
        loaded(folder)


def test_targets_that_fit_no_layer_are_refused_with_the_layers_that_exist(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=r"\['query'\] fit no layer .*q_proj"):
        loaded(tiny_model, lora=LoRA(targets=["query"]))


def test_every_id_that_ends_a_turn_is_an_end_and_the_tokenizers_is_the_one_taught(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    config = folder / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": [0, 2, 77]}))
    lm = loaded(folder)
    assert lm.end_ids == [2, 0, 77]


@pytest.fixture
def converted(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Conversions of GGUF files asked for; each gives the tiny model."""
    asked: list[tuple[Any, ...]] = []

    def convert(*args: Any) -> Path:
        asked.append(args)
        return tiny_model

    monkeypatch.setattr(embedded, "convert_gguf", convert)
    monkeypatch.setattr(embedded, "embedded_model", lambda: convert("embedded"))
    return asked


def test_a_gguf_file_is_converted_and_loaded(tmp_path: Path, converted: list[tuple[Any, ...]]) -> None:
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    assert loaded(tmp_path / "some.gguf").complete(asks("a"), Sampling(max_new_tokens=1))
    loaded(tmp_path, gguf_file="some.gguf")
    assert converted == [(tmp_path, "some.gguf")] * 2


def test_the_default_is_the_embedded_model(
    tmp_path: Path, converted: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = LanguageModel(device="cpu", lora=SMALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedded").mkdir()  # a folder of the user's is not taken for it
    lm.load()
    assert converted == [("embedded",)]
    assert lm.name == "embedded"


def test_a_gguf_file_of_a_hub_repository_is_fetched_first(
    tmp_path: Path, converted: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: str(tmp_path / repo / file))
    LanguageModel("some/one", gguf_file="q4.gguf", device="cpu", lora=SMALL).load()
    assert converted == [(tmp_path / "some/one", "q4.gguf")]


# Quantised bases


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return save_wide_model(tmp_path_factory.mktemp("wide"))


def quantised(folder: Path, kind: str, **settings: Any) -> LanguageModel:
    """The LM, or a skip in bitsandbytes' own words where it refuses this machine."""
    try:
        return loaded(folder, quantization=kind, **settings)
    except QuantizationError as error:
        pytest.skip(str(error))


def digest(lm: LanguageModel) -> dict[str, str]:
    return {
        name: hashlib.sha256(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in lm.model.state_dict().items()
        if isinstance(t, torch.Tensor)
    }


KINDS = [("nf4", {}), ("nf4", {"double_quantization": True}), ("fp4", {}), ("int8", {}), ("nf4", {"dtype": "bfloat16"})]


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")  # it casts to fp16 inside, and says so each time
@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_a_quantised_base_generates_and_then_still_trains(
    wide_model: Path, kind: str, settings: dict[str, Any]
) -> None:
    lm = quantised(wide_model, kind, **settings)
    disturb(lm)
    before = digest(lm)
    first = lm.complete(asks("a", "bb"), Sampling(max_new_tokens=5))
    assert all_gradients(lm)
    assert digest(lm) == before
    assert lm.complete(asks("a", "bb"), Sampling(max_new_tokens=5)) == first


def test_four_bit_layers_are_kept_from_repacking_themselves(wide_model: Path) -> None:
    # On CPUs with AVX512-BF16 alone it would show in the gradients; the flag shows everywhere.
    from bitsandbytes.nn import Linear4bit

    lm = quantised(wide_model, "nf4")
    lm.complete(asks("a"), Sampling(max_new_tokens=2))
    layers = [module for module in lm.model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    assert all(layer.support_avx512bf16_for_cpu is False for layer in layers)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_adapter_of_a_quantised_base_stays_in_full_precision(wide_model: Path, kind: str) -> None:
    lm = quantised(wide_model, kind)
    assert {p.dtype for p in lm.model.parameters() if p.requires_grad} == {torch.float32}
    assert not any(p.requires_grad for name, p in lm.model.named_parameters() if "lora_" not in name)


def test_of_a_quantised_base_only_the_head_is_copied(wide_model: Path) -> None:
    lm = quantised(wide_model, "nf4")
    disturb(lm)
    lm.complete(asks("a"), Sampling(max_new_tokens=2))
    assert [name.rpartition(".")[2] for name in local(lm).merged._copies] == ["lm_head"]


class Thinks(Engine):
    """Thinks, as the model of a template would that leaves thinking open, and answers "red"."""

    def start(self, weights: Weights) -> None:
        self.weights = weights

    def generate(self, prompts: Sequence[Prompted], sampling: Sampling, *, adapter: str) -> list[Generated]:
        return [self.filled(prompt) for prompt in prompts]

    def filled(self, prompt: Prompted) -> Generated:
        codec = self.weights.codec
        filling = Filling(Plan(prompt.layout, codec), max_new_tokens=99, room=200)
        for token in [*codec.encode("hm\n</think>\n\nred"), *codec.end_ids[:1]]:
            filling.take(token)
        assert filling.finished is not None
        return Generated(filling.written, filling.text, filling.finished, tuple(filling.fields))


def test_what_a_model_thinks_stands_beside_its_answer(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "thinks"
    shutil.copytree(tiny_model, folder)
    lm = LanguageModel(str(folder), lora=LoRA(r=2))
    lm.load_tokenizer()
    lm.tokenizer.chat_template = lm.tokenizer.chat_template.replace("assistant\n", "assistant\n<think>\n")
    lm.tokenizer.save_pretrained(folder)
    lm = LanguageModel(str(folder), lora=LoRA(r=2))
    lm.load()
    lm.use(Thinks())
    (done,) = lm.complete([Request([{"role": "user", "content": "which?"}])], Sampling())
    assert (done.thinking, done.text, [field.text for field in done.fields]) == ("hm", "red", ["red"])
    assert "</think>" in lm.tokenizer.decode(done.completion_ids)
