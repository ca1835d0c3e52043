"""What the product uses of libraries that they do not promise: it stands in one file per library, and is there.

Everything with a leading underscore counts, and so do the names in UNDOCUMENTED. Of Lightning's loops their public
limits alone are touched.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from argparse import ArgumentError
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cotune.callbacks import Alternate
from cotune.inference.local import peft_internals as of_peft
from cotune.inference.local import torch_internals as of_torch
from cotune.inference.local import transformers_internals as of_transformers
from cotune.lightning_modules import LanguageModel, LoRA
from cotune.lightning_modules.lora import attach
from cotune.programs import Form
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers.csv_logs import CSVLogger, ExperimentWriter
from sources import nodes, parsed
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from cotune.fit.help_page import options_of

ROOT = Path(__file__).resolve().parents[1]
HOUSE = [
    ROOT / "cotune",
    *(path.resolve() for path in (ROOT / "cotune").iterdir() if path.is_symlink() and path.is_dir()),
]

READ_FROM = {
    "inference/local/peft_internals.py": ("peft", "0.21.2"),
    "inference/local/torch_internals.py": ("torch", "2.13.0"),
    "inference/local/transformers_internals.py": ("transformers", "5.23.0"),
    "lightning_modules/lightning_internals.py": ("lightning", "2.6.6"),
    "cotune/fit/help_page.py": ("jsonargparse", "4.53.0"),
}
"""File -> the one library whose private names it uses, and the version that they were read from."""

UNDOCUMENTED = {
    *("AuxiliaryTrainingWrapper", "LoraLayer", "ModulesToSaveWrapper", "get_delta_weight", "lora_A", "lora_B"),
    *(
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_variant",
        "original_module",
        "reset_lora_parameters",
    ),
    *("inv_freq", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_mkldnn", "max_seq_len_cached", "original_max_seq_len"),
}
"""Names without an underscore that no page of their library's documentation has."""

DOCUMENTED = {"_exit"}
"""`os._exit` is Python's documented way to end without cleaning up."""


def trees() -> Iterator[tuple[str, ast.Module]]:
    for room in HOUSE:
        for path in sorted(room.rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), parsed(path)


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def own_names() -> set[str]:
    """What the product itself defines: functions, classes, fields, and attributes of self."""
    found: set[str] = set()
    for _, tree in trees():
        for node in nodes(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id in ("self", "made"):
                    found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return found


def touched(tree: ast.Module) -> set[str]:
    """Private and undocumented names that are read off an object, imported, or asked for by getattr and the like."""
    found: set[str] = set()
    for node in nodes(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("cotune"):
            found |= {name for alias in node.names for name in (alias.name, *(node.module or "").split("."))}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return {name for name in found if private(name) or name in UNDOCUMENTED} - DOCUMENTED


def test_private_names_of_libraries_are_used_in_one_file_each() -> None:
    own = own_names()
    assert {path: found for path, tree in trees() if path not in READ_FROM and (found := touched(tree) - own)} == {}


def test_private_methods_of_libraries_are_overridden_in_one_file_each() -> None:
    found = set()
    for path, tree in trees():
        if not any(isinstance(node, ast.ClassDef) and node.bases for node in tree.body):
            continue
        module = importlib.import_module("cotune." + path.removesuffix(".py").removeprefix("cotune/").replace("/", "."))
        for cls in vars(module).values():
            if inspect.isclass(cls) and cls.__module__ == module.__name__:
                foreign = [base for base in cls.__mro__ if not base.__module__.startswith("cotune")]
                names = {name for name, value in vars(cls).items() if private(name) and inspect.isfunction(value)}
                found |= {(path, name) for base in foreign for name in names & set(vars(base))}
    assert {path for path, _ in found} <= set(READ_FROM), found


def reached(tree: ast.Module, loop: str) -> set[str]:
    """Attributes taken of an attribute of this name; "" where it is taken and handed on."""
    names, whole = set(), set()
    for node in nodes(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr == loop:
            names.add(node.attr)
            whole.add(id(node.value))
    handed_on = {
        "" for node in nodes(tree) if isinstance(node, ast.Attribute) and node.attr == loop and id(node) not in whole
    }
    return names | handed_on


def keys(tree: ast.Module) -> set[str]:
    """Constants in the product that name a part of a checkpoint's loops."""
    texts = {node.value for node in nodes(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in texts if text == "loops" or "batch_progress" in text or "epoch_loop" in text}


def test_of_lightnings_loops_their_public_limits_alone_are_touched() -> None:
    assert set().union(*(reached(tree, "fit_loop") for _, tree in trees())) == {"max_epochs", "epoch_loop"}
    assert set().union(*(reached(tree, "epoch_loop") for _, tree in trees())) == {"max_steps"}
    for loop in ("val_loop", "batch_progress", "epoch_progress"):
        assert {str(path): found for path, tree in trees() if (found := reached(tree, loop))} == {}, loop
    assert {str(path): found for path, tree in trees() if (found := keys(tree))} == {}


def test_the_large_classes_hold_few_things() -> None:
    assert len(vars(Alternate())) < 20
    assert len({*vars(LanguageModel())} - {*vars(torch.nn.Module())}) < 20


# What is used is there. The messages name the version that it was read from.


def read_from(library: str) -> str:
    (read,) = [number for name, number in READ_FROM.values() if name == library]
    return f"read from {library} {read}, and {version(library)} is installed"


def test_lightning_calls_what_is_overridden() -> None:
    for method, called in (
        (LightningCLI.__init__, ("self._parse_ckpt_path()", "self._set_seed()")),
        (ExperimentWriter.__mro__[1].__init__, ("self._check_log_dir_exists()",)),
        (ExperimentWriter.save, ("self._rewrite_with_new_header(",)),
        (CSVLogger.finalize, ("self._experiment is None",)),
        (RichProgressBar.on_train_epoch_start, ("self._get_train_description(",)),
        (RichProgressBar.teardown, ("self._stop_progress()",)),
    ):
        source = inspect.getsource(method)
        assert all(one in source for one in called), (method.__qualname__, called, read_from("lightning"))


def test_a_parser_tells_its_options() -> None:
    parser = LightningArgumentParser(add_help=False)
    parser.add_class_arguments(LoRA, "lora")
    assert options_of(parser)["lora.r"] is int, read_from("jsonargparse")
    for name in ("_action_groups", "_option_string_actions"):
        assert getattr(parser, name), (name, read_from("jsonargparse"))
    assert any(group._group_actions for group in parser._action_groups), read_from("jsonargparse")


def test_torchs_kernels_compute_what_its_public_functions_do() -> None:
    queries, keys, values, gradient = torch.randn(4, 1, 2, 5, 8, generator=torch.Generator().manual_seed(1))
    given = [tensor.clone().requires_grad_() for tensor in (queries, keys, values)]
    expected = F.scaled_dot_product_attention(*given, is_causal=True, scale=0.3)
    read, lse = of_torch.flash(queries, keys, values, scale=0.3, causal=True)
    assert torch.allclose(read, expected, atol=1e-5), read_from("torch")
    found = of_torch.flash_backward(gradient, queries, keys, values, read, lse, scale=0.3, causal=True)
    for one, other in zip(found, torch.autograd.grad(expected, given, gradient), strict=True):
        assert torch.allclose(one, other, atol=1e-5), read_from("torch")
    weight, bias = queries[0, 0], torch.ones(5)
    laid_out = of_torch.onednn_layout(weight, 5)
    assert of_torch.is_laid_out(laid_out)
    made = of_torch.onednn_product(keys[0, 0], laid_out, bias)
    assert torch.allclose(made, F.linear(keys[0, 0], weight, bias), atol=1e-5), read_from("torch")
    assert of_torch.onednn_has_bf16() in (True, False)
    before = of_torch.written(weight)
    weight.add_(1)
    assert of_torch.written(weight) != before, read_from("torch")


def test_transformers_models_know_what_is_asked_of_them() -> None:
    why = read_from("transformers")
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2)
    model: Any = LlamaForCausalLM(config)
    assert {"_name_or_path", "_commit_hash"} & set(vars(model.config)), why
    before = of_transformers.attention_of(model.config)
    with of_transformers.attending_by(model.config, "eager"):
        assert model.model.layers[0].self_attn.config._attn_implementation == "eager", why
    assert of_transformers.attention_of(model.config) == before
    assert type(of_transformers.random_like(model)(config)) is LlamaForCausalLM, why
    assert not of_transformers.holds_adapter(model)
    assert hasattr(model, "_hf_peft_config_loaded"), why
    config._commit_hash = "abc"
    assert of_transformers.commit_of(config) == "abc"
    for bits in (4, 8):
        assert of_transformers.bits_of(BitsAndBytesConfig(**{f"load_in_{bits}bit": True}).to_dict()) == bits, why
    of_transformers.make_plain(model, "there")
    assert model.config.name_or_path == "there", why


def test_a_rotary_embedding_that_has_grown_begins_anew() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=8, rope_parameters=rope)
    model = LlamaForCausalLM(config)
    first = model.model.rotary_emb.inv_freq.clone()
    with torch.no_grad():
        model(torch.ones(1, 12, dtype=torch.long))
    assert not torch.equal(model.model.rotary_emb.inv_freq, first), "it grows"
    with of_transformers.alone(model):
        assert torch.equal(model.model.rotary_emb.inv_freq, first), read_from("transformers")


def test_pefts_layers_hold_what_is_read_of_them() -> None:
    why = read_from("peft")
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model: Any = attach(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)), LoRA(r=2, alpha=6), seed=0)
    layers = of_peft.lora_layers(model)
    assert len(layers) == 7, why
    _, layer = layers[0]
    assert of_peft.shape(layer, "default") == (2, 6), why
    assert of_peft.shape(layer, "other") is None
    assert of_peft.factors(layer) == [("default", 3.0)], why
    a, b, scale = of_peft.plain_adapter(layer) or pytest.fail(why)
    assert not b.any(), why
    b.data.fill_(0.5)
    assert of_peft.adds_only(layer)
    assert torch.allclose(of_peft.added(layer), scale * b @ a), why
    rows = torch.randn(3, 8)
    assert torch.equal(of_peft.without_adapter(model)[layer](rows), layer.get_base_layer()(rows)), why
    before = a.clone()
    of_peft.draw_anew(layer)
    assert not b.any(), why
    assert not torch.equal(a, before), why
    assert of_peft.trained_whole(model) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lora.rr", "3"], "unrecognized arguments: --lora.rr 3"),
        (["--config", "typo.yaml"], "Group 'lora' does not accept option 'rr'"),
        (["--number", "x"], "Parser key \"number\":\n  Expected a <class 'int'>. Got value: x"),
        (["--maybe", "x"], "Errors:\n    - Expected a <class 'int'>\n"),
        (["--maybe", "x"], "Given value: x"),
        (["--lora", "5"], 'Unable to load config "5"'),
        (["--form", "Nothing"], "Expected a dot import path string: Nothing"),
        (["--form", "no.such.Form"], "Problem with given class_path 'no.such.Form':\n    No module named 'no'"),
        (["--form", "cotune.Example"], "Import path cotune.Example does not correspond to a subclass of Form"),
        (["--call", "cotune.no"], "expects a function or a callable class: module 'cotune' has no attribute 'no'. Got"),
        ([], "the following arguments are required: number"),
    ],
)
def test_a_parser_says_what_is_read_of_its_errors(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("typo.yaml").write_text("lora:\n  rr: 3\n")
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(LoRA, "lora")
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--maybe", type=int | None)
    parser.add_argument("--form", type=Form)
    parser.add_argument("--call", type=Callable[[int], float])
    number = [] if "--number" in words or not words else ["--number", "1"]
    with pytest.raises(ArgumentError) as error:
        parser.parse_args([*number, *words])
    assert said in str(error.value), read_from("jsonargparse")


@pytest.mark.parametrize("path", READ_FROM)
def test_each_file_of_private_names_is_there(path: str) -> None:
    assert (ROOT / path).is_file()
