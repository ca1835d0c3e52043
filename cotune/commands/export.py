"""cotune export: a run's result as others load it: adapter, merged weights, model card, and a push to the Hub."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cotune.errors import BadValueError

if TYPE_CHECKING:  # the command line is parsed before anything heavy is imported
    from cotune.lightning_modules import LanguageModel
    from cotune.reporting.model_card import Card

_FILES = ("README.md", "program.json", "prompts.json")


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        "cotune export",
        allow_abbrev=False,
        description="Exports a run's result for other tools: adapter/ for PEFT and vLLM, merged/ with whole "
        "weights for transformers and others, and README.md, a model card with scores, data and settings. "
        "Exit codes: 0, or 2 for an error that the message explains.",
    )
    made.add_argument("run", metavar="FOLDER", help="a run's folder or its export, e.g. runs/iris")
    made.add_argument(
        "--out",
        metavar="DIR",
        help="where to write; replaces an earlier export there, all its parts (default: the run's own export folder, "
        "in which the parts that are not asked for stay)",
    )
    made.add_argument("--what", choices=("adapter", "merged", "all"), default="adapter", help="default: adapter")
    made.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the merged weights (default: the run's)",
    )
    made.add_argument(
        "--unrounded",
        action="store_true",
        help="merge into the base before quantization; by default the base is rounded as in the run, so the merged "
        "model writes what the run's program wrote",
    )
    made.add_argument("--base-model", metavar="ID", help="Hub id of the base, if the run used a local folder")
    made.add_argument("--license", default="", metavar="NAME", help="for the model card, e.g. apache-2.0")
    made.add_argument(
        "--push-to-hub",
        metavar="USER/REPO",
        help="upload it, with the token of `hf auth login` or HF_TOKEN; a new repository is private",
    )
    made.add_argument("--public", action="store_true", help="make a new repository public")
    made.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the base model")
    return made


def main(options: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        BadValueError: an option belongs to another one that is not given.
        ExportError: the folder holds no export, or the Hub refuses.
        ModelNotFoundError, QuantizationError: merged weights are asked for, and the base cannot be read or merged.
    """
    _check_options(options)
    from cotune.tuned import export_folder

    export = export_folder(options.run)
    out = Path(options.out) if options.out else export
    card = write_export(
        export,
        out,
        what=options.what,
        dtype=options.dtype,
        unrounded=options.unrounded,
        base_model=options.base_model,
        license_name=options.license,
        trust_remote_code=options.trust_remote_code,
    )
    for line in _closing_lines(card, out):
        print(line)
    if options.push_to_hub:
        print(push(out, options.push_to_hub, card, what=options.what, public=options.public))
    return 0


def _check_options(options: argparse.Namespace) -> None:
    if options.what == "adapter" and (options.dtype or options.unrounded):
        given = f"--dtype {options.dtype}" if options.dtype else "--unrounded"
        raise BadValueError(
            f"{given} is about merged weights, and --what adapter writes none; add --what merged or --what all, or "
            "leave it out."
        )
    if options.public and not options.push_to_hub:
        raise BadValueError("--public is about a repository on the Hub; add --push-to-hub USER/REPO, or leave it out.")


def write_export(
    export: Path,
    out: Path,
    *,
    what: str = "adapter",
    dtype: str | None = None,
    unrounded: bool = False,
    base_model: str | None = None,
    license_name: str = "",
    trust_remote_code: bool = False,
) -> Card:
    """Writes the parts asked for, and a card of the parts that are there then; see the command's options.

    An error leaves what was there. A kill leaves no half export: a new folder appears whole or not at all; in one that
    is there each part does, and program.json, without which nothing reads it, comes last. The same command again
    completes it.

    Raises:
        ExportError: `out` holds other files, the export lacks its adapter, the base has no name that others know, or
            merged weights are asked for and the base is not the one that the adapter was tuned on.
        NotWrittenError: the disk is full, read-only or broken.
    """
    from cotune.storage.durable import new_folder
    from cotune.tuned import ExportError, check_base, read_export

    described = _with_base(read_export(export), base_model)
    if "asked" in described["base"]:
        raise ExportError(
            f'"{export}" has only prompts, since {described["base_model"]} has no weights here: prompts.json and '
            "program.json are the whole export, and cotune predict and cotune ask read them as they are."
        )
    if not (export / "adapter" / "adapter_config.json").is_file():
        raise ExportError(f'"{export}" has no adapter/, so nothing can be made of it; give the run\'s own folder.')
    _check_target(out, export)

    def fill(folder: Path) -> Card:
        into = described.get("merged_into", "the base") if (folder / "merged").is_dir() else ""
        if what != "adapter":  # before the adapter, since this can fail
            lm = _base_lm(described["base"], dtype, unrounded, trust_remote_code)
            check_base(export, described["base"], lm)
            into = _write_merged(lm, described, export / "adapter", folder / "merged")
        if what != "merged":
            _write_adapter(export / "adapter", folder / "adapter", described["base"])
        license = license_name or _known_license(described["base"])
        return _write_texts(folder, export, described, merged_into=into, license=license)

    if not out.exists():
        with new_folder(out, listed=False) as partial:
            return fill(partial)
    if out.resolve() == export.resolve():
        return fill(out)
    with _in_place_of(out) as partial:
        return fill(partial)


def push(out: Path, repo: str, card: Card, *, what: str, public: bool) -> str:
    """Uploads the parts asked for and a card of them; the token is huggingface_hub's own matter. Returns where it is.

    Raises:
        ExportError: no token, no right, no connection, or a base that exists on this machine only.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]  # its HTTP library's

    from cotune.tuned import ExportError

    base = _json(out / "program.json")["base"]
    if what != "merged" and not base["on_hub"]:
        raise ExportError(
            f'the adapter\'s base is "{base["name"]}" on this machine, which others cannot load. Give its name on '
            "the Hub, --base-model USER/MODEL, or push merged weights, --what merged."
        )
    parts = {"adapter": ["adapter"], "merged": ["merged"], "all": ["adapter", "merged"]}[what]
    pushed = replace(
        card,
        adapter=card.adapter if "adapter" in parts else {},
        merged_into=card.merged_into if "merged" in parts else "",
    )
    try:
        api = HfApi()
        url = api.create_repo(repo, private=not public, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            _gather(out, Path(folder), parts, pushed)
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                allow_patterns=[*_FILES, *(f"{part}/*" for part in parts)],
                commit_message="Upload of a program tuned by cotune",
            )
    except (HFValidationError, HTTPError, OSError) as error:  # no token is an OSError, too
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ExportError(
            f'the Hub did not take "{repo}" ({first}). Log in with `hf auth login` or set HF_TOKEN to a token that may '
            "write, and name the repository USER/REPO. The export is in "
            f"{out}."
        ) from error
    return f"pushed to {url}"


def _gather(out: Path, folder: Path, parts: Sequence[str], card: Card) -> None:
    """What is uploaded, in a folder of its own: the export's may hold other parts, and its card describes those too."""
    (folder / "README.md").write_text(card.text(), encoding="utf-8")
    for name in ("program.json", "prompts.json"):
        shutil.copyfile(out / name, folder / name)
    for part in parts:
        shutil.copytree((out / part).resolve(), folder / part, copy_function=os.symlink)


def _with_base(described: dict[str, Any], base_model: str | None) -> dict[str, Any]:
    """program.json with the base's name as others know it; exports of cotune 0.1.0's first days lack the part."""
    from cotune.callbacks.export_program import FORMAT

    base = described.get("base") or _early_base(described)
    if base_model:
        base = {**base, "name": base_model, "on_hub": True, "revision": None}
    return {**described, "format": FORMAT, "base": base}


def _early_base(described: dict[str, Any]) -> dict[str, Any]:
    from cotune.lightning_modules.embedded import GGUF_FILE, HUB_ID
    from cotune.lightning_modules.model_source import EMBEDDED

    name = described["base_model"]
    lm = ((described.get("model") or {}).get("lm") or {}).get("init_args") or {}
    return {
        "model": name,
        "name": HUB_ID if name == EMBEDDED else name,
        "on_hub": name == EMBEDDED,
        "revision": None,
        "gguf_file": lm.get("gguf_file"),
        "gguf": GGUF_FILE if name == EMBEDDED else "",
        "quantization": f"bitsandbytes {lm['quantization']}" if lm.get("quantization") else "",
        "by_run": {name: lm[name] for name in ("quantization", "double_quantization") if lm.get(name)},
        "dtype": lm.get("dtype", "float32"),
    }


_OURS = {"adapter", "merged", "SHA256SUMS", *_FILES}


def _check_target(out: Path, export: Path) -> None:
    from cotune.tuned import ExportError

    if out.exists() and not out.is_dir():
        raise ExportError(f'--out "{out}" is a file; name a folder.')
    if out.resolve() == export.resolve() or not out.is_dir() or (out / "program.json").is_file():
        return
    there = {path.name.removesuffix(".partial") for path in out.iterdir()} - {"", ".replaced"}
    # An export that was not completed, or not put in an earlier one's place.
    killed = (there <= _OURS and there & {"adapter", "merged"}) or (out / ".partial" / "program.json").is_file()
    if there and not killed:
        raise ExportError(f'--out "{out}" holds other files; name a new folder, an empty one or an earlier export.')


@contextmanager
def _in_place_of(folder: Path) -> Iterator[Path]:
    """A folder to fill, whose parts take the place of an earlier export's when they are whole; other files stay."""
    from cotune.storage.durable import as_not_written

    partial, aside = folder / ".partial", folder / ".replaced"
    for one in (partial, aside):
        shutil.rmtree(one, ignore_errors=True)
    try:
        with as_not_written(folder):
            partial.mkdir()
            aside.mkdir()
        yield partial
        with as_not_written(folder):
            try:
                _move_ours(folder, aside, away=True)
                _move_ours(partial, folder, away=False)
            except OSError:
                _move_ours(folder, partial, away=True)
                _move_ours(aside, folder, away=False)
                raise
    finally:
        for one in (partial, aside):
            shutil.rmtree(one, ignore_errors=True)


def _move_ours(source: Path, target: Path, *, away: bool) -> None:
    """Moves an export's parts, links as links; program.json, without which nothing reads them, first or last."""
    for name in sorted(_OURS, key=lambda name: (name == "program.json") != away):
        if os.path.lexists(source / name):
            os.replace(source / name, target / name)


def _write_adapter(source: Path, target: Path, base: dict[str, Any]) -> None:
    from cotune.callbacks.export_program import name_base
    from cotune.storage.durable import as_not_written, new_folder

    if source.resolve() == target.resolve():
        name_base(target, base["name"], base["revision"])
    else:
        with as_not_written(target), new_folder(target, listed=False) as partial:
            shutil.copytree(source, partial, dirs_exist_ok=True)
            name_base(partial, base["name"], base["revision"])
    _list_sums(target)


def _write_merged(lm: LanguageModel, described: dict[str, Any], adapter: Path, target: Path) -> str:
    from cotune.lightning_modules.merged import save_merged
    from cotune.programs import Sampling
    from cotune.storage.durable import new_folder

    sampling = Sampling(**((described.get("model") or {}).get("sampling") or {}))
    with new_folder(target, listed=False) as partial:
        into = save_merged(lm, adapter, partial, sampling=sampling)
    _list_sums(target)
    return into


def _list_sums(part: Path) -> None:
    """Brings the export's SHA256SUMS up to date: `load` compares the adapter with it, and `sha256sum -c` all."""
    from cotune.storage.durable import as_not_written, folder_sums, record_sums

    with as_not_written(part):
        record_sums(part.parent, {f"{part.name}/{name}": digest for name, digest in folder_sums(part).items()})


def _write_texts(folder: Path, export: Path, described: dict[str, Any], *, merged_into: str, license: str) -> Card:
    from cotune.reporting.model_card import Card, read_summary_beside
    from cotune.storage.durable import write_durably

    prompts = (export / "prompts.json").read_text(encoding="utf-8")
    adapter = folder / "adapter" / "adapter_config.json"
    described = {name: value for name, value in described.items() if name != "merged_into"}
    if merged_into:
        described["merged_into"] = merged_into  # for the card of a later command that leaves these weights there
    card = Card(
        name=export.resolve().parent.name if export.name == "export" else export.resolve().name,
        described=described,
        adapter=_json(adapter) if adapter.is_file() else {},
        prompts=json.loads(prompts),
        summary=read_summary_beside(export),
        merged_into=merged_into,
        license=license,
    )
    write_durably(folder / "prompts.json", prompts)
    write_durably(folder / "README.md", card.text())
    # The last of all: a folder without it is no export.
    write_durably(folder / "program.json", json.dumps(described, indent=2, ensure_ascii=False))
    return card


def _base_lm(base: dict[str, Any], dtype: str | None, unrounded: bool, trust: bool) -> LanguageModel:
    """The base as the run held it, or as it was before the run's own quantisation."""
    from cotune.lightning_modules import LanguageModel

    chosen: Any = dtype or base["dtype"]
    rounding = {} if unrounded else base.get("by_run", {})
    return LanguageModel(base["model"], gguf_file=base["gguf_file"], dtype=chosen, trust_remote_code=trust, **rounding)


def _known_license(base: dict[str, Any]) -> str:
    from cotune.lightning_modules.model_source import EMBEDDED

    return "apache-2.0" if base["model"] == EMBEDDED else ""


def _closing_lines(card: Card, out: Path) -> list[str]:
    from cotune.reporting.model_card import serve_commands
    from cotune.storage.served_adapter import vllm_refusals

    base = card.described["base"]
    lines = [f"{out}: {', '.join(_parts(out, card))}, README.md"]
    lines.append(f"base: {base['name']}, {base['quantization'] or 'not quantised'} in the run")
    if card.merged_into:
        lines.append(f"merged into {card.merged_into}")
    if not base["on_hub"]:
        lines.append("the base is a folder of this machine; --base-model USER/MODEL names it for others")
    demos = sum(len(prompt.get("demos") or []) for prompt in card.prompts.values())
    if demos:
        lines.append(f"prompts.json shows {demos} training examples as demos: look at them before you publish")
    lines += [f"vLLM does not take the adapter: {why}" for why in vllm_refusals(card.adapter)]
    return [*lines, *(f"serve: {command}" for command in serve_commands(str(out), base["name"], card))]


def _parts(out: Path, card: Card) -> Sequence[str]:
    names = [*(["adapter"] if card.adapter else []), *(["merged"] if card.merged_into else [])]
    sizes = {name: sum(file.stat().st_size for file in (out / name).iterdir()) for name in names}
    return [f"{name}/ ({size / 1e6:,.1f} MB)" for name, size in sizes.items()]


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))
