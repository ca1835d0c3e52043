"""Command lines on the tiny model: what a user types, run in this process."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from waiting import until

from cotune.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"train": 12, "dev": 6, "val": 8, "test": 4}


@dataclass(frozen=True)
class Said:
    """What a command gave back: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def tiny(model: Path, *, metric: bool = True) -> list[str]:
    """Options that make any configuration small: a random model that ends its turns, a metric that it can please."""
    return [
        *("--model.lm", "tiny_fit.CurtLM", "--model.lm.model", str(model), "--model.lm.device", "cpu"),
        *(("--data.metric", "tiny_fit.digest") if metric else ()),
        *("--trainer.accelerator", "cpu"),
    ]


def fit(model: Path, *more: str, schedule: str = "p -> w -> p", name: str = "tiny") -> list[str]:
    """`cotune fit` on a few flowers, in seconds."""
    sizes = [word for part, size in SIZES.items() for word in (f"--data.sizes.{part}", str(size))]
    return [
        *("fit", "--config", str(ROOT / "configs" / "iris.yaml"), *tiny(model), *sizes),
        *("--name", name, "--alternate.schedule", schedule, "--alternate.epochs", "2"),
        *("--alternate.search", "RandomDemoSearch", "--alternate.search.num_candidates", "1"),
        *("--data.bootstrapping.attempts", "2"),
        *("--alternate.gate", "false", "--model.sampling.max_new_tokens", "6"),
        *("--trainer.enable_progress_bar", "false", *more),
    ]


def cotune(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> Said:
    """Runs a command line in this process."""
    capsys.readouterr()
    try:
        code = main(words)
    except SystemExit as stop:  # how argument parsers answer --help and typos
        code = int(stop.code or 0)
    said = capsys.readouterr()
    return Said(code, said.out, said.err)


def served(words: list[str], asking: Callable[[str], None]) -> tuple[int, str]:
    """Runs the command, does something with its address, and has SIGTERM end it; exit code and what it said."""
    said, failed, ended = io.StringIO(), list[BaseException](), threading.Event()

    def work() -> None:
        try:
            until(lambda: "answers at" in said.getvalue() or ended.is_set())
            asking(said.getvalue().split(" answers at ")[1].split("/v1")[0])
        except BaseException as error:
            failed.append(error)
        finally:
            if not ended.is_set():
                os.kill(os.getpid(), signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        with redirect_stdout(said):
            code = main(["serve", *words, "--port", "0"])
    finally:
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not failed, failed
    return code, said.getvalue()
