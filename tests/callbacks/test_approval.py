"""Approval: a person's answer is asked for once, on a terminal or in a file, and kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from cotune.callbacks.approval import Approval, ApprovalNeededError
from cotune.datamodules import Sizes
from cotune.prompting import ReflectiveSearch
from cotune.prompting.search import Review
from fakes import FakeLM
from tiny_fit import Fit, tiny_fit

ASKED = [Review("plan", "Plan.", 'Plan well.\n- "sort": first\n'), Review("work", "Work.", "Work hard.")]


def answering(monkeypatch: pytest.MonkeyPatch, *answers: str) -> None:
    said: Iterator[str] = iter(answers)

    def asked(prompt: str) -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", asked)


def test_without_a_terminal_the_run_ends_and_goes_on_with_the_answers_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "proposals.yaml"
    with pytest.raises(ApprovalNeededError, match=r"2 proposed instructions wait .* same command again"):
        Approval(path, terminal=False).review(ASKED)
    text = path.read_text()
    assert '    Plan well.\n    - "sort": first\n' in text  # as a block that can be edited
    path.write_text(text.replace("answer: ''", "answer: yes").replace("Work hard.", "Work with care."))
    assert Approval(path, terminal=False).review(ASKED) == ['Plan well.\n- "sort": first', "Work with care."]


def test_on_a_terminal_each_is_shown_answered_and_never_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "proposals.yaml"
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", "sed -i s/hard/less/")
    answering(monkeypatch, "n", "what?", "e", "y")
    assert Approval(path, terminal=True).review(ASKED) == ["", "Work less."]
    assert "- Work.\n+ Work hard." in capsys.readouterr().out
    answering(monkeypatch)
    assert Approval(path, terminal=True).review(ASKED) == ["", "Work less."]


def test_answers_given_before_the_terminal_was_closed_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, "y")
    with pytest.raises(ApprovalNeededError, match="1 proposed instruction waits"):
        Approval(tmp_path / "p.yaml", terminal=True).review(ASKED)
    assert [row["answer"] for row in yaml.safe_load((tmp_path / "p.yaml").read_text()).values()] == ["y", ""]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: {stage: s, now: a, proposed: b, answer: perhaps}", "write y or n"),
        ("- a", "cannot be read"),
        ("a: {stage: s, now: a, proposed: , answer: y}", '`proposed` of entry a, for the instruction of "s", is empty'),
        ("a: {stage: s, now: a, proposed: ' ', answer: ''}", "entry a, .* is empty"),
        ("a: {stage: s, now: a, proposed: [b], answer: y}", "entry a, .* is no text but .*put it in quotes"),
    ],
)
def test_a_file_that_was_filled_in_wrong_is_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ApprovalNeededError, match=said):
        Approval(tmp_path / "p.yaml", terminal=False).review(ASKED)
    assert (tmp_path / "p.yaml").read_text() == text


def test_a_text_that_was_emptied_can_be_refused_and_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.yaml"
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", "truncate -s 0")
    answering(monkeypatch, "n", "e", "y")
    assert Approval(path, terminal=True).review(ASKED) == ["", "Work hard."]
    rows = yaml.safe_load(path.read_text())
    next(iter(rows.values()))["proposed"] = None
    path.write_text(yaml.safe_dump(rows, sort_keys=False))
    assert Approval(path, terminal=False).review(ASKED) == ["", "Work hard."]


@pytest.mark.slow
def test_a_fit_waits_for_answers_in_its_folder_and_goes_on_with_them(tiny_model: Path, tmp_path: Path) -> None:
    def fit() -> Fit:
        writes = FakeLM(lambda request: "Name it.")
        search = ReflectiveSearch(max_runs=8, minibatch=1, proposals=1, proposer=writes, approve=True)
        sizes = Sizes(train=2, dev=2, val=2, test=1)
        return tiny_fit(tiny_model, tmp_path, "p", search=search, sizes=sizes, metric=lambda example, prediction: 0.5)

    with pytest.raises(ApprovalNeededError):
        fit().run()
    path = tmp_path / "proposals.yaml"
    path.write_text(path.read_text().replace("answer: ''", "answer: y").replace("Name it.", "Name the species."))
    found = fit().run().alternate.history
    assert any("rejected: no better on the minibatch" in note for note in found[1]["notes"])
    assert "Name the species." in path.read_text()
