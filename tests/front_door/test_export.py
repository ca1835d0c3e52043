"""Claims about `cotune export`: what plain PEFT and plain transformers load writes the tokens that cotune wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from commands import Said
from commands import cotune as command
from cotune.callbacks.export_program import export_program
from cotune.datamodules.tasks.iris import iris_examples
from cotune.lightning_modules import LanguageModel, LoRA, ProgramModule
from cotune.lightning_modules.lora import lora_layers
from cotune.lightning_modules.quantization import QuantizationError, prepare_layers, refusal
from cotune.programs import Completion, Predict, Sampling
from cotune.storage.durable import damaged_file
from cotune.storage.served_adapter import vllm_refusals
from tiny import save_tiny_model, save_wide_model
from tiny_fit import among

import cotune
from cotune.commands.export import write_export

FLOWERS = iris_examples()[::15]
EXPORTED = ("README.md", "program.json", "prompts.json")
SIGNATURE = "petal_length, petal_width, sepal_length, sepal_width -> answer"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: str) -> Said:
        return command(["export", *words], capsys)

    return run


def disturbed(module: ProgramModule) -> ProgramModule:
    """A module whose adapter has something to say."""
    module.configure_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in lora_layers(module.lm.model):
            weight = layer.lora_B["default"].weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    return module


def completions(module: ProgramModule) -> list[Completion]:
    return [step.completion for r in module.rollouts(FLOWERS, metric=None) for step in r.steps]


def continued(
    model: Any, done: Sequence[Completion], end_ids: Sequence[int] | None = None, n: int = 6, among: Any = None
) -> None:
    """Asserts that a plain model writes every completion, token by token; `among` holds it to a field's choices."""
    assert done
    for completion in done:
        prompt = torch.tensor([completion.prompt_ids])
        ends: dict[str, Any] = {} if end_ids is None else {"eos_token_id": list(end_ids), "pad_token_id": 0}
        if among is not None:
            ends["prefix_allowed_tokens_fn"] = lambda _, ids, start=prompt.shape[1]: among(ids[start:].tolist())
        written = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=n, **ends
        )
        got = tuple(written[0, prompt.shape[1] :].tolist())
        end = min(n, len(completion.completion_ids))
        assert got[:end] == completion.completion_ids[:end]


# The same tokens


def test_peft_finds_the_base_by_itself_and_writes_the_same_tokens(export: Path, finished: Any) -> None:
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(str(export / "adapter")).eval()
    continued(model, completions(finished.module), finished.module.lm.end_ids[:1], among=among(finished.module.lm))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_alone_writes_the_same_tokens_with_merged_weights(
    tiny_model: Path, tmp_path: Path, dtype: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm = LanguageModel(str(tiny_model), device="cpu", dtype=dtype, lora=LoRA(r=4))
    module = disturbed(ProgramModule(Predict(SIGNATURE), lm, sampling=Sampling(max_new_tokens=6)))
    done = completions(module)
    export_program(module, tmp_path / "one" / "export")
    write_export(tmp_path / "one" / "export", tmp_path / "out", what="merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged", dtype="auto")
    assert {p.dtype for p in merged.parameters()} == {lm.dtype}
    assert not any("lora" in name for name, _ in merged.named_parameters())
    if dtype == "float32":
        continued(merged, done)  # its own generation config says where to end
    else:  # sums are rounded at other places; the first token shows that it is the same model
        continued(merged, done[:1], n=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "merged")
    step = module.rollouts(FLOWERS[:1], metric=None)[0].steps[0]
    rendered = tokenizer.apply_chat_template(list(step.messages), add_generation_prompt=True, tokenize=False)
    assert tokenizer(rendered, add_special_tokens=False)["input_ids"] == list(step.completion.prompt_ids)
    assert not (tmp_path / "out" / "adapter").exists()


def test_the_merged_model_ends_and_draws_as_the_program_did(export: Path, run: Any, finished: Any) -> None:
    assert run(str(export.parent), "--what", "all").code == 0
    assert damaged_file(export) == ""
    settings = json.loads((export / "merged" / "generation_config.json").read_text())
    assert settings["max_new_tokens"] == finished.module.sampling.max_new_tokens
    assert not settings.get("do_sample")
    assert 2 in settings["eos_token_id"]


# Quantised bases


def quantised(folder: Path, kind: Any) -> ProgramModule:
    if why := refusal(kind, "cpu"):
        pytest.skip(why)
    lm = LanguageModel(str(folder), device="cpu", quantization=kind, lora=LoRA(r=4))
    return disturbed(ProgramModule(Predict(SIGNATURE), lm, sampling=Sampling(max_new_tokens=6)))


def test_on_request_the_adapter_of_a_quantised_base_is_merged_into_the_unrounded_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    wide = save_wide_model(tmp_path / "wide")
    module = quantised(wide, "nf4")
    export_program(module, tmp_path / "one" / "export")
    card = write_export(tmp_path / "one" / "export", tmp_path / "out", what="merged", unrounded=True)
    assert card.merged_into == "the unquantised base in float32"
    name = "model.layers.0.self_attn.q_proj"
    merged, base = load_file(tmp_path / "out/merged/model.safetensors"), load_file(wide / "model.safetensors")
    layer = dict(lora_layers(module.lm.model))[f"base_model.model.{name}"]
    expected = base[f"{name}.weight"] + layer.get_delta_weight("default")
    assert torch.allclose(merged[f"{name}.weight"], expected, atol=1e-6)
    assert "quantization_config" not in json.loads((tmp_path / "out/merged/config.json").read_text())
    assert "bitsandbytes nf4" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_merged_weights_of_a_quantised_run_are_rounded_as_in_it_and_write_the_same_tokens(
    tmp_path: Path, kind: Any
) -> None:
    from transformers import AutoModelForCausalLM

    module = quantised(save_wide_model(tmp_path / "wide"), kind)
    export_program(module, tmp_path / "one" / "export")
    card = write_export(tmp_path / "one" / "export", tmp_path / "out", what="merged")
    assert card.merged_into == f"the bitsandbytes {kind} weights of the base, unpacked to float32"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged", dtype="auto")
    continued(merged, completions(module))
    assert "rounded as it was while tuning" in (tmp_path / "out" / "README.md").read_text()


def test_the_cards_own_lines_for_peft_write_the_same_tokens_beside_a_quantised_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = quantised(save_wide_model(tmp_path / "wide"), "nf4")
    export_program(module, tmp_path / "one" / "export")
    write_export(tmp_path / "one" / "export", tmp_path / "one" / "export")
    text = (tmp_path / "one" / "export" / "README.md").read_text()
    code = text.partition("PEFT:\n\n```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path / "one")
    names: dict[str, Any] = {}
    exec(code.replace('"one/adapter"', '"export/adapter"'), names)
    prepare_layers(names["model"], dtype=torch.float32)  # with AVX512-BF16 they would compute in bfloat16
    continued(names["model"].eval(), completions(module), module.lm.end_ids)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_checkpoint_that_exists_only_quantised_is_unpacked_and_merged(tmp_path: Path, kind: Any) -> None:
    from transformers import AutoModelForCausalLM

    saved = quantised(save_wide_model(tmp_path / "wide"), kind).lm
    saved.model.unload().save_pretrained(tmp_path / "pre")
    saved.tokenizer.save_pretrained(tmp_path / "pre")
    lm = LanguageModel(str(tmp_path / "pre"), device="cpu", lora=LoRA(r=4))
    module = disturbed(ProgramModule(Predict(SIGNATURE), lm, sampling=Sampling(max_new_tokens=6)))
    export_program(module, tmp_path / "one" / "export")
    card = write_export(tmp_path / "one" / "export", tmp_path / "out", what="merged")
    assert card.merged_into == f"the bitsandbytes {kind} weights of the base, unpacked to float32"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged", dtype="auto")
    assert not getattr(merged, "is_quantized", False)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    if kind == "nf4":  # the very weights that cotune ran with; int8 also rounds what goes in
        continued(merged, completions(module))


def test_a_base_that_cannot_be_unpacked_is_refused_with_the_reason(
    export: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "gptq")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    described = json.loads((export / "program.json").read_text())
    described["base"] |= {"model": str(folder), "identity": LanguageModel(str(folder)).base_identity()}
    (export / "program.json").write_text(json.dumps(described))
    with pytest.raises(QuantizationError, match=r"is quantised as gptq, and nothing can be added .*--what adapter"):
        write_export(export, tmp_path / "out", what="merged")
    assert not (tmp_path / "out" / "merged").exists()


def test_other_weights_in_the_bases_folder_are_neither_loaded_nor_merged(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    lm = LanguageModel(str(base), device="cpu", lora=LoRA(r=4))
    export_program(disturbed(ProgramModule(Predict(SIGNATURE), lm)), tmp_path / "export")
    save_tiny_model(base, seed=9)
    wrong = r"was tuned on .*base\" \(SHA-256 \w+\), but .*base\" has other files \(SHA-256 \w+\)\. .* put those back"
    with pytest.raises(cotune.tuned.ExportError, match=wrong):
        cotune.load(tmp_path / "export", module=ProgramModule(Predict(SIGNATURE), LanguageModel(str(base))))
    with pytest.raises(cotune.tuned.ExportError, match=wrong):
        write_export(tmp_path / "export", tmp_path / "out", what="merged")
    assert not (tmp_path / "out" / "merged").exists()


# What others read


def test_the_card_says_scores_with_n_base_data_and_how_to_load(export: Path, run: Any) -> None:
    said = run(str(export.parent), "--what", "all", "--base-model", "someone/tiny", "--license", "mit")
    assert said.code == 0, said.err
    text = (export / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert (matter["base_model"], matter["license"], matter["library_name"]) == ("someone/tiny", "mit", "peft")
    summary = json.loads((export.parent / "summary.json").read_text())
    for prefix, score in summary["scores"].items():
        assert f"| {prefix}{' (exported)' if prefix == summary['best'] else ''} | {score:.3f} | 8 |" in body
    assert f"**{summary['test_score']:.3f}** (n = 4)" in body
    assert "| data | cotune.datamodules.tasks.iris.Iris |" in body
    assert "| examples | train 12, dev 6, val 8, test 4 |" in body
    assert "More Information Needed" not in text
    for tool in (
        "cotune.load",
        "PeftModel.from_pretrained",
        'from_pretrained("tiny/merged"',
        "vllm serve someone/tiny",
    ):
        assert tool in body
    assert not (export / "adapter" / "README.md").exists()


def test_the_card_describes_the_parts_that_are_there(export: Path, run: Any, hub: type[FakeHub]) -> None:
    def told(out: Path) -> tuple[bool, bool]:
        text = (out / "README.md").read_text()
        return "PeftModel.from_pretrained" in text, "`merged/` is the adapter added to the" in text

    for what, both in (("merged", True), ("adapter", True)):
        assert run(str(export.parent), "--what", what).code == 0
        assert told(export) == (True, both)
        assert (export / "adapter").is_dir()
        assert (export / "merged").is_dir()
    for what, there in (("all", (True, True)), ("merged", (False, True)), ("adapter", (True, False))):
        assert run(str(export), "--what", what, "--out", "out").code == 0
        assert told(Path("out")) == there == (Path("out/adapter").is_dir(), Path("out/merged").is_dir())
    run(str(export), "--what", "merged", "--push-to-hub", "me/tiny")
    assert "PeftModel.from_pretrained" not in hub.pushed[0]["card"]
    assert told(export) == (True, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dtype", "bfloat16"], "--dtype bfloat16 is about merged weights, and --what adapter writes none"),
        (["--unrounded", "--what", "adapter"], "--unrounded is about merged weights"),
        (["--public", "--what", "all"], "--public is about a repository on the Hub; add --push-to-hub USER/REPO"),
    ],
)
def test_an_option_of_something_else_is_refused(export: Path, run: Any, words: list[str], message: str) -> None:
    said = run(str(export.parent), "--out", "out", *words)
    assert said.code == 2
    assert message in said.err
    assert not Path("out").exists()


def test_the_adapters_config_is_the_same_from_run_to_run_and_takes_the_name_it_is_given(export: Path, run: Any) -> None:
    def config() -> dict[str, Any]:
        return json.loads((export / "adapter" / "adapter_config.json").read_text())

    assert config()["target_modules"] == sorted(config()["target_modules"])
    assert Path(config()["base_model_name_or_path"]).is_absolute()
    assert run(str(export), "--base-model", "someone/tiny").code == 0
    assert config()["base_model_name_or_path"] == "someone/tiny"
    assert vllm_refusals(config()) == []


def test_the_embedded_model_goes_by_its_name_on_the_hub(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    from cotune.callbacks.export_program import describe_base
    from cotune.lightning_modules import embedded

    monkeypatch.setattr(embedded, "embedded_model", lambda: tiny_model)
    lm = LanguageModel(device="cpu", lora=LoRA(r=4))
    lm.load()
    assert describe_base(lm)["name"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert describe_base(lm)["on_hub"] is True


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"use_dora": True}, ["it is a DoRA"]),
        ({"modules_to_save": ["lm_head"]}, ["it trains whole modules (lm_head)"]),
        ({"bias": "all"}, ["it trains biases"]),
        ({"r": 513}, ["its rank 513 is above 512"]),
        ({"use_rslora": True}, []),
    ],
)
def test_what_vllm_refuses_is_said(config: dict[str, Any], why: list[str]) -> None:
    assert vllm_refusals({"r": 8, **config}) == why


def test_an_export_elsewhere_is_loaded_as_the_run(export: Path, run: Any, finished: Any) -> None:
    said = run(str(export.parent), "--out", "elsewhere")
    assert said.code == 0, said.err
    assert damaged_file(Path("elsewhere")) == ""
    assert cotune.load("elsewhere").module.lm.fingerprint() == finished.module.lm.fingerprint()
    # A second time replaces; a folder of other things is left alone.
    assert run(str(export.parent), "--out", "elsewhere").code == 0
    Path("mine").mkdir()
    Path("mine", "thesis.tex").touch()
    said = run(str(export.parent), "--out", "mine")
    assert said.code == 2
    assert '--out "mine" holds other files' in said.err


def test_merged_weights_alone_are_no_program_to_load(export: Path, run: Any) -> None:
    assert run(str(export.parent), "--what", "merged", "--out", "alone").code == 0
    with pytest.raises(cotune.tuned.ExportError, match=r"has no adapter/, only merged weights"):
        cotune.load("alone")


# The Hub


class FakeHub:
    """The two methods of HfApi that a push needs; keeps what it is given."""

    error: Exception | None = None
    pushed: list[dict[str, Any]] = []  # noqa: RUF012

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> str:
        if self.error:
            raise self.error
        self.pushed.append({"repo": repo, "private": private})
        return f"https://huggingface.co/{repo}"

    def upload_folder(self, *, repo_id: str, folder_path: str, allow_patterns: list[str], commit_message: str) -> None:
        from fnmatch import fnmatch

        files = sorted(p.relative_to(folder_path).as_posix() for p in Path(folder_path).rglob("*") if p.is_file())
        self.pushed[-1]["card"] = Path(folder_path, "README.md").read_text()
        self.pushed[-1]["files"] = [f for f in files if any(fnmatch(f, pattern) for pattern in allow_patterns)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    monkeypatch.setattr(FakeHub, "pushed", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setenv("HF_TOKEN", "canary-456")
    return FakeHub


def test_a_push_uploads_what_was_asked_for_and_writes_no_token(export: Path, run: Any, hub: type[FakeHub]) -> None:
    run(str(export.parent), "--what", "merged")
    (export / "notes.txt").write_text("mine")
    said = run(str(export.parent), "--base-model", "someone/tiny", "--push-to-hub", "me/tiny")
    assert said.code == 0, said.err
    (pushed,) = hub.pushed
    assert (pushed["repo"], pushed["private"]) == ("me/tiny", True)
    adapter = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    assert pushed["files"] == ["README.md", *adapter, "program.json", "prompts.json"]
    assert "pushed to https://huggingface.co/me/tiny" in said.out
    assert not [p for p in export.rglob("*") if p.is_file() and b"canary-456" in p.read_bytes()]
    assert run(str(export.parent), "--what", "merged", "--push-to-hub", "me/two", "--public").code == 0
    assert hub.pushed[1]["private"] is False
    assert "merged/model.safetensors" in hub.pushed[1]["files"]


def test_an_adapter_whose_base_nobody_else_has_is_not_pushed(export: Path, run: Any, hub: type[FakeHub]) -> None:
    said = run(str(export.parent), "--push-to-hub", "me/tiny")
    assert said.code == 2
    assert "--base-model USER/MODEL" in said.err
    assert not hub.pushed


def test_a_hub_that_refuses_is_explained(
    export: Path, run: Any, hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "error", huggingface_hub.errors.LocalTokenNotFoundError("no token\nat all"))
    said = run(str(export.parent), "--base-model", "a/b", "--push-to-hub", "me/tiny")
    assert said.code == 2
    assert 'the Hub did not take "me/tiny" (no token). Log in with `hf auth login` or set HF_TOKEN' in said.err


# The embedded model


@pytest.mark.slow
def test_the_embedded_model_merged_writes_the_tokens_of_the_tuned_program(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    module = disturbed(
        ProgramModule(Predict(SIGNATURE), LanguageModel(device="cpu"), sampling=Sampling(max_new_tokens=6))
    )
    export_program(module, tmp_path / "one" / "export")
    write_export(tmp_path / "one" / "export", tmp_path / "out", what="merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged", dtype="auto")
    continued(merged, completions(module))
