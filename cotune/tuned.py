"""The tuned program: loaded from an export, ready to answer."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cotune.build import build_module
from cotune.callbacks.export_program import FORMAT
from cotune.errors import CotuneError
from cotune.inference.engine import Engine
from cotune.lightning_modules import LanguageModel, ProgramModule
from cotune.lightning_modules.model_source import EMBEDDED
from cotune.programs import Example, NamedValues, Program, Rollout, prompts_from_dict
from cotune.storage.durable import file_sum, read_sums
from cotune.storage.formats import check_format


class ExportError(CotuneError, ValueError):
    """A folder is no export that can be loaded. The message says why, and what to do."""


class Tuned:
    """A tuned program: call it with the program's inputs, and it gives the prediction. Its repr says what it is.

    Attributes:
        module: program, prompts and LM together; its weights are loaded and in eval mode.
        folder: the export that it is from.
    """

    def __init__(self, module: ProgramModule, folder: Path | None = None) -> None:
        self.module, self.folder = module, folder

    def __repr__(self) -> str:
        module = self.module
        lines = [f"{type(module.program).__name__}, tuned" + (f"; from {self.folder}" if self.folder else "")]
        for name, stage in module.program.stages.items():
            demos = len(module.prompts[name].demos)
            lines.append(f"  {name}: {stage.signature}, {demos} demo{'' if demos == 1 else 's'}")
        lines.append(f"  base: {module.lm.name}, adapter: {module.lm.adapter or 'none'}")
        return "\n".join([*lines, *self._scores()])

    def _scores(self) -> list[str]:
        """The run's scores, where its folder is still around the export."""
        path = self.folder.parent / "summary.json" if self.folder else None
        if path is None or not path.is_file():
            return []
        run = _json(path)
        test = "" if run["test_score"] is None else f", test {run['test_score']:.3f}"
        return [f"  scores: val {run['scores'][run['best']]:.3f} after {run['best']}{test}"]

    def __call__(self, **inputs: Any) -> NamedValues:
        """The prediction: what `Program.run` returns, by name and as attributes.

        Raises:
            PredictionError: a completion did not parse, or the program raised.
        """
        return self.rollouts([Example.of(inputs, {})])[0].answer

    def rollouts(self, examples: Sequence[Example]) -> list[Rollout]:
        """Runs many examples together, in few LM batches. Scores are 0; a failure is in `Rollout.error`."""
        return self.module.rollouts(examples, metric=None)


def load(
    folder: str | Path,
    *,
    module: ProgramModule | None = None,
    engine: Engine | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Tuned:
    """Loads what a run exported.

    An export names classes (the program's, the template's), and loading imports them: load exports that you trust.

    Args:
        folder: an export or the folder of its run, e.g. runs/iris/export or runs/iris.
        module: the program and LM that the export belongs to, for a fit from Python; the command line's exports know
            theirs. Its LM must not be loaded yet; it becomes the tuned one.
        engine: what completes the prompts, e.g. a `VLLMServer`; the decoder in this process where none is given,
            whatever the run had.
        device: where the LM is loaded, in place of where the run had it.
        trust_remote_code: run code that comes with the base model. Off even where the run had it on.

    Raises:
        ExportError: no export, one whose weights are damaged, one that does not say how to build its program, or one
            of a program with other stages, of another base or of another tokenizer.
        BuildError: a class that it names cannot be imported or takes other arguments now.
        ModelNotFoundError: the base model is not there.
        NoWeightsError: an engine or a device is given, and the export is of an LM without weights here.

    For example: `cotune.load("runs/iris/export")(petal_length="1.4", petal_width="0.2", …)["answer"]`.
    """
    folder = export_folder(folder)
    described = read_export(folder)
    weights = "asked" not in (described.get("base") or {})
    if weights and not (folder / "adapter" / "adapter_config.json").is_file():
        raise ExportError(f'"{folder}" has no adapter/, only merged weights; export it with --what adapter or all.')
    _check_weights(folder)
    module = module or _build(folder, described["model"], trust_remote_code)
    _check_stages(folder, described["stages"], module.program)
    if engine is not None:
        module.weights.use(engine)
    if device is not None:
        module.weights.device_name = device
    if weights:
        _load_weights(module, folder, described.get("base") or {})
    module.prompts = prompts_from_dict(_json(folder / "prompts.json"))
    module.max_error_rate = 1.0  # no error ends a batch of predictions: each is in its own rollout
    return Tuned(module.eval(), folder)


def _load_weights(module: ProgramModule, folder: Path, base: Mapping[str, Any]) -> None:
    lm = module.weights
    if lm.model is not None:
        raise ExportError(
            "the LM of the given module is already loaded; give a module whose LM is not, or use this one as it is."
        )
    lm.adapter = str(folder / "adapter")  # its own, and not the one that the run began from
    check_base(folder, base, lm)
    with _no_bar():
        module.configure_model()


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without transformers' bar for the reading of weights, which a script's output is no place for."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def export_folder(folder: str | Path) -> Path:
    """The export that a folder is, or, of a run's folder, holds.

    Raises:
        ExportError: it is and holds none.
    """
    folder = Path(folder)
    if (folder / "program.json").is_file():
        return folder
    if (folder / "export" / "program.json").is_file():
        return folder / "export"
    if (folder / "config.yaml").is_file():
        raise ExportError(
            f'"{folder}" is a run without an export, which is written when the fit ends. Finish it first: '
            f"cotune fit --config {folder}/config.yaml"
        )
    found = sorted(str(path.parent.parent) for path in folder.glob("*/export/program.json"))[:5]
    hint = (
        f"Did you mean one of {', '.join(found)}?" if found else "Give a run's folder, e.g. runs/iris, or its export."
    )
    raise ExportError(f'"{folder}" is no export: it has no program.json. {hint}')


def read_export(folder: Path) -> dict[str, Any]:
    """program.json of an export.

    Raises:
        ExportError: a file of the export is missing, or is not JSON.
        FormatError: a newer version of cotune wrote it.
    """
    for name in ("program.json", "prompts.json"):
        if not (folder / name).is_file():
            raise ExportError(f'"{folder}" is an incomplete export: it has no {name}.')
    described = dict(_json(folder / "program.json"))
    fix = "Load it with the version that exported it, or a newer one."
    check_format(folder / "program.json", described.get("format", 1), FORMAT, fix=fix)
    return described


def _check_weights(folder: Path) -> None:
    """Weights that were damaged on their way answer nonsense and raise nothing. Prompts may well be edited by hand."""
    for name, digest in read_sums(folder).items():
        weights = folder / name
        ours = name.startswith("adapter/") and name.endswith(".safetensors")
        if ours and (not weights.is_file() or file_sum(weights) != digest):
            raise ExportError(
                f'"{weights}" has changed since its export (its SHA-256 differs). Copy it or export it again.'
            )


def check_base(folder: Path, base: Mapping[str, Any], lm: LanguageModel) -> None:
    """Refuses an LM that the adapter was not tuned on: it would load where shapes fit, and write nonsense.

    Args:
        base: what the export says of the LM that it was tuned on.

    Raises:
        ExportError: the tokenizer differs, or the files do.
        ModelNotFoundError: as `LanguageModel.load_tokenizer`.
    """
    lm.load_tokenizer()
    same = (lm.name, lm.gguf_file) == (base.get("model"), base.get("gguf_file"))
    fix = "Load the export with the LM that it was tuned on."
    if same:
        fix = "Other files are now in their place: put those back that it was tuned on, or tune again on these."
    if base.get("tokenizer", own := lm.encode.vocabulary(lm.name).tokenizer) != own:
        raise ExportError(
            f'"{folder}" was tuned on "{base["name"]}", whose tokenizer differs from that of "{lm.name}". {fix}'
        )
    # The embedded model and one of the Hub are what their name says. What a path leads to, only its files say, which
    # takes as long as reading them.
    named = same and (lm.name == EMBEDDED or not Path(lm.name).expanduser().exists())
    if "identity" in base and not named and (now := lm.base_identity()) != base["identity"]:
        raise ExportError(
            f'"{folder}" was tuned on "{base["name"]}" ({_short(base["identity"])}), but "{lm.name}" has other files '
            f"({_short(now)}). {fix}"
        )


def _short(identity: str) -> str:
    """A model on the Hub with its commit, or the beginning of the hash of a folder."""
    return identity if "@" in identity else f"SHA-256 {identity[:12]}"


def program_inputs(program: Program) -> tuple[list[str], list[str]]:
    """(required, optional) inputs of a program: the arguments of its `run`.

    A `run(**inputs)` takes what its first stage reads.
    """
    parameters = list(inspect.signature(program.run).parameters.values())
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = [p.name for p in named if p.default is p.empty]
    optional = [p.name for p in named if p.default is not p.empty]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        first = next(iter(program.stages.values()))
        required += [name for name in first.signature.inputs if name not in (*required, *optional)]
    return required, optional


def _build(folder: Path, config: Mapping[str, Any] | None, trust_remote_code: bool) -> ProgramModule:
    if config is None:
        raise ExportError(
            f'"{folder}" was exported from Python, so it does not say how to build its program: '
            "pass it, load(folder, module=ProgramModule(program, lm))."
        )
    config = {**config, "lm": trusted(config["lm"], trust_remote_code), "engine": None}
    return build_module(config, where=str(folder / "program.json"))


def trusted(lm: Mapping[str, Any], trust_remote_code: bool) -> dict[str, Any]:
    """The LM's settings, with the reader's own word on running the model's code."""
    given = dict(lm.get("init_args") or {})
    if trust_remote_code or "trust_remote_code" in given:  # an endpoint has no such thing
        given["trust_remote_code"] = trust_remote_code
    return {**lm, "init_args": given}


def _check_stages(folder: Path, exported: Mapping[str, Mapping[str, Sequence[str]]], program: Program) -> None:
    mine = {name: _fields(s.signature.inputs, s.signature.outputs) for name, s in program.stages.items()}
    theirs = {name: _fields(stage["inputs"], stage["outputs"]) for name, stage in exported.items()}
    wrong = [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]
    if wrong:
        raise ExportError(
            f'"{folder}" was made for other stages: stage "{wrong[0]}" is {theirs.get(wrong[0], "absent")} in '
            f"the export and {mine.get(wrong[0], 'absent')} in {type(program).__name__}. "
            "Load it with the program as it was, or tune the new one."
        )


def _fields(inputs: Sequence[str], outputs: Sequence[str]) -> str:
    return f'"{", ".join(inputs)} -> {", ".join(outputs)}"'


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f'"{path}" is not JSON: {error}.') from error
