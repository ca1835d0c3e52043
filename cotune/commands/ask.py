"""cotune ask: one question to a tuned program in the terminal, and what each of its stages made of it."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cotune.errors import CotuneError

if TYPE_CHECKING:  # the command line is parsed before anything heavy is imported
    from rich.console import Console, RenderableType

    from cotune.programs import Rollout, Step


class AskError(CotuneError, ValueError):
    """The question is not what the program reads. The message names its inputs."""


def parser() -> argparse.ArgumentParser:
    """The command's options; the program's inputs are options too, which only its export knows."""
    made = argparse.ArgumentParser(
        "cotune ask",
        usage="cotune ask --export FOLDER | --config FILE | --program PROGRAM [--INPUT VALUE ...] [--verbose]",
        description="Asks a tuned program (--export) or an untuned one (--config, --program) one question, and shows "
        'what each stage wrote. The program\'s inputs are options, e.g. --question "…"; in a terminal you are asked '
        "for missing ones. An input that has the name of an option of this command is given as NAME=VALUE, without "
        "dashes: lm=VALUE.",
        epilog="Exit codes: 0 when the program gave an answer, 1 when it gave none, 2 for an error that the message "
        "explains.",
        allow_abbrev=False,
    )
    made.add_argument("--export", metavar="FOLDER", help="a run or what it exported, e.g. runs/iris")
    made.add_argument(
        *("-c", "--config"),
        action="append",
        default=[],
        metavar="FILE",
        help="the config of a fit, which may not have run yet",
    )
    made.add_argument("--program", help='module.Class, or a signature, e.g. "question -> answer"')
    made.add_argument(
        "--lm", metavar="MODEL", help="Hub id, folder or .gguf file, instead of the config's LM; not with --export"
    )
    made.add_argument("--verbose", action="store_true", help="show each stage's whole prompt")
    made.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the base model")
    return made


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options, and in `inputs` all words that are none of them."""
    options, rest = parser().parse_known_args(words)
    options.inputs = rest
    return options


def main(options: argparse.Namespace) -> int:
    """Runs the command. Returns 0, or 1 if the program gave no answer.

    Raises:
        ExportError: the export cannot be loaded.
        AskError: an input is unknown, or missing where nobody can be asked; options contradict each other.
    """
    from rich.console import Console

    from cotune.build import build_module
    from cotune.fit.parse_errors import did_you_mean
    from cotune.programs import Example
    from cotune.tuned import Tuned, export_folder, load, program_inputs, read_export

    given = [bool(options.export), bool(options.config or options.program)]
    if sum(given) != 1:
        wrong = options.inputs[0].removeprefix("--") if options.inputs else ""
        near = did_you_mean(wrong, ("export", "config", "program"), "--")
        raise AskError(f"name a tuned program with --export, or an untuned one with --config or --program.{near}")
    if options.export and options.lm:
        raise AskError(
            f"--lm {options.lm} goes with --config or --program: an export is asked with the LM that it was tuned on. "
            f"Leave --lm out; for an input named lm write lm={shlex.quote(options.lm)}."
        )
    folder = export_folder(options.export) if options.export else None
    config = read_export(folder)["model"] if folder else _as_it_comes(options)
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    if config is None:
        load(folder or "")  # refuses, and says how such an export is loaded
    module = build_module(config, where=str(folder / "program.json") if folder else "the options")
    required, optional = program_inputs(module.program)
    inputs = question(options.inputs, required, optional, console)  # before the weights are read: it may be refused
    with console.status("reading the weights"):
        if folder:
            tuned = load(folder, trust_remote_code=options.trust_remote_code)
        else:
            module.configure_model()
            tuned = Tuned(module.eval())
    with console.status("asking"):
        (rollout,) = tuned.rollouts([Example.of(inputs, {})])
    show(rollout, console, verbose=options.verbose)
    return int(rollout.error is not None)


def _as_it_comes(options: argparse.Namespace) -> dict[str, Any]:
    """The "model" part of the configs laid over one another, with --program and --lm in their places."""
    import yaml

    from cotune.fit.config_files import check_config_file
    from cotune.shipped import resolved
    from cotune.tuned import trusted

    model: dict[str, Any] = {"lm": {"class_path": "cotune.lightning_modules.LanguageModel"}, "max_error_rate": 1.0}
    for path in map(Path, map(resolved, options.config)):
        check_config_file(path)
        given = yaml.safe_load(path.read_text(encoding="utf-8")).get("model") or {}
        if isinstance(given.get("lm"), str):  # the class alone
            given = {**given, "lm": {"class_path": given["lm"]}}
        model = _laid_over(model, given)
    if options.program and "->" in options.program:
        model["program"] = {"class_path": "Predict", "init_args": {"signature": options.program}}
    elif options.program:
        model["program"] = options.program
    if "program" not in model:
        raise AskError(f"{', '.join(options.config)} names no model.program; give one with --program.")
    if options.lm:
        model = _laid_over(model, {"lm": {"init_args": {"model": options.lm}}})
    return {**model, "lm": trusted(model["lm"], options.trust_remote_code)}


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        k: _laid_over(below[k], v) for k, v in above.items() if isinstance(v, dict) and isinstance(below.get(k), dict)
    }
    return {**below, **above, **both}


def question(
    words: Sequence[str], required: Sequence[str], optional: Sequence[str], console: Console
) -> dict[str, str]:
    """The program's inputs from `--name value`, `--name=value` and, for any name, `name=value`.

    What is missing is asked for in a terminal.

    Raises:
        AskError: a word that is no input, or an input without a value.
    """
    given = _given(words, [*required, *optional])
    for name in required:
        if name not in given and not (sys.stdin.isatty() and console.is_terminal):
            raise AskError(
                f'the program needs "{name}": give {_option(name, " ")}. Its inputs are {_options(required, optional)}.'
            )
        if name not in given:
            given[name] = console.input(f"[bold]{name}[/bold]: ")
    return given


def show(rollout: Rollout, console: Console, *, verbose: bool) -> None:
    """Prints a rollout stage by stage: panels in a terminal, plain lines elsewhere."""
    for number, step in enumerate(rollout.steps, 1):
        _show_step(number, step, console, verbose)
    if rollout.error is not None:
        console.print(f"no answer: {_harmless(rollout.error.message)}", style="red", markup=False)
        return
    if not console.is_terminal:
        console.print("── prediction")
    for name, value in (rollout.prediction or {}).items():
        console.print(_field(name, value, "bold green"))


def _show_step(number: int, step: Step, console: Console, verbose: bool) -> None:
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    parts: list[RenderableType] = [_prompt(step, verbose)]
    cut = {"length": " (cut at max_new_tokens)", "too_long": " (not generated)"}.get(step.completion.finished, "")
    tokens = len(step.completion.completion_ids)
    parts.append(Text(f"completion, {tokens} token{'' if tokens == 1 else 's'}{cut}", "dim"))
    parts.append(Text(_harmless(step.completion.text.strip()) or "(empty)"))
    parts += [_field(name, value, "cyan") for name, value in step.outputs.items()]
    if not step.outputs:
        parts.append(Text("no output could be read", "red"))
    title = f"{number}. {step.stage}"
    if console.is_terminal:
        console.print(Panel(Group(*parts), title=title, title_align="left"))
    else:
        console.print(f"── {title}", markup=False)
        for part in parts:
            console.print(part)


def _prompt(step: Step, verbose: bool) -> RenderableType:
    from rich.text import Text

    tokens, demos = len(step.completion.prompt_ids), sum(m["role"] == "assistant" for m in step.messages)
    head = f"prompt, {tokens} tokens, {demos} demo{'' if demos == 1 else 's'}"
    if not verbose:
        return Text(f"{head}; --verbose shows it", "dim")
    lines = [f"{m['role']}: {m['content']}" for m in step.messages]
    return Text(_harmless("\n".join([head, *lines])), "dim")


def _field(name: str, value: Any, style: str) -> RenderableType:
    from rich.text import Text

    return Text.assemble((f"{name}: ", style), _harmless(str(value)))


def _harmless(text: str) -> str:
    """Text whose control characters are pictures of themselves: what an LM writes must not steer the terminal."""
    return text.translate(_CONTROL)


_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_CONTROL |= dict.fromkeys(range(128, 160), 0xFFFD)


def _given(words: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if name not in known or not (word.startswith("--") or equals):
            raise AskError(f'"{word}" is no input of the program; its inputs are {_options(known, ())}.')
        if not equals and not waiting:
            raise AskError(f"--{name} has no value; write --{name} VALUE.")
        found[name] = value if equals else waiting.pop(0)
    return found


def _options(required: Sequence[str], optional: Sequence[str]) -> str:
    return ", ".join([*map(_option, required), *(f"{_option(name)} (optional)" for name in optional)])


def _option(name: str, before_value: str = "") -> str:
    """How an input is given: as an option, unless the command has one of that name."""
    if name in {*vars(parser().parse_args([])), "help"}:
        return f"{name}=VALUE"
    return f"--{name}{before_value}VALUE" if before_value else f"--{name}"
