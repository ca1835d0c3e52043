"""Progress: one line that stays inside the terminal, plain lines in a log file."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from cotune.callbacks import progress
from cotune.callbacks.progress import StepProgress, TrainingBar, training_bar_paused
from cotune.programs import completed
from cotune.prompting import Candidate
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from rich.console import Console
from tiny_fit import tiny_fit


def _drawn(monkeypatch: pytest.MonkeyPatch, *, width: int, terminal: bool) -> StringIO:
    out = StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda quiet: Console(file=out, width=width, force_terminal=terminal, quiet=quiet)
    )
    with StepProgress("[1/3] prompt step") as bar:
        bar.start(20, "incumbent")
        bar.advance(20)
        bar.candidate(0, 9, Candidate({}, (0.0, 1.0), why="incumbent"), 0.5)
        bar.start(20, "random 1")
        bar.advance(12)
        bar._bar.refresh()
    return out


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_bar_never_wraps(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", _drawn(monkeypatch, width=width, terminal=True).getvalue())
    lines = [line for line in re.split(r"[\r\n]+", text) if "left" in line]
    assert lines
    assert max(map(len, lines)) <= width


def test_the_bar_says_candidate_best_examples_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", _drawn(monkeypatch, width=140, terminal=True).getvalue())
    assert re.search(r"candidate 2/9, best 0\.500 .* 12/20 [\d.]+ examples/s 0:00:00 • [-:\d]+ left", text)
    assert "?" not in text


def test_a_log_file_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    text = _drawn(monkeypatch, width=40, terminal=False).getvalue()
    assert text.strip() == "[1/3] prompt step: candidate 1/9 (incumbent): score 0.500, best 0.500"


def test_a_log_file_is_told_once_a_minute_how_far_a_pass_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    out = StringIO()
    monkeypatch.setattr(progress, "Console", lambda quiet: Console(file=out, force_terminal=False, quiet=quiet))
    with StepProgress("[1/3] weight step") as bar:
        bar.start(60, "traces")  # of two stages, each one LM batch: all examples end at once
        for _ in range(120):
            now += 0.75
            completed()
        bar.advance(60)
        bar.start(60, "val")
        for _ in range(60):
            now += 1.5
            bar.advance(1)
    completed()  # nobody listens any more
    assert out.getvalue().splitlines() == [
        "[1/3] weight step: traces: 0/60, 80 LM calls",
        "[1/3] weight step: val: 20/60, 0.7 examples/s",
        "[1/3] weight step: val: 60/60, 0.7 examples/s",
    ]


def test_a_candidate_says_the_calls_of_each_role(capsys: pytest.CaptureFixture[str]) -> None:
    told = Candidate({}, (1.0,), why="round 1", lineage={"calls": {"program": 9, "proposer": 2}})
    StepProgress("search").candidate(1, 2, told, 1.0)
    assert capsys.readouterr().out.endswith("best 1.000; LM calls so far: 9 of the program, 2 of the proposer\n")


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_lightnings_bar_makes_room_and_comes_back(
    bar: type[Callback], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live: list[tuple[bool, bool]] = []
    shown: Any = bar()

    class Look(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if isinstance(shown, RichProgressBar) and shown.progress is not None:
                with training_bar_paused(trainer):
                    paused = not shown.progress.live.is_started
                live.append((paused, shown.progress.live.is_started))

    options = {"enable_progress_bar": True}
    fit = tiny_fit(tiny_model, tmp_path, "w -> p", callbacks=[Look(), shown], trainer=options).run()
    assert len(fit.alternate.history) == 3
    assert live == ([(True, True)] * 2 if bar is RichProgressBar else [])


@pytest.mark.parametrize("width", [80, 100])
def test_the_bar_of_training_counts_the_steps_epochs_on_one_line_and_goes(
    width: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = StringIO()
    console = Console(file=out, width=width, force_terminal=True)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.get_console", lambda: console)
    fits: list[Any] = []
    shown = TrainingBar(lambda: fits[0].alternate.epoch_title)
    fits.append(tiny_fit(tiny_model, tmp_path, "w -> w", callbacks=[shown], trainer={"enable_progress_bar": True}))
    fits[0].run()
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()))
    titles = dict.fromkeys(line[: line.index(" ━")] for line in lines if "epoch" in line)
    assert list(titles) == [f"[{step}/2] epoch {epoch}/2" for step in (0, 1) for epoch in (1, 2)]
    ended = [line for line in lines if "val: " in line]
    assert ended
    assert all(
        re.fullmatch(r"\[\d/2\] epoch \d/2 ━+[╸╺]?━* \d/\d \S+ • \S+ loss: \S+ val: \S+\s*", line) for line in ended
    )
    assert shown.progress is not None
    assert out.getvalue().rstrip("\n").endswith("\x1b[1A\x1b[2K")  # taken back
