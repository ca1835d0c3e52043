"""Claims about `cotune ask`: the program's inputs are its options, and every stage is shown."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import Said, cotune
from cotune.datamodules.tasks.iris import iris_examples
from rich.console import Console

from cotune.commands.ask import AskError, question, show


@pytest.fixture
def ask(finished: Any, capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *words: cotune(["ask", "--export", str(finished.folder), *words], capsys)


@pytest.fixture
def answered(finished: Any) -> Any:
    """A rollout that the random model ends well."""
    return next(r for r in finished.module.rollouts(iris_examples(), metric=None) if not r.error)


def options(inputs: Any) -> list[str]:
    return [word for name, value in inputs.items() for word in (f"--{name}", value)]


def test_inputs_are_options_and_the_trace_is_shown_plain_when_piped(ask: Any, answered: Any) -> None:
    said: Said = ask(*options(answered.example.inputs))
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    assert lines[0] == "── 1. predict"
    assert re.fullmatch(r"prompt, \d+ tokens, \d demos?; --verbose shows it", lines[1])
    assert said.out.splitlines()[-1].startswith("answer: ")
    assert "\x1b" not in said.out
    assert "Classify the iris flower" not in said.out


def test_verbose_shows_the_prompt(ask: Any, answered: Any) -> None:
    inputs = dict(answered.example.inputs)
    length = inputs.pop("petal_length")
    said = ask("--verbose", f"--petal_length={length}", *options(inputs))
    assert "system: Classify the iris flower" in said.out
    assert f"petal_length: {length}" in said.out


def test_no_answer_is_exit_code_1_and_the_completion_is_still_shown(ask: Any, answered: Any) -> None:
    said = ask(*options(dict.fromkeys(answered.example.inputs, "1" * 1000)))
    assert said.code == 1
    assert "completion, 0 tokens (not generated)" in said.out
    assert "no answer: " in said.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--petal_length", "1"], 'the program needs "petal_width": give --petal_width VALUE. Its inputs are --petal_'),
        (["--colour", "red"], '"--colour" is no input of the program; its inputs are --petal_length, --petal_width'),
        (["setosa"], '"setosa" is no input of the program'),
        (["--petal_length"], "--petal_length has no value; write --petal_length VALUE."),
    ],
)
def test_a_question_that_is_none_says_what_the_program_reads(ask: Any, words: list[str], message: str) -> None:
    said = ask(*words)
    assert said.code == 2
    assert message in said.err
    assert "Traceback" not in said.err


def test_a_terminal_is_asked_for_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Keyboard(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Keyboard("Who?\n"))
    console = Console(file=io.StringIO(), force_terminal=True)
    assert question(["--context", "none"], ["context", "question"], ["hint"], console) == {
        "context": "none",
        "question": "Who?",
    }
    with pytest.raises(AskError, match=r"--question, --hint \(optional\)"):
        question([], ["question"], ["hint"], Console(file=io.StringIO()))


def test_what_the_lm_writes_does_not_steer_the_terminal(answered: Any) -> None:
    from dataclasses import replace

    out = io.StringIO()
    said = replace(answered, steps=(), prediction={"answer": "\x1b]0;owned\x07 \x9b2J\x7f fine\tso\n"})
    show(said, Console(file=out), verbose=False)
    assert out.getvalue() == "── prediction\nanswer: ␛]0;owned␇ �2J␡ fine    so\n\n"


def test_text_of_the_data_is_never_markup(answered: Any) -> None:
    from dataclasses import replace

    step = answered.steps[0]
    odd = replace(step, completion=replace(step.completion, text="[red]x[/red] [/nothing]"), outputs={"answer": "[b]"})
    out = io.StringIO()
    show(
        replace(answered, steps=(odd,), prediction={"answer": "[b]"}),
        Console(file=out, force_terminal=True, width=60),
        verbose=True,
    )
    assert "[red]x[/red] [/nothing]" in out.getvalue()


def test_a_program_is_asked_as_it_comes(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.yaml").write_text("model:\n  sampling: {max_new_tokens: 4}\n  lm: {init_args: {device: cpu}}\n")
    words = ["--config", "own.yaml", "--lm", str(tiny_model)]
    said = cotune(
        ["ask", *words, "--program", "question -> answer: Literal['yes', 'no']", "--question", "Is it?"], capsys
    )
    assert said.code == 0, said.err
    assert said.out.splitlines()[-1] in ("answer: yes", "answer: no")
    assert "names no model.program" in cotune(["ask", *words], capsys).err
    assert cotune(["ask"], capsys).err.startswith("cotune: error: name a tuned program with --export")
    assert cotune(["ask", "--exp", "runs/x"], capsys).err.endswith("Did you mean --export?\n")
    said = cotune(["ask", "--config", "iris", "--colour", "red"], capsys)
    assert '"--colour" is no input of the program; its inputs are --petal_length' in said.err


def test_an_lm_named_by_its_class_alone_is_asked(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.yaml").write_text("model:\n  sampling: {max_new_tokens: 4}\n  lm: LanguageModel\n")
    program = ["--program", "question -> answer: Literal['yes', 'no']", "--question", "Is it?"]
    said = cotune(["ask", "--config", "own.yaml", "--lm", str(tiny_model), *program], capsys)
    assert said.code == 0, said.err
    assert said.out.splitlines()[-1] in ("answer: yes", "answer: no")


def test_an_lm_beside_an_export_is_refused(ask: Any) -> None:
    said = ask("--lm", "other/model", "--petal_length", "1")
    assert said.code == 2
    assert "--lm other/model goes with --config or --program: an export is asked with the LM that it was" in said.err
    assert "for an input named lm write lm=other/model" in said.err


def test_an_input_with_the_name_of_an_option_is_given_without_dashes(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own.yaml").write_text("model:\n  sampling: {max_new_tokens: 4}\n")
    words = ["ask", "--config", "own.yaml", "--lm", str(tiny_model), "--verbose"]
    words += ["--program", "lm, config, text -> answer: Literal['yes', 'no']"]
    said = cotune([*words, "--text", "a"], capsys)
    assert said.code == 2
    assert 'the program needs "lm": give lm=VALUE. Its inputs are lm=VALUE, config=VALUE, --text.' in said.err
    said = cotune([*words, "--text", "a", "lm=gpt", "config=own"], capsys)
    assert said.code == 0, said.err
    assert "lm: gpt" in said.out
    assert "config: own" in said.out
