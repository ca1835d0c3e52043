"""cotune compare: runs side by side, example by example where they have examples in common."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import cotune
from cotune.reporting.comparison import compare_runs
from cotune.reporting.page import render_comparison
from cotune.reporting.run_record import read_run
from written_run import write_run


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    first = write_run(tmp_path / "a")
    second = write_run(tmp_path / "b", scores=((0, 0, 0, 1, 0), (0, 1, 1, 1, 1)), seed=2)
    return first, second


def test_scores_cost_and_the_differing_settings_are_shown(
    two: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    said = cotune(["compare", *map(str, two)], capsys)
    assert (said.code, said.err) == (0, "")
    lines = [" ".join(line.replace("│", " ").split()) for line in said.out.splitlines()]
    assert "a p -> w -> p p -> w 0.600 0.500 4,006 81,212 286" in lines
    assert "b p -> w -> p p 0.800 0.500 2,001 40,602 141" in lines
    assert "p -> w 0.600 –" in lines
    assert "seed_everything 1 2" in lines
    assert not [line for line in lines if line.startswith(("model.", "name", "alternate."))]


def test_the_paired_difference_is_over_common_examples(two: tuple[Path, Path]) -> None:
    val, test = compare_runs([read_run(folder) for folder in two]).pairs
    assert (val.part, val.difference.pairs, test.part, test.difference.pairs) == ("val", 5, "test", 2)
    assert val.difference.mean == pytest.approx(0.2)
    assert [gap.example for gap in val.won] == ["ex-2", "ex-4"]
    assert [gap.example for gap in val.lost] == ["ex-0"]


def test_equal_ids_of_other_examples_are_not_compared(tmp_path: Path, two: tuple[Path, Path]) -> None:
    other = write_run(tmp_path / "c")
    for path in (other / "rollouts").iterdir():
        path.write_text(path.read_text().replace("right 1", "right one").replace("question 2", "question two"))
    (val, test) = compare_runs([read_run(two[0]), read_run(other)]).pairs
    assert (val.difference.pairs, val.unlike) == (3, 2)
    assert (test.difference.pairs, test.unlike) == (1, 1)


def test_what_cannot_be_compared_is_said(tmp_path: Path, two: tuple[Path, Path]) -> None:
    bare = write_run(tmp_path / "bare", recorded=False)
    apart = write_run(tmp_path / "apart", text="!", finished=False)
    found = compare_runs([read_run(folder) for folder in (two[0], bare, apart)])
    assert not found.pairs
    assert "a and bare on val: bare has no rollouts of it, so examples cannot be compared." in found.notes
    assert "a and apart on val: they have no example in common." in found.notes
    assert "apart is not finished; it is compared as far as it has come." in found.notes


def test_the_page_shows_the_same_and_escapes_it(tmp_path: Path, two: tuple[Path, Path]) -> None:
    hostile = [
        write_run(tmp_path / name / "x", text="<script>alert(1)</script>", seed=seed) for seed, name in enumerate("de")
    ]
    page = render_comparison(compare_runs([read_run(folder) for folder in hostile]))
    assert "<script" not in page
    out = render_comparison(compare_runs([read_run(folder) for folder in two]))
    assert "ex-2" in out
    assert "+0.200" in out
    assert "seed_<wbr>everything" in out


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name / "run") for name in "ab"]
    assert list(compare_runs([read_run(folder) for folder in folders]).names) == list(map(str, folders))


def test_settings_are_not_compared_with_brackets_read_as_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(write_run(tmp_path / name, text=text)) for name, text in (("a", "[red]x[/red]"), ("b", ""))]
    assert "m[red]x[/red]" in cotune(["compare", *folders], capsys).out


@pytest.mark.parametrize("words", [["a"], ["a", "a"], ["a", "./a"]])
def test_one_run_alone_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("a"))
    said = cotune(["compare", *words], capsys)
    assert said.code == 2
    assert "give two or more different runs" in said.err


def test_the_page_is_written_where_it_is_told(two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    said = cotune(["compare", *map(str, two), "--out", "both.html"], capsys)
    assert said.code == 0
    assert Path("both.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_what_is_no_run_is_named_and_left_out(two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    Path("refused").mkdir()
    Path("refused", ".lock").touch()
    Path("completions.sqlite").touch()
    said = cotune(["compare", "completions.sqlite", *map(str, two), "refused"], capsys)
    assert said.code == 0
    assert 'left out: "completions.sqlite" is no run' in said.err
    assert 'left out: "refused" is no run: it has no history.jsonl' in said.err
    assert len(said.err.splitlines()) == 2
    assert said.out == cotune(["compare", *map(str, two)], capsys).out
    for words in (["refused", str(two[0])], ["nowhere", *map(str, two)]):
        said = cotune(["compare", *words], capsys)
        assert said.code == 2
        assert "is no run: it has no history.jsonl" in said.err
