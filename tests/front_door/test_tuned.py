"""Claims about exports: what `cotune.load` gives is what the run ended with."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cotune.callbacks.export_program import export_program
from cotune.datamodules.tasks.iris import iris_examples
from cotune.programs import PredictionError, Rollout
from tiny import save_tiny_model
from tiny_fit import CurtLM, among

import cotune
from cotune import LanguageModel, Predict, ProgramModule
from cotune.build import BuildError
from cotune.tuned import ExportError, Tuned, program_inputs

SIGNATURE = "petal_length, petal_width, sepal_length, sepal_width -> answer"
FLOWERS = iris_examples()[::15]


@pytest.fixture(scope="module")
def tuned(finished: Any) -> Tuned:
    return cotune.load(finished.export)


def ids(rollouts: list[Rollout]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(step.completion.prompt_ids, step.completion.completion_ids) for r in rollouts for step in r.steps]


def test_a_loaded_export_reads_and_writes_the_tokens_of_the_run(finished: Any, tuned: Tuned) -> None:
    assert finished.module.lm.fingerprint() == tuned.module.lm.fingerprint()
    assert finished.module.prompts == tuned.module.prompts
    assert ids(tuned.rollouts(FLOWERS)) == ids(finished.module.rollouts(FLOWERS, metric=None))


def test_an_export_is_whole_without_the_adapter_that_its_run_began_from(finished: Any) -> None:
    lm = LanguageModel(finished.module.lm.name, adapter="archived/adapter", lora=finished.module.lm.lora, device="cpu")
    loaded = cotune.load(finished.export, module=ProgramModule(finished.module.program, lm))
    assert loaded.module.lm.fingerprint() == finished.module.lm.fingerprint()


def test_its_repr_says_what_it_is(finished: Any, tuned: Tuned, tmp_path: Path) -> None:
    first, stage, lm, scores = repr(tuned).splitlines()
    assert first == f"Predict, tuned; from {finished.export}"
    assert stage.startswith(f"  predict: {SIGNATURE}: Literal['setosa', 'versicolor', 'virginica'], ")
    assert stage.endswith((" demo", " demos"))
    assert lm == f"  base: {finished.module.lm.name}, adapter: {finished.export / 'adapter'}"
    assert re.fullmatch(r"  scores: val \d\.\d{3} after p -> w -> p, test \d\.\d{3}", scores)
    assert len(repr(Tuned(tuned.module, tmp_path / "moved")).splitlines()) == 3, "without its run it has no scores"


def test_loading_writes_nothing_and_leaves_transformers_bar_as_it_was(
    finished: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import logging

    monkeypatch.setattr(logging, "_tqdm_active", True)
    cotune.load(finished.export)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()


def test_the_run_has_trained_weights(finished: Any, tiny_model: Path) -> None:
    fresh = CurtLM(str(tiny_model))
    fresh.load()
    assert fresh.fingerprint() != finished.module.lm.fingerprint()


def test_peft_alone_loads_the_adapter_and_writes_the_same_tokens(finished: Any, tuned: Tuned, tiny_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = PeftModel.from_pretrained(base, str(finished.export / "adapter")).eval()
    allowed = among(tuned.module.lm)
    for prompt, completion in ids(tuned.rollouts(FLOWERS)):
        start = len(prompt)
        written = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=tuned.module.lm.end_ids[:1],
            pad_token_id=0,
            prefix_allowed_tokens_fn=lambda _, ids, start=start: allowed(ids[start:].tolist()),
        )
        assert tuple(written[0, len(prompt) :].tolist())[: len(completion)] == completion


def test_a_tuned_program_is_called_with_its_inputs(tuned: Tuned) -> None:
    flower = next(r for r in tuned.rollouts(FLOWERS) if r.error is None)
    assert tuned(**flower.example.inputs) == flower.prediction


def test_a_call_without_a_prediction_raises(tuned: Tuned) -> None:
    with pytest.raises(PredictionError, match='stage "predict"'):
        tuned(**dict.fromkeys(FLOWERS[0].inputs, "1" * 2000))


def test_an_export_from_python_is_loaded_with_its_program(finished: Any, tiny_model: Path, tmp_path: Path) -> None:
    export_program(finished.module, tmp_path / "export")
    with pytest.raises(ExportError, match=r"load\(folder, module=ProgramModule"):
        cotune.load(tmp_path / "export")
    module = ProgramModule(Predict(SIGNATURE), CurtLM(str(tiny_model)), sampling=finished.module.sampling)
    loaded = cotune.load(tmp_path / "export", module=module)
    # The instructions are the export's, not those of the program at hand.
    assert loaded.module.prompts == finished.module.prompts
    assert loaded.module.lm.fingerprint() == finished.module.lm.fingerprint()


def test_a_program_with_other_stages_is_refused(finished: Any, tiny_model: Path) -> None:
    other = ProgramModule(Predict("petal_length -> answer"), CurtLM(str(tiny_model)))
    with pytest.raises(ExportError, match=r'stage "predict" is "petal_length, .* in the export and "petal_length ->'):
        cotune.load(finished.export, module=other)


def test_a_module_that_is_loaded_is_refused(finished: Any) -> None:
    with pytest.raises(ExportError, match="already loaded"):
        cotune.load(finished.export, module=finished.module)


def test_the_folder_of_a_run_stands_for_its_export(finished: Any, tuned: Tuned) -> None:
    assert cotune.load(finished.folder).module.lm.fingerprint() == tuned.module.lm.fingerprint()


def test_a_folder_that_is_no_export_says_so(finished: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no program\.json\. Did you mean one of .*tiny\?"):
        cotune.load(finished.folder.parent)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ExportError, match=r"a run without an export.*config\.yaml$"):
        cotune.load(tmp_path)


def test_an_export_may_not_switch_on_the_code_of_a_model(finished: Any, tmp_path: Path) -> None:
    shutil.copytree(finished.export, tmp_path / "export")
    path = tmp_path / "export" / "program.json"
    described = json.loads(path.read_text())
    described["model"]["lm"]["init_args"]["trust_remote_code"] = True
    path.write_text(json.dumps(described))
    assert cotune.load(path.parent).module.lm.trust_remote_code is False


def test_a_class_that_is_gone_is_named(finished: Any, tmp_path: Path) -> None:
    shutil.copytree(finished.export, tmp_path / "export")
    path = tmp_path / "export" / "program.json"
    path.write_text(path.read_text().replace("cotune.programs.Predict", "my_program.Mine"))
    with pytest.raises(BuildError, match=r"my_program\.Mine.*start in the folder"):
        cotune.load(path.parent)


def test_an_export_is_replaced_as_a_whole(finished: Any, tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "old").touch()
    export_program(finished.module, tmp_path / "export")
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [
        *("SHA256SUMS", "adapter", "program.json", "prompts.json")
    ]


def test_an_adapter_that_was_damaged_on_its_way_is_not_loaded(finished: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(finished.export, tmp_path / "export")
    prompts = folder / "prompts.json"
    prompts.write_text(prompts.read_text().replace("Classify", "Name"))
    assert "Name" in cotune.load(folder).module.prompts["predict"].instruction, "prompts may be edited"
    weights = folder / "adapter" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(
        ExportError, match=r"adapter_model\.safetensors\" has changed since its export .* export it again"
    ):
        cotune.load(folder)


def test_the_inputs_of_a_program_are_the_arguments_of_run() -> None:
    class Own(Predict):
        def run(self, question: str, hint: str = "none") -> Any:
            return (yield self.predict(question=question))

    assert program_inputs(Own("question -> answer")) == (["question"], ["hint"])
    assert program_inputs(Predict("context, question -> answer")) == (["context", "question"], [])


def test_an_export_is_refused_on_another_tokenizer_and_on_another_base_of_the_same_shape(
    finished: Any, tmp_path: Path
) -> None:
    program = finished.module.program
    backwards = save_tiny_model(tmp_path / "backwards", backwards=True)
    with pytest.raises(ExportError, match=r"tuned on .*, whose tokenizer differs from that of .*backwards"):
        cotune.load(finished.export, module=ProgramModule(program, CurtLM(str(backwards), device="cpu")))
    other = save_tiny_model(tmp_path / "other", seed=9)
    with pytest.raises(ExportError, match=r"tuned on .*other\" has other files"):
        cotune.load(finished.export, module=ProgramModule(program, CurtLM(str(other), device="cpu")))
